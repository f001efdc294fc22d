"""Whether everything is back when nothing runs: blocks, staging buffers, transfers, files, processes."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from kvrelay_chaos.agents import AgentLost
from kvrelay_chaos.ledger import Leak
from kvrelay_chaos.stack import Stack

SETTLE_S = 30.0
"""What is still held so long after the last request is held for good; a lease ends far earlier."""
_POLL_S = 0.05
_HELD = {
    "held_blocks": "blocks",
    "held_staging": "staging buffers",
    "open_sequences": "sequences, with their transfers",
}
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - this is what is looked at


async def wait_settled(stack: Stack) -> tuple[float, list[Leak]]:
    """Wait until no worker holds anything.

    Returns:
        Seconds until then, and what was still held when the time was over.
    """
    began = time.monotonic()
    while True:
        held = [leak for worker in stack.shape.workers for leak in await _held(stack, worker)]
        waited = time.monotonic() - began
        if not held or waited > SETTLE_S:
            return waited, held
        await asyncio.sleep(_POLL_S)


async def _held(stack: Stack, worker: str) -> list[Leak]:
    while True:
        await stack.up(worker)
        try:
            counts = await stack.agents.ask(worker, "counts")
        except AgentLost:
            continue
        except RuntimeError as error:
            return [Leak(worker, f"books that do not balance ({error})", 1)]
        return [Leak(worker, what, counts[key]) for key, what in _HELD.items() if counts[key]]


class Surplus:
    """What a run leaves behind on the machine: taken before it, compared after it."""

    def __init__(self) -> None:
        self._segments = _segments()
        self._children = _children()

    def leaks(self) -> list[Leak]:
        found = [
            Leak(str(_SHARED_MEMORY), f"new file {name}", 1)
            for name in sorted(_segments() - self._segments)
        ]
        return found + [
            Leak("processes", f"orphan {pid}", 1) for pid in _new(_children(), self._children)
        ]


def _segments() -> set[str]:
    try:
        return {path.name for path in _SHARED_MEMORY.iterdir()}
    except OSError:
        return set()


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def _new(now: set[int], before: set[int]) -> Sequence[int]:
    return sorted(now - before)
