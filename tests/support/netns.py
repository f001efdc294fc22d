"""A network namespace on this machine, and cables to it that can be slowed and cut.

    with namespace() as far, far.cable() as cable:
        subprocess.run([*far.enter, "ip", "addr"])   # a process there
        cable.slow(200)                              # kbit/s from there to here
        cable.cut()
        cable.mend()

A test that asks for one is skipped where the kernel or the user does not allow it.
"""

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

_BURST = "128kb"  # more than the largest segment: TCP hands 64 KiB to a device at once


def _ip(*arguments: str, namespace: str = "") -> None:
    _run("ip", *(("-n", namespace) if namespace else ()), *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


@dataclass(frozen=True, slots=True)
class Cable:
    """A pair of devices: one here, one in the namespace, each with an address."""

    namespace: str
    here: str
    there: str
    address_here: str
    address_there: str

    def cut(self) -> None:
        """Nothing passes any more, and the far side knows: its route is gone."""
        _ip("link", "set", self.there, "down", namespace=self.namespace)

    def mend(self) -> None:
        _ip("link", "set", self.there, "up", namespace=self.namespace)

    def slow(self, kbit_s: int) -> None:
        """What leaves the namespace passes at this rate, after a first burst of 128 kB."""
        limit = ("rate", f"{kbit_s}kbit", "burst", _BURST, "limit", "1mb")
        _run("tc", "-n", self.namespace, *self._queue("replace"), "tbf", *limit)

    def full_speed(self) -> None:
        _run("tc", "-n", self.namespace, *self._queue("del"))

    def received(self) -> int:
        """Bytes that have come here so far."""
        statistics = Path("/sys/class/net") / self.here / "statistics"
        return int((statistics / "rx_bytes").read_text())

    def _queue(self, what: str) -> tuple[str, ...]:
        return ("qdisc", what, "dev", self.there, "root")


@dataclass(slots=True)
class Namespace:
    """One more network stack of this machine."""

    name: str
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def enter(self) -> tuple[str, ...]:
        """In front of a command, runs it there."""
        return ("ip", "netns", "exec", self.name)

    def cable(self) -> Cable:
        """Lay one more; it goes with the namespace."""
        number = next(self._numbers)
        # 198.18.0.0/15 is set aside for tests of network devices (RFC 2544).
        base = 198 << 24 | 18 << 16 | (os.getpid() * 4 + number) % 2**15 << 2
        addresses = [".".join(map(str, (base + i).to_bytes(4, "big"))) for i in (1, 2)]
        here, there = f"{self.name}h{number}", f"{self.name}t{number}"
        _ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", self.name)
        for device, address, where in ((here, addresses[0], ""), (there, addresses[1], self.name)):
            _ip("addr", "add", f"{address}/30", "dev", device, namespace=where)
            _ip("link", "set", device, "up", namespace=where)
        return Cable(self.name, here, there, *addresses)


@contextlib.contextmanager
def namespace() -> Iterator[Namespace]:
    """Make one; removed with its cables at the end."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            pytest.skip(f"network namespaces need {tool} (iproute2)")
    made = Namespace(f"kvr{os.getpid()}")
    try:
        _ip("netns", "add", made.name)
    except OSError as error:
        pytest.skip(f"no network namespaces here: {error}")
    try:
        _ip("link", "set", "lo", "up", namespace=made.name)
        yield made
    finally:
        _ip("netns", "del", made.name)
