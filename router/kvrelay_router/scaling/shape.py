"""One pool or two: whether prompts get workers of their own, or decode workers compute them.

Decode workers serve alone for as long as that takes fewer replicas. Two pools round up twice, which
small fleets pay for; one pool steps its streams between prompts, which large ones pay for.
"""

from dataclasses import dataclass

from kvrelay_router.scaling.state import ShapeMemory


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the load calls for in either shape."""

    together: int
    """Decode workers that also compute every prompt."""
    most: int
    """Decode workers that there may be."""
    streams: int
    """Decode workers where others compute the prompts."""
    prompts: int
    """Those others; 0: there are no prompts, and no reason for another shape."""

    @property
    def prefers_apart(self) -> bool | None:
        """None: one is as good as the other."""
        if not self.prompts:
            return None
        return self.together > self.most or self.streams + self.prompts <= self.together


def reshape(mine: ShapeMemory, sizes: Sizes, now: float, *, stabilisation_s: float) -> ShapeMemory:
    """Change shape once the other has been preferred for `stabilisation_s` without a break.

    At once where decode workers can't be as many as they would have to be.
    """
    prefers = sizes.prefers_apart
    if prefers is None or prefers == mine.apart:
        return mine if mine.other_since is None else ShapeMemory(mine.apart)
    since = now if mine.other_since is None else mine.other_since
    if now - since >= stabilisation_s or (prefers and sizes.together > sizes.most):
        return ShapeMemory(apart=prefers)
    return ShapeMemory(mine.apart, since)
