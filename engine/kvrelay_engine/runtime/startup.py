"""From settings to a ready engine, phase by phase, each with its seconds."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kvrelay_engine.cache.allocator import BlockAllocator
from kvrelay_engine.runtime.config import WorkerConfig
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import DeviceUnavailable, NotEnoughMemory
from kvrelay_protocol.telemetry import Telemetry, context_of
from kvrelay_protocol.versions import KV_VERSION
from kvrelay_protocol.weights.local import LocalWeights

if TYPE_CHECKING:
    from kvrelay_engine.models.resident import ResidentWeights
    from kvrelay_engine.runner import ModelRunner
    from kvrelay_protocol.weights.kept import KeptFiles

PROGRESS_EVERY_S = 5.0
"""A log is no terminal: one progress line per this many seconds."""


class PhaseListener(Protocol):
    """Who else wants to know how far a start is. Called on the thread that starts; must not block."""

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Args: bytes `done` of `total`, where the phase counts them."""

    def close(self) -> None:
        """The worker is ready."""


Attributes = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, slots=True)
class _Phase:
    """One that has ended."""

    name: str
    begun: float
    ended: float
    attributes: dict[str, str | int | float | bool] = field(default_factory=dict)


class Phases:
    """Prints what start-up is doing and how long each phase took, one line each; later, their spans."""

    def __init__(self, *, begun: float | None = None) -> None:
        self.begun = time.monotonic() if begun is None else begun
        """When start-up began, by the monotonic clock."""
        self.listener: PhaseListener | None = None
        self._past: list[_Phase] = []

    @classmethod
    def of_process(cls) -> "Phases":
        """Counted from the start of this process, whose imports are its first phase."""
        running = _process_age_s()
        phases = cls(begun=time.monotonic() - running)
        phases._ended("python, torch", phases.begun, {})
        return phases

    @contextmanager
    def phase(self, name: str) -> Iterator[dict[str, str | int | float | bool]]:
        """Time a block; what is put in the mapping becomes attributes of its span."""
        begun = time.monotonic()
        attributes: dict[str, str | int | float | bool] = {}
        self.progress(name)
        yield attributes
        self._ended(name, begun, attributes)

    def _ended(self, name: str, begun: float, attributes: Attributes) -> None:
        phase = _Phase(name, begun, time.monotonic(), dict(attributes))
        self._past.append(phase)
        self.line(f"{name:<18} {phase.ended - begun:6.2f} s")

    def trace(self, telemetry: Telemetry) -> None:
        """One span for the start so far, one below it for each phase."""
        if not self._past:
            return

        def wall_ns(moment: float) -> int:
            return time.time_ns() - int((time.monotonic() - moment) * 1e9)

        root = telemetry.start_span("start", parent=None, start_ns=wall_ns(self.begun))
        for phase in self._past:
            span = telemetry.start_span(
                phase.name,
                parent=context_of(root),
                start_ns=wall_ns(phase.begun),
                attributes=phase.attributes,
            )
            span.end(wall_ns(phase.ended))
        root.end()

    def progress(self, name: str, done: int = 0, total: int = 0) -> None:
        """Tell the listener; nothing is printed."""
        if self.listener is not None:
            self.listener.phase(name.replace(" ", "_"), done, total)

    def ready(self) -> None:
        """Start-up is over. Idempotent."""
        if self.listener is not None:
            self.listener.close()
            self.listener = None

    def line(self, text: str) -> None:
        print(text, flush=True)

    @property
    def elapsed(self) -> float:
        """Seconds since start-up began."""
        return time.monotonic() - self.begun


def _process_age_s() -> float:
    """Seconds since the kernel started this process (proc(5): field 22 of stat, ticks since boot)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


class LoadProgress:
    """Weight loading as lines: bytes, rate, what is left. Quiet for loads that end at once."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases
        self._begun = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        self._phases.progress("load weights", done, total)
        now = time.monotonic()
        if now - self._last < PROGRESS_EVERY_S:
            return
        self._last = now
        rate = done / (now - self._begun)
        left = (total - done) / rate if rate else 0.0
        self._phases.line(
            f"weights {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s, {left:.0f} s left",
        )


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded model with its pool, and what others must know of it."""

    runner: "ModelRunner"
    allocator: BlockAllocator
    fingerprint: str
    kv_layout: pb.KvLayout
    max_model_len: int
    """Tokens of prompt plus answer: the smallest of the model's, the operator's and the pool's limit."""
    shared_weights: "KeptFiles | ResidentWeights | None" = None
    """What workers that start later may read."""


