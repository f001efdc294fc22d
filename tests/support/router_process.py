"""`kvrelay router` as a process of its own, with the demo model and free ports."""

import re
import subprocess
import sys
from typing import NamedTuple


class Router(NamedTuple):
    port: int
    join_port: int


def start_router(*arguments: str) -> tuple[subprocess.Popen[str], Router]:
    """Start it, and return once it serves."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kvrelay.cli", "router", "--port=0", "--join-port=0", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    said = ""
    for line in process.stdout or ():
        said += line
        if line.startswith("curl"):
            break
    url = re.search(r"https?://127\.0\.0\.1:(\d+)", said)
    join = re.search(r"workers join at\s+127\.0\.0\.1:(\d+)", said)
    assert url, said
    assert join, said
    return process, Router(int(url[1]), int(join[1]))


def stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
