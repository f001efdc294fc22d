"""How many processes of a pool are kept asleep: the rung between serving and zero."""

from dataclasses import replace

from kvrelay_router.scaling.config import PoolConfig
from kvrelay_router.scaling.state import PoolMemory, PoolState


def kept_asleep(
    pool: PoolState, target: int, now: float, config: PoolConfig, mine: PoolMemory
) -> tuple[int, PoolMemory]:
    """Processes to keep besides the `target` that serve: those that served, or sleep already.

    ```
    target + kept <= ready + asleep           a scale-up wakes them first
    target + kept <= desired + kept before    no process is started, or taken back, to sleep
    ```
    The time counts from when the first one sleeps, and anew from every change of the target: that was
    demand. A worker that sleeps and dies is one less.

    Args:
        pool: as it is.
        target: of this decision, after the budget.
        now: on the clock of `mine`.
        config: of the pool.
        mine: the pool's memory, with the target of the decision before.
    """
    processes = min(pool.ready + pool.asleep, pool.desired + pool.kept)
    kept = max(0, processes - target) if config.sleep_s else 0
    since = mine.asleep_since
    if not kept:
        return 0, mine if since is None else replace(mine, asleep_since=None)
    if since is None or target != mine.target:
        return kept, replace(mine, asleep_since=now)
    return (kept if now - since < config.sleep_s else 0), mine
