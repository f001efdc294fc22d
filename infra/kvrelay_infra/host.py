"""What this machine can give: cores, memory, GPUs and ports, read without torch.

A container sees the host's cores and memory in `/proc`, but is held to its cgroup's limits; both
hierarchies (v1 and v2) are read, from the process's own group up to the root, and the smallest
limit counts.
"""

import errno
import os
import random
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FIRST_PORT, _PORTS_TRIED = 10_000, 100
_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number close to 2**63


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: what there is, and what can be allocated now without pushing others out."""

    total: int
    available: int


@dataclass(frozen=True, slots=True)
class CgroupLimits:
    """The limits found; None where there is none."""

    version: int
    cores: float | None
    memory: int | None


def read_cores(root: Path = Path("/")) -> int:
    """Cores this process may keep busy: CPU affinity and CPU quota, at least one."""
    affinity = len(os.sched_getaffinity(0))
    quota = read_cgroup(root).cores
    return affinity if quota is None else max(1, min(affinity, int(quota)))


def read_memory(root: Path = Path("/")) -> Memory:
    """Memory of the machine or of the cgroup, whichever is less."""
    info = _key_values(root / "proc/meminfo")
    total, available = info.get("MemTotal:", 0) * 1024, info.get("MemAvailable:", 0) * 1024
    for limit_file, usage_file in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for group in _groups(root, "memory"):
            limit, usage = _number(group / limit_file), _number(group / usage_file)
            if limit is None or usage is None:
                continue
            # File pages count as used but are dropped on demand.
            stat = _key_values(group / "memory.stat")
            cache = stat.get("total_inactive_file", stat.get("inactive_file", 0))
            total = min(total, limit)
            available = min(available, max(0, limit - usage + cache))
    return Memory(total, available)


def read_cgroup(root: Path = Path("/")) -> CgroupLimits:
    """The CPU and memory limits of this process's control groups."""
    cores = [quota for group in _groups(root, "cpu") if (quota := _cpu_quota(group)) is not None]
    limits = [
        limit
        for group in _groups(root, "memory")
        for name in ("memory.max", "memory.limit_in_bytes")
        if (limit := _number(group / name)) is not None
    ]
    version = 2 if (root / "sys/fs/cgroup/cgroup.controllers").exists() else 1
    return CgroupLimits(version, min(cores, default=None), min(limits, default=None))


def count_gpus(dev: Path = Path("/dev")) -> int:
    """NVIDIA GPUs the driver shows; 0 without a driver."""
    listed = query_nvidia_smi("-L")
    if listed is not None:
        return sum(line.startswith("GPU ") for line in listed.splitlines())
    return sum(path.name[len("nvidia") :].isdigit() for path in dev.glob("nvidia*"))


def query_nvidia_smi(*arguments: str) -> str | None:
    """Output of `nvidia-smi`, or None where it is missing or fails."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments],  # noqa: S607  # found on PATH like any other tool
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def free_port(host: str, root: Path = Path("/")) -> int:
    """A port nobody listens on at the moment.

    It lies below the kernel's range for the local ends of connections, where there is room: a server that
    is started again on its port must not find somebody's connection there.
    """
    for port in random.sample(_own_ports(root), _PORTS_TRIED):
        if port_problem(host, port) is None:
            return port
    with _socket_for(host) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _own_ports(root: Path) -> range:
    try:
        text = (root / "proc/sys/net/ipv4/ip_local_port_range").read_text()
        end = max(int(text.split()[0]), _FIRST_PORT + _PORTS_TRIED)
    except (OSError, ValueError, IndexError):
        end = 32768  # Linux's default
    return range(_FIRST_PORT, end)


def port_problem(host: str, port: int) -> OSError | None:
    """Why a server could not listen on `host:port`; None when it could."""
    try:
        with _socket_for(host) as probe:
            # As servers do: sockets of closed connections don't hold the port, listeners do.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
    except OSError as error:
        return error
    return None


def is_port_taken(error: OSError) -> bool:
    return error.errno == errno.EADDRINUSE


def accepts_connections(host: str, port: int) -> bool:
    """Whether something listens there."""
    try:
        with socket.create_connection((host, port), timeout=0.5):
            return True
    except OSError:
        return False


def _socket_for(host: str) -> socket.socket:
    family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    return socket.socket(family, socket.SOCK_STREAM)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Directories of the control groups that hold this process, own group first."""
    base = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # v2 has one tree, v1 one per controller (sometimes mounted under the joint name).
        mounts = [base] if not controllers else [base / controller, base / controllers]
        for mount in dict.fromkeys(mounts):
            group = mount / path.lstrip("/")
            while group != mount and mount in group.parents:
                yield group
                group = group.parent
            yield mount


def _cpu_quota(group: Path) -> float | None:
    try:
        quota, _, period = (group / "cpu.max").read_text().partition(" ")
    except OSError:
        quota_us, period_us = (
            _number(group / name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        )
        return quota_us / period_us if quota_us and period_us else None
    return None if quota == "max" else int(quota) / int(period or 100_000)


def _number(path: Path) -> int | None:
    try:
        value = int(path.read_text())
    except (OSError, ValueError):
        return None
    return value if 0 <= value < _UNLIMITED else None


def _key_values(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split()[:2] for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
