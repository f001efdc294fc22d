import pytest
from s3_store import model_cache, running_store


@pytest.fixture(scope="session")
def session_store():
    with running_store() as store:
        yield store


@pytest.fixture
def store(session_store, monkeypatch, tmp_path):
    """The server, with this process's environment pointing there and a cache of its own."""
    for name, value in session_store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", model_cache(tmp_path / "cache"))
    return session_store
