"""The router process: take the port, load the tokenizer, listen for workers, serve until told to stop."""

import asyncio
import contextlib
import gc
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry

from kvrelay_protocol.errors import KvrelayError
from kvrelay_protocol.telemetry import Telemetry
from kvrelay_router.config import RouterConfig
from kvrelay_router.fleet.servicer import join_credentials
from kvrelay_router.http.app import create_app
from kvrelay_router.http.server import EdgeServer, check_tls, create_server, listen
from kvrelay_router.requests.core import RouterCore
from kvrelay_router.scaling.loop import Scaling
from kvrelay_router.text.served_model import ServedModel, load_served_model

_YOUNG_OBJECTS = 20_000
"""New objects between collections: what a request leaves behind has few cycles."""
_OPEN_JOIN = (
    "kvrelay router: anyone who reaches {}:{} may join as a worker and read prompts; "
    "set --join-token, or --join-tls-ca for certificates"
)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """The first signal asks for a drain, the second for an end."""

    def __init__(self) -> None:
        self.drain = asyncio.Event()
        self.now = asyncio.Event()

    def __call__(self) -> None:
        (self.now if self.drain.is_set() else self.drain).set()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Listen to SIGINT and SIGTERM inside the block."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)


def run(config: RouterConfig, scaling: Scaling | None = None) -> int:
    """Run the router until a signal ends it; returns the process's exit code.

    Args: with `scaling` it says how many workers there are.
    """
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(serve(config, scaling=scaling))
    except KvrelayError as error:
        print(f"kvrelay router: {error}", file=sys.stderr)
        return error.exit_code
    return 0


async def serve(
    config: RouterConfig, stop: StopSignals | None = None, *, scaling: Scaling | None = None
) -> None:
    """Run the router on this loop.

    Raises:
        PortInUse: before anything else started.
        StartupError: TLS files or the model folder can't be used.
    """
    began = time.monotonic()
    stop = stop or StopSignals()
    check_tls(config.tls_cert, config.tls_key)
    join_credentials(config)
    if anyone_may_join(config):
        print(_OPEN_JOIN.format(config.join_host, config.join_port), file=sys.stderr, flush=True)
    with contextlib.closing(listen(config.host, config.port)) as listener, stop.installed():
        with _phase("tokenizer"):
            model = load_served_model(config.model_dir, config.model_name)
        registry = CollectorRegistry()
        telemetry = Telemetry("kvrelay-router", instance=f"{socket.gethostname()}:{os.getpid()}")
        core = RouterCore(config, telemetry, metrics_registry=registry, scaling=scaling)
        try:
            with _phase("listen for workers"):
                await core.start()
            server = create_server(create_app(core.service, model, config, registry), config)
            settle_memory()
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            say = _silent if config.supervised else _say
            if not config.supervised:
                _announce(config, model, listener, core.join_port, time.monotonic() - began)
            await _until(stop.drain, serving)
            say(f"draining for up to {config.drain_grace_s:g} s; interrupt again to stop at once")
            await _drain(core, stop)
            await _end(server, serving, core)
            say("stopped")
        finally:
            await core.stop()
            await asyncio.to_thread(telemetry.shutdown)


def anyone_may_join(config: RouterConfig) -> bool:
    """Other machines reach the port that workers dial, and nothing is asked of them."""
    return not (config.join_token or config.join_tls_ca or _is_loopback(config.join_host))


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def settle_memory() -> None:
    """Keep the collector from walking, in the middle of a step, over what start-up made for good."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _until(event: asyncio.Event, serving: asyncio.Task[None]) -> None:
    """Wait for the event; a server that ends by itself raises its reason."""
    waiter = asyncio.create_task(event.wait())
    await asyncio.wait({waiter, serving}, return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    if serving.done():
        serving.result()


async def _drain(core: RouterCore, stop: StopSignals) -> None:
    draining = asyncio.create_task(core.drain())
    at_once = asyncio.create_task(stop.now.wait())
    await asyncio.wait({draining, at_once}, return_when=asyncio.FIRST_COMPLETED)
    for task in (draining, at_once):
        task.cancel()
    await asyncio.gather(draining, at_once, return_exceptions=True)


async def _end(server: EdgeServer, serving: asyncio.Task[None], core: RouterCore) -> None:
    # Requests still open end in a typed error first, so their clients see one before the close.
    await core.stop()
    server.should_exit = True
    await serving


def _say(line: str) -> None:
    print(line, flush=True)


def _silent(_line: str) -> None:
    """For a router whose supervisor does the talking."""


@contextlib.contextmanager
def _phase(name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"{name:<18} {time.monotonic() - began:6.2f} s", flush=True)


def _announce(
    config: RouterConfig,
    model: ServedModel,
    listener: socket.socket,
    join_port: int,
    seconds: float,
) -> None:
    scheme = "https" if config.tls_cert else "http"
    port = listener.getsockname()[1]
    host = "127.0.0.1" if config.host in {"0.0.0.0", "::", ""} else config.host  # noqa: S104
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    body = json.dumps({
        "model": model.name,
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
    })  # fmt: skip
    key = "-H 'Authorization: Bearer <key>' " if config.api_keys else ""
    print(f"{'router':<18} {seconds:6.2f} s  {url}")
    print(f"{'model':<18} {model.name}, max context {model.max_model_len} tokens")
    print(f"{'workers join at':<18} {config.join_host}:{join_port}")
    insecure = "-k " if config.tls_cert else ""
    print(f"curl {insecure}-N {url}/v1/chat/completions {key}\\")
    print(f"  -H 'content-type: application/json' -d '{body}'", flush=True)
