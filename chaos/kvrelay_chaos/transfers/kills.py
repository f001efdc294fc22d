"""`kill -9` at random bytes of transfers over UCX: one side dies each time, the other lives on."""

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait

from kvrelay_chaos.transfers.nursery import Birth, Child, Nursery
from kvrelay_chaos.transfers.party import (
    Death,
    Ended,
    Granted,
    Held,
    Killed,
    Look,
    PeerDied,
    Ready,
    Receive,
    Release,
    Resend,
    Send,
)
from kvrelay_chaos.transfers.side import Shape
from kvrelay_protocol.errors import EngineFailed

SHAPE = Shape()
"""6 MiB of KV in messages of a megabyte, each moved in pieces of 64 KiB, so that the loop looks up often."""
URI = "ucx://?chunk_bytes=65536"
WORD_AFTER_S = 1.0
"""In half of the kills the survivor gets no word of the death before it has had this long to notice."""
_LIMIT_S = 60.0


@dataclass(slots=True)
class KillReport:
    """What became of the killed transfers."""

    transfer_bytes: int
    killed: Counter[str] = field(default_factory=Counter)
    """By the victim's side: `sender`, `receiver`."""
    bytes_at_death: list[int] = field(default_factory=list)
    """That had arrived when the signal was sent."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """Of the survivors: class of the error, or `whole` where the last byte had come."""
    alone_s: list[float] = field(default_factory=list)
    """Of survivors that noticed by themselves: from the kill until all blocks and buffers were back."""
    told_s: list[float] = field(default_factory=list)
    """Of the others: from the word of the control plane until then."""
    exact_afterwards: int = 0
    """Transfers between the survivors after each kill whose KV was right."""
    survivor_deaths: int = 0
    untyped: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    growth: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Descriptors and threads of the survivors, before and after."""
    seconds: float = 0.0

    @property
    def kills(self) -> int:
        return self.killed.total()

    @property
    def held(self) -> bool:
        """Whether every survivor lived, ended in a typed error and got everything back."""
        faults = self.survivor_deaths or self.untyped or self.leaks
        return not faults and self.exact_afterwards == self.kills

    def histogram(self, bins: int = 10) -> list[int]:
        """Deaths by share of the transfer that had arrived."""
        counts = [0] * bins
        for nbytes in self.bytes_at_death:
            counts[min(bins - 1, nbytes * bins // self.transfer_bytes)] += 1
        return counts


def kill_sides(
    count: int,
    seed: int,
    shape: Shape = SHAPE,
    *,
    on_progress: Callable[[KillReport], None] = lambda _: None,
) -> KillReport:
    """`count` transfers, sender and receiver dying in turn.

    Raises:
        EngineFailed: a process that should live died or fell silent; the report would be worthless.
    """
    rng = random.Random(seed)
    report = KillReport(shape.transfer_bytes)
    begun = time.monotonic()
    with Nursery() as nursery:
        experiment = _Experiment(nursery, shape, rng, report)
        try:
            for number in range(count):
                experiment.kill(("sender", "receiver")[number % 2])
                on_progress(report)
            experiment.look()
        except (EOFError, BrokenPipeError):
            report.survivor_deaths += 1
    report.seconds = time.monotonic() - begun
    return report


class _Experiment:
    """Two survivors and, one at a time, victims."""

    def __init__(
        self, nursery: Nursery, shape: Shape, rng: random.Random, report: KillReport
    ) -> None:
        self._nursery = nursery
        self._shape = shape
        self._rng = rng
        self._report = report
        self._sender = self._bear()
        self._receiver = self._bear()
        self._whole_transfer()  # connects, and takes what is taken once
        self._before = self._held()

    def kill(self, side: str) -> None:
        """One transfer whose `side` dies; then a whole one between the survivors."""
        victim = self._bear()
        at = self._rng.randrange(self._shape.transfer_bytes)
        if side == "sender":
            self._receiver.pipe.send(Receive(Death(victim.pid, at)))
            victim.pipe.send(Send(self._receiver.hear(Granted).lease))
            killed = self._receiver.hear(Killed)
            survivor = self._receiver
        else:
            victim.pipe.send(Receive(Death(0, at)))
            self._sender.pipe.send(Send(victim.hear(Granted).lease))
            killed = victim.hear(Killed)
            survivor = self._sender
        self._await_death(victim)
        self._note(side, killed, survivor)
        self._whole_transfer(counted=True)

    def look(self) -> None:
        """Compare what the survivors hold with what they held before the first kill."""
        for name, after in self._held().items():
            before = self._before[name]
            self._report.leaks += [f"{name}: {leak}" for leak in after.leaks]
            self._report.growth[f"{name} descriptors"] = (before.descriptors, after.descriptors)
            self._report.growth[f"{name} threads"] = (before.threads, after.threads)

    def _bear(self) -> Child:
        child = self._nursery.bear(Birth(self._shape, URI, self._rng.randrange(2**31)))
        child.hear(Ready)
        return child

    def _held(self) -> dict[str, Held]:
        found: dict[str, Held] = {}
        for name, child in (("sender", self._sender), ("receiver", self._receiver)):
            child.pipe.send(Look())
            found[name] = child.hear(Held)
        return found

    def _await_death(self, victim: Child) -> None:
        while wait([victim.pipe], _LIMIT_S):
            try:
                victim.pipe.recv()
            except (EOFError, ConnectionResetError):
                victim.pipe.close()
                return
        raise EngineFailed(f"process {victim.pid} outlived SIGKILL")

    def _tell(self, survivor: Child) -> float | None:
        """Say that the victim is dead, at once or only if it does not notice; when that was."""
        told_at_once = self._rng.random() < 0.5
        if not told_at_once and survivor.pipe.poll(WORD_AFTER_S):
            return None
        at = time.monotonic()
        survivor.pipe.send(PeerDied())
        return at

    def _note(self, side: str, killed: Killed, survivor: Child) -> None:
        report = self._report
        told_at = self._tell(survivor)
        ended: Ended = survivor.hear(Ended, timeout_s=_LIMIT_S)
        report.killed[side] += 1
        report.bytes_at_death.append(killed.bytes_seen)
        report.outcomes[ended.error or "whole"] += 1
        if told_at is None or ended.back_at < told_at:
            report.alone_s.append(max(0.0, ended.back_at - killed.at))
        else:
            report.told_s.append(ended.back_at - told_at)
        report.leaks += ended.leaks
        if not ended.typed:
            report.untyped.append(ended.error)

    def _whole_transfer(self, *, counted: bool = False) -> None:
        """From survivor to survivor, to its end."""
        self._receiver.pipe.send(Receive())
        self._sender.pipe.send(Send(self._receiver.hear(Granted).lease))
        received = self._hear_ended(self._receiver)
        self._sender.pipe.send(Release())
        sent: Ended = self._sender.hear(Ended)
        self._report.leaks += [*received.leaks, *sent.leaks]
        exact = received.digest == sent.digest != ""
        self._report.exact_afterwards += counted and exact

    def _hear_ended(self, receiver: Child) -> Ended:
        while True:
            heard = receiver.hear(Ended, Resend)
            if isinstance(heard, Ended):
                return heard
            self._sender.pipe.send(heard)
