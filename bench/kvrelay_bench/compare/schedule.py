"""Which engine runs which point when."""

from collections.abc import Iterable, Mapping, Sequence

from kvrelay_bench.compare.points import Point

Pair = tuple[Point, str]
"""A point, and the name of the engine that runs it."""


def interleave(points: Iterable[Point], engines: Sequence[str]) -> list[Pair]:
    """One round: at every point each engine once, in the same order, A B C D.

    Neighbours in time are then the engines at one point, so a slow minute of the machine meets all.
    """
    return [(point, engine) for point in points for engine in engines]


def fit(
    pairs: Sequence[Pair],
    seconds: Mapping[Pair, float],
    contenders: Iterable[Pair],
    remaining_s: float,
) -> list[Pair]:
    """What of a further round to run in the time that remains.

    Where it does not all fit, the slowest calls of engines that can't win go first; then, the
    slowest point of the others.

    Args:
        pairs: a whole round, in order.
        seconds: what each call took so far.
        contenders: calls that decide the result: ours, and those near the best.
        remaining_s: until the round must end.

    Returns:
        The pairs to run, in order; empty when the time is up.
    """
    kept = list(pairs)
    deciding = set(contenders)

    def total() -> float:
        return sum(seconds[pair] for pair in kept)

    for pair in sorted(set(pairs) - deciding, key=lambda pair: seconds[pair], reverse=True):
        if total() <= remaining_s:
            return kept
        kept.remove(pair)
    while kept and total() > remaining_s:
        slowest = max(kept, key=lambda pair: seconds[pair])[0]
        kept = [pair for pair in kept if pair[0] != slowest]
    return kept


def contenders(
    seconds: Mapping[Pair, float], *, ours: Iterable[str], within: float = 1.5
) -> set[Pair]:
    """Our calls, and at every point those of peers within a factor of the fastest peer."""
    own = set(ours)
    best: dict[Point, float] = {}
    for (point, engine), taken in seconds.items():
        if engine not in own:
            best[point] = min(taken, best.get(point, taken))
    return {
        (point, engine)
        for (point, engine), taken in seconds.items()
        if engine in own or taken <= within * best[point]
    }
