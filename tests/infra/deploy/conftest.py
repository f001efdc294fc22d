"""One router for all, and Helm where it has been fetched."""

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from helm_library import LIBRARY, Helm


class Router(NamedTuple):
    port: int
    join_port: int


def start_router(*arguments: str) -> tuple[subprocess.Popen, Router]:
    """`kvrelay router` with the demo model on free ports, once it serves."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kvrelay.cli", "router", "--port=0", "--join-port=0", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("curl"):
            break
    url = re.search(r"https?://127\.0\.0\.1:(\d+)", said)
    join = re.search(r"workers join at\s+127\.0\.0\.1:(\d+)", said)
    assert url, said
    assert join, said
    return process, Router(int(url[1]), int(join[1]))


def stop(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


@pytest.fixture(scope="session")
def router() -> Iterator[Router]:
    process, ports = start_router()
    yield ports
    stop(process)


@pytest.fixture(scope="session")
def helm(tmp_path_factory) -> Helm:
    if not LIBRARY.is_file():
        pytest.skip("Helm has not been fetched: make infra-test")
    return Helm(tmp_path_factory.mktemp("helm"))
