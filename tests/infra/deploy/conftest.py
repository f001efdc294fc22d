"""One router for all, and Helm where it has been fetched."""

from collections.abc import Iterator

import pytest
from helm_library import LIBRARY, Helm
from ports import free_ports
from router_process import Router, start_router, stop


@pytest.fixture(scope="session")
def router() -> Iterator[Router]:
    process, ports = start_router()
    yield ports
    stop(process)


@pytest.fixture
def unused_port() -> int:
    (port,) = free_ports(1)
    return port


@pytest.fixture(scope="session")
def helm(tmp_path_factory) -> Helm:
    if not LIBRARY.is_file():
        pytest.skip("Helm has not been fetched: make infra-test")
    return Helm(tmp_path_factory.mktemp("helm"))
