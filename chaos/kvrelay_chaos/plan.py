"""What will go wrong, when and where: drawn from a seed, the same every time, kept as JSON."""

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias

from kvrelay_chaos.shape import Shape
from kvrelay_protocol.errors import UsageError

VERSION = 1
Value: TypeAlias = float | int | str
Parameters: TypeAlias = Mapping[str, Value]


class Drawable(Protocol):
    """What the plan needs to know of a kind of fault."""

    name: ClassVar[str]
    weight: ClassVar[float]
    """How often it is drawn, relative to the others."""
    cost_s: ClassVar[float]
    """Seconds by which it moves the faults after it, so that a stack has time for both."""

    def targets(self, shape: Shape) -> Sequence[str]: ...

    def draw(self, dice: random.Random, target: str) -> Parameters: ...


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is to go wrong."""

    number: int
    kind: str
    target: str
    at_s: float
    """Seconds after the start, quiet points not counted."""
    parameters: Parameters

    def __str__(self) -> str:
        said = " ".join(f"{name}={_short(value)}" for name, value in self.parameters.items())
        return f"{self.number:>6} {self.at_s:>9.2f} s  {self.kind:<18} {self.target:<22} {said}".rstrip()


@dataclass(frozen=True, slots=True)
class Plan:
    """All faults of a run, in the order of their times."""

    seed: int
    shape: Shape
    faults: tuple[Fault, ...]

    def counts(self) -> Counter[str]:
        return Counter(fault.kind for fault in self.faults)

    def save(self, path: Path) -> None:
        """Write it, so that `load` gives the same plan.

        Raises:
            UsageError: the file can't be written.
        """
        content = {
            "version": VERSION,
            "seed": self.seed,
            "shape": asdict(self.shape),
            "faults": [asdict(fault) for fault in self.faults],
        }
        try:
            path.write_text(json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise UsageError(f"--save-plan {path} can't be written: {error.strerror}") from None

    @classmethod
    def load(cls, path: Path, known: Iterable[str]) -> "Plan":
        """Read what `save` wrote.

        Raises:
            UsageError: it is no plan, of another version, or names a kind that is not known.
        """
        try:
            content: Any = json.loads(path.read_text())
            if content["version"] != VERSION:
                raise UsageError(f"--plan {path} has version {content['version']}, not {VERSION}")
            shape = Shape(**content["shape"])
            faults = tuple(Fault(**fault) for fault in content["faults"])
            plan = cls(content["seed"], shape, faults)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"--plan {path} is no plan of kvrelay chaos: {error}") from None
        strange = sorted(plan.counts().keys() - set(known))
        if strange:
            raise UsageError(
                f"--plan {path} names kinds of fault unknown here: {', '.join(strange)}"
            )
        return plan


def draw_plan(
    kinds: Sequence[Drawable],
    shape: Shape,
    *,
    count: int,
    seed: int,
    duration_s: float | None = None,
) -> Plan:
    """Draw `count` faults.

    The first `len(kinds)` of them, in random order, are one of each kind, so that a short plan leaves none
    out; the others follow the weights. Pauses between them are exponential with the kind's cost as their
    mean, and then stretched or squeezed to `duration_s` where one is given.
    """
    dice = random.Random(f"kvrelay chaos {seed}")
    usable = [kind for kind in kinds if kind.targets(shape)]
    first = dice.sample(usable, min(count, len(usable)))
    rest = dice.choices(usable, [kind.weight for kind in usable], k=count - len(first))
    at_s, faults = 0.0, []
    for number, kind in enumerate([*first, *rest]):
        target = dice.choice(kind.targets(shape))
        faults.append(Fault(number, kind.name, target, round(at_s, 3), kind.draw(dice, target)))
        at_s += dice.expovariate(1 / kind.cost_s)
    scale = 1.0 if duration_s is None or not at_s else duration_s / at_s
    placed = tuple(
        Fault(f.number, f.kind, f.target, round(f.at_s * scale, 3), f.parameters) for f in faults
    )
    return Plan(seed, shape, placed)


def _short(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
