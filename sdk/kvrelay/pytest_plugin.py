"""The pytest fixture `kvrelay_server`; name this module in `pytest_plugins` to have it."""

from collections.abc import Iterator

import pytest

from kvrelay.testing import FakeServer


@pytest.fixture
def kvrelay_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """A fake server that `Client()` finds without arguments."""
    with FakeServer() as server:
        monkeypatch.setenv("KVRELAY_BASE_URL", server.base_url)
        monkeypatch.delenv("KVRELAY_API_KEY", raising=False)
        yield server
