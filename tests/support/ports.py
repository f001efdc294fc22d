"""Ports that stay free until they are used."""

import contextlib
import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST = 10_000


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Different ports that nobody listens on, outside the range of outgoing connections.

    A port that the kernel picks may be the local end of somebody's connection before a server has
    bound it.
    """
    first_of_kernel = int(_RANGE.read_text().split()[0])
    candidates = random.sample(range(_FIRST, first_of_kernel), min(1000, first_of_kernel - _FIRST))
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        for port in candidates:
            if len(ports) == count:
                return ports
            probe = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind((host, port))
                ports.append(port)
    raise AssertionError(f"no {count} free ports below {first_of_kernel}")
