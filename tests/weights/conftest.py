import os

import pytest
from s3_store import model_cache, running_store

from kvrelay_protocol.weights import pin, s3


@pytest.fixture(scope="session")
def session_store():
    with running_store() as store:
        yield store


@pytest.fixture(scope="session")
def clients():
    """One per endpoint and key: making one reads megabytes of API descriptions."""
    made = {}
    yield made
    for client in made.values():
        client.close()


@pytest.fixture
def store(session_store, clients, monkeypatch, tmp_path):
    """The server, with this process's environment pointing there and a cache of its own."""

    def connect(connections):
        place = os.environ["AWS_ENDPOINT_URL"], os.environ.get("AWS_ACCESS_KEY_ID")
        if place not in clients:
            clients[place] = s3.connect(connections)
        return clients[place]

    monkeypatch.setattr(pin, "connect", connect)
    for name, value in session_store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", model_cache(tmp_path / "cache"))
    return session_store
