"""Carries out what was decided on sleep: who falls asleep, who wakes up."""

from collections.abc import Sequence

from kvrelay_router.fleet.registry import WorkerRegistry
from kvrelay_router.fleet.slumber import Rest
from kvrelay_router.fleet.worker_link import WorkerLink


def rest(registry: WorkerRegistry, links: Sequence[WorkerLink], wanted: int, kept: int) -> bool:
    """Have the first `wanted` workers of a pool by name serve, and the `kept` ones behind them sleep.

    By name, since a provider that is told to run fewer ends the last. Whoever is neither is its to end.
    Idempotent: with the next decision a worker is told again that had work.

    Args:
        registry: theirs.
        links: the pool's workers that are not draining.
        wanted: how many shall serve.
        kept: how many shall sleep besides.

    Returns:
        Whether one that slept wakes up now.
    """
    ordered = sorted(links, key=lambda link: (len(link.name), link.name))
    woken = False
    for link in ordered[:wanted]:
        woken = woken or link.slumber.rest in {Rest.FALLING, Rest.ASLEEP}
        registry.wake(link)
    for link in ordered[wanted : wanted + kept]:
        registry.sleep(link)
    return woken
