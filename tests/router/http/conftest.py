import asyncio
import contextlib
import threading
import time

import httpx
import openai
import pytest
from prometheus_client import CollectorRegistry, Counter
from scripted_service import ScriptedService, write_model_folder

from kvrelay_router.config import RouterConfig
from kvrelay_router.http.answer import Patience
from kvrelay_router.http.app import create_app
from kvrelay_router.http.server import create_server, listen
from kvrelay_router.text.served_model import load_served_model

KEY = "sk-test"
MAX_BODY = 64 * 1024


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return load_served_model(write_model_folder(tmp_path_factory.mktemp("model")), "org/tiny")


@pytest.fixture(scope="session")
def one_service():
    return ScriptedService()


@pytest.fixture
def service(one_service):
    """Fresh for each test, though servers that know it live on."""
    one_service.__init__()
    return one_service


@pytest.fixture(scope="session")
def make_app(model, one_service):
    def make(*, patience=None, **settings):
        registry = CollectorRegistry()
        Counter("kvrelay_test", "one metric", registry=registry).inc()
        settings.setdefault("max_body_bytes", MAX_BODY)
        config = RouterConfig(model_dir=".", model_name=model.name, port=0, **settings)
        return create_app(one_service, model, config, registry, patience)

    return make


@pytest.fixture
async def client(make_app, service):
    """In process, no sockets."""
    transport = httpx.ASGITransport(make_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
        yield client


class LiveServer:
    """The edge on a real socket, on a loop of its own thread."""

    def __init__(self, app, **settings):
        config = RouterConfig(model_dir=".", model_name="x", port=0, **settings)
        self._listener = listen("127.0.0.1", 0)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = create_server(app, config)
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._server.serve(sockets=[self._listener])),
        )

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture
def serve(make_app, service):
    """Starts the edge with given settings."""
    with contextlib.ExitStack() as stack:

        def start(**settings):
            return stack.enter_context(LiveServer(make_app(**settings)))

        yield start


@pytest.fixture(scope="session")
def live(make_app):
    """One server for many tests; starting one takes a while."""
    with LiveServer(make_app(api_keys=("other", KEY))) as server:
        yield server


@pytest.fixture
def sdk(live, service):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def quick():
    """Patience short enough for tests."""
    return Patience(head_s=0.1, sdk_head_s=0.1, ping_s=0.1, send_s=0.5)


@pytest.fixture
def until():
    """Waits for a condition of another thread."""

    def wait(condition, timeout=60.0):
        give_up = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < give_up, "timed out"
            time.sleep(0.005)

    return wait
