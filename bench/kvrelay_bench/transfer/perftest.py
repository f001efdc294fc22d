"""UCX's own benchmark, `ucx_perftest`, where the UCX package brings it: the yardstick of that path."""

import importlib.util
import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from kvrelay_infra.host import free_port

_BYTES = 256 * 1024 * 1024
_START_S = 5.0
_LIMIT_S = 60.0
_HOST = "127.0.0.1"
_MIB = 1024 * 1024
_RESULT = re.compile(r"^\s*(?:\[\S+\]\s*)?\d+(?:\s+[\d.]+){7}\s*$", re.MULTILINE)
"""The line of numbers: iterations, three overheads, average and overall MiB/s, two message rates."""


def find_perftest() -> Path | None:
    """The binary inside the wheel `libucx`, or None."""
    spec = importlib.util.find_spec("libucx")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    paths = [Path(folder) / "bin" / "ucx_perftest" for folder in folders]
    return next((path for path in paths if os.access(path, os.X_OK)), None)


def run_perftest(binary: Path, sizes: Sequence[int], config: dict[str, str]) -> dict[int, float]:
    """Tag-matching bandwidth, one way, by size in bytes, in 10^9 bytes a second.

    Args:
        binary: see `find_perftest`.
        sizes: of the messages; it keeps its default of 32 under way.
        config: UCX settings as `ucx_config` gives them; peer error handling is on, as in ours.

    Returns:
        The sizes it gave a result for.
    """
    libraries = str(binary.parent.parent / "lib")
    environ = {**os.environ, **{f"UCX_{name}": value for name, value in config.items()},
               "LD_LIBRARY_PATH": libraries, "UCX_WARN_UNUSED_ENV_VARS": "n"}  # fmt: skip
    rates: dict[int, float] = {}
    for size in sizes:
        rate = _one(binary, size, environ)
        if rate is not None:
            rates[size] = rate
    return rates


def _one(binary: Path, size: int, environ: dict[str, str]) -> float | None:
    port = str(free_port(_HOST))
    server = subprocess.Popen(
        [str(binary), "-e", "-p", port],
        env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        if not _listens(server, int(port)):
            return None
        count = max(8, min(2000, _BYTES // size))
        client = subprocess.run(
            [str(binary), _HOST, "-e", "-p", port, "-t", "tag_bw", "-s", str(size),
             "-n", str(count), "-w", "2", "-f"],
            env=environ, check=False, capture_output=True, text=True, timeout=_LIMIT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None
    finally:
        server.kill()
        server.wait()
    return parse_result(client.stdout)


def parse_result(text: str) -> float | None:
    """10^9 bytes a second from what the client printed; None where it printed no numbers."""
    found = _RESULT.findall(text)
    if not found:
        return None
    return float(found[-1].split()[-4]) * _MIB / 1e9


def _listens(server: "subprocess.Popen[bytes]", port: int) -> bool:
    """Without connecting: the server serves the first connection and no other."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and server.poll() is None:
        if _is_listening(port):
            return True
        time.sleep(0.02)
    return False


def _is_listening(port: int) -> bool:
    """From the kernel's table of sockets; state 0A is LISTEN (proc(5))."""
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, _, state = line.split()[:4]
            if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                return True
    return False
