"""Carries out what was decided on sleep: who falls asleep, who wakes up."""

from collections.abc import Sequence

from kvrelay_router.fleet.registry import WorkerRegistry
from kvrelay_router.fleet.slumber import Rest
from kvrelay_router.fleet.worker_link import WorkerLink


def rest(registry: WorkerRegistry, links: Sequence[WorkerLink], wanted: int, kept: int) -> bool:
    """Tell workers of one pool to sleep or to wake up, as far as they don't do so already.

    A worker that has work stays awake whatever it is told: it is told again with the next decision.

    Args:
        registry: theirs.
        links: the pool's workers that are not draining.
        wanted: how many shall serve.
        kept: how many shall sleep besides.

    Returns:
        Whether one wakes up now.
    """
    if wanted == 0:
        for link in links if kept else ():
            if link.awake and not link.attempts:
                registry.sleep(link)
        return False
    on_their_way = sum(k.slumber.rest in {Rest.AWAKE, Rest.WAKING} for k in links)
    # The first by name: a provider that lets some go keeps those.
    sleepers = sorted(
        (k for k in links if k.slumber.rest in {Rest.FALLING, Rest.ASLEEP}),
        key=lambda link: (len(link.name), link.name),
    )
    woken = sleepers[: max(0, wanted - on_their_way)]
    for link in woken:
        registry.wake(link)
    return bool(woken)
