"""The fleet file: rates of a worker, what a start takes, bounds, and what is promised to users."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from kvrelay_protocol.errors import UsageError
from kvrelay_router.scaling import Budget, PoolConfig, ScalerConfig

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits of one request, and the share of requests that must keep both."""

    ttft_s: float
    tpot_s: float
    attainment: float = 0.99


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast one worker is; the same device in both pools."""

    prefill_tokens_per_s: float
    """At the beginning of a prompt."""
    context_doubling_tokens: float
    """Position at which a prompt token takes twice as long, for attention."""
    step_s: float
    """A decode step's share that no stream adds to: reading the weights."""
    step_per_stream_s: float
    step_per_context_token_s: float
    """Reading the KV of one token."""
    block_size: int
    blocks: int
    """KV blocks of one worker."""
    kv_bytes_per_token: float
    link_bytes_per_s: float
    exposed_transfer: float
    """Share of a KV transfer that the prefill does not hide: the last group of layers."""
    chunk_tokens: int = 512
    """Prompt tokens that a decode worker computes in one step."""

    def prefill_s(self, prompt: int, cached: int) -> float:
        """Integral of (1 + position / doubling) / rate over what is not cached."""
        bent = (prompt * prompt - cached * cached) / (2 * self.context_doubling_tokens)
        return (prompt - cached + bent) / self.prefill_tokens_per_s

    def decode_step_s(self, streams: int, context_tokens: float) -> float:
        return (
            self.step_s
            + streams * self.step_per_stream_s
            + context_tokens * self.step_per_context_token_s
        )

    def transfer_s(self, tokens: int) -> float:
        return tokens * self.kv_bytes_per_token / self.link_bytes_per_s * self.exposed_transfer


@dataclass(frozen=True, slots=True)
class PoolFleet:
    """What starts of one pool take, and its bounds."""

    cold_start_s: float
    min: int = 0
    max: int = 1
    initial: int = 0
    """Ready when the trace begins, for every policy: traces are cut out of a running service."""
    sleepers: int = 0
    """Processes that may sleep: weights in host memory, device freed and not paid for."""
    wake_s: float = 0.0
    """Of a process that sleeps."""
    idle_s: float | None = None
    """None: the time of the start that would follow, the break-even of ski rental."""
    stabilisation_s: float | None = None
    """None: twice the time of that start, and no less than half the meter's window."""

    @property
    def start_s(self) -> float:
        """What a start takes as a rule."""
        return self.wake_s if self.sleepers else self.cold_start_s

    def scaler(self) -> PoolConfig:
        """The policy's settings that follow from it."""
        stabilisation = max(30.0, 2 * self.start_s)
        return PoolConfig(
            min=self.min,
            max=self.max,
            idle_s=self.start_s if self.idle_s is None else self.idle_s,
            stabilisation_s=(
                stabilisation if self.stabilisation_s is None else self.stabilisation_s
            ),
            cooldown_s=self.start_s,
            start_s=self.start_s,
            start_timeout_s=max(60.0, 5 * self.cold_start_s),
        )


@dataclass(frozen=True, slots=True)
class Targets:
    """The policy's targets; see `ScalerConfig`."""

    backlog_s: float = 2.0
    utilisation: float = 0.8
    block_occupancy: float = 0.8
    streams: int = 64
    split_utilisation: float = 0.5
    max_replicas: int | None = None


@dataclass(frozen=True, slots=True)
class Fleet:
    """One model on one kind of device."""

    name: str
    slo: Slo
    rates: Rates
    prefill: PoolFleet
    decode: PoolFleet
    targets: Targets = field(default_factory=Targets)
    decide_every_s: float = 1.0

    def scaler(self) -> ScalerConfig:
        """What `decide` is given."""
        targets = self.targets
        return ScalerConfig(
            prefill=self.prefill.scaler(),
            decode=self.decode.scaler(),
            target_backlog_s=targets.backlog_s,
            target_utilisation=targets.utilisation,
            target_block_occupancy=targets.block_occupancy,
            target_streams=targets.streams,
            split_utilisation=targets.split_utilisation,
            budget=Budget(replicas=targets.max_replicas),
        )


def read_fleet(path: Path, changes: Mapping[str, str] | None = None) -> Fleet:
    """A fleet file in YAML.

    Args:
        path: of the file.
        changes: dotted keys of the file and what they are instead, as YAML.

    Raises:
        UsageError: it can't be read, or a key of it is missing, unknown or out of range.
    """
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key, value in (changes or {}).items():
            _change(document, key, yaml.safe_load(value))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--fleet {path} can't be read: {error}") from None
    except yaml.YAMLError as error:
        line = str(error).replace("\n", " ")
        raise UsageError(f"--fleet {path} is no YAML: {line}") from None
    try:
        fleet = _build(Fleet, document, "")
        fleet.scaler()
    except ValueError as error:
        raise UsageError(f"--fleet {path}: {error}") from None
    return fleet


def _change(document: Any, key: str, value: Any) -> None:
    """Put a value under a dotted key; `_build` says later what is wrong with either."""
    *folders, last = key.split(".")
    for folder in folders:
        document = document.setdefault(folder, {}) if isinstance(document, dict) else None
    if isinstance(document, dict):
        document[last] = value


def _build(cls: type[_T], value: Any, where: str) -> _T:
    """A dataclass from a mapping, nested ones too; a ValueError names the key that is wrong."""
    if not isinstance(value, Mapping):
        raise ValueError(  # noqa: TRY004 - a value of the file, whatever its type
            f"{where or 'the file'} must be a mapping of {cls.__name__.lower()} keys"
        )
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type] # only dataclasses get here
    for key in value:
        if key not in known:
            raise ValueError(f"{where}{key} is unknown; there are {', '.join(known)}")
    for name, spec in known.items():
        needed = spec.default is MISSING and spec.default_factory is MISSING
        if needed and name not in value:
            raise ValueError(f"{where}{name} is missing")
    return cls(**{key: _value(hints[key], item, f"{where}{key}") for key, item in value.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__"):
        return _build(kind, value, f"{where}.")
    if kind is str:
        return str(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ValueError(f"{where} is {value!r} and must be a number of at least 0")
    if kind in {int, int | None} and value != int(value):
        raise ValueError(f"{where} is {value!r} and must be a whole number")
    return value