def import_engine() -> None:
    """Import everything that `start_engine` needs; the rest of it is measured in milliseconds."""
    import kvrelay_engine.loading
    import kvrelay_engine.models.weights
    import kvrelay_engine.runtime.share_weights
    import kvrelay_engine.runtime.warmup  # noqa: F401 - for `start_engine`


def start_engine(config: WorkerConfig, phases: Phases) -> Engine:
    """Load the weights, allocate the pool, run one step.

    Raises:
        InvalidModel, UnsupportedModel: see `load_engine`; a wrong checksum, a store that fails.
        DeviceUnavailable: no such device here.
        NotEnoughMemory: the pool does not hold one sequence, or allocation failed.
    """
    with phases.phase("check device"):
        import torch

        from kvrelay_engine.cache.sizing import kv_bytes_per_block
        from kvrelay_engine.loading import load_engine, set_compute_threads
        from kvrelay_engine.models.dtypes import DTYPE_BYTES, resolve_dtype
        from kvrelay_engine.models.weights import load_model_config
        from kvrelay_engine.runtime.share_weights import share_weights, why_not_shared
        from kvrelay_engine.runtime.warmup import fingerprint, warm_up

        set_compute_threads(config.threads)
        _check_device(config.device)
    model = load_model_config(config.model_dir)
    dtype = resolve_dtype(config.dtype, model.checkpoint_dtype)
    block_bytes = kv_bytes_per_block(model, config.block_size, DTYPE_BYTES[dtype])
    num_blocks = config.num_blocks or config.kv_memory_bytes // block_bytes
    wanted = config.max_model_len or model.max_position_embeddings
    if num_blocks * config.block_size < (config.max_model_len or config.block_size * 2):
        raise NotEnoughMemory(
            f"a KV pool of {num_blocks} blocks holds {num_blocks * config.block_size} tokens, "
            f"one sequence needs {wanted}; raise --kv-memory to at least "
            f"{-(-wanted // config.block_size) * block_bytes / 2**20:.0f} MiB "
            "or lower --max-model-len",
        )
    source = config.weights or LocalWeights(config.model_dir)
    with phases.phase("load weights") as attributes:
        try:
            runner = load_engine(
                config.model_dir,
                device=config.device,
                dtype=config.dtype,
                num_blocks=num_blocks,
                block_size=config.block_size,
                max_step_tokens=config.max_batch_tokens + config.max_sequences,
                quantization=None if config.quantization == "none" else config.quantization,
                progress=LoadProgress(phases),
                source=source,
            )
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise NotEnoughMemory(
                f"weights and a KV pool of {num_blocks * block_bytes / 2**30:.1f} GiB do not fit on "
                f"{config.device}; lower --kv-memory ({type(error).__name__})",
            ) from None
        report = source.report()
        attributes.update(report.attributes())
    for line in report.lines():
        phases.line(f"{'weights':<18} {line}")
    with phases.phase("warm up"):
        warm_up(runner)
    name = fingerprint(config.model_dir, source)
    shared = share_weights(config, runner, source)
    if shared is not None and not shared.identity:
        phases.line(f"{'weights':<18} {why_not_shared(shared)}")
    source.close()
    return Engine(
        runner=runner,
        allocator=BlockAllocator(num_blocks, config.block_size),
        fingerprint=name,
        kv_layout=pb.KvLayout(
            model_fingerprint=name,
            dtype=dtype,
            block_size=config.block_size,
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            protocol_version=KV_VERSION,
        ),
        max_model_len=min(wanted, model.max_position_embeddings, num_blocks * config.block_size),
        shared_weights=shared,
    )


def _check_device(device: str) -> None:
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceUnavailable(
            f"--device {device}: torch {torch.__version__} sees no CUDA device; use --device cpu",
        )
