"""A stack started for a benchmark: the processes of `kvrelay up`, on free ports, quiet."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

from kvrelay.cli.commands.shared import ENGINE, MODEL, POOLS, REQUESTS, TIMES, TRANSFER
from kvrelay.cli.flags import Flag, text

MODEL_FLAG = Flag(
    "--model",
    "folder, hub id, or a random-weight size: tiny, 135m, 0.5b; none for the demo model",
    text,
    group="stack",
    metavar="MODEL",
)
STACK_FLAGS = (*MODEL[1:], *ENGINE, *REQUESTS, *TRANSFER, *TIMES)
"""What `kvrelay up` takes of a stack, but for pools and addresses."""
POOL_FLAGS = POOLS


@dataclass(frozen=True, slots=True)
class Target:
    """A server to measure."""

    base_url: str
    model: str
    """The name it serves the model under."""
    max_context: int | None
    """Tokens of prompt plus answer; None where the server does not say."""
    vocabulary: int
    """Ids to draw prompts from are below this."""


@contextmanager
def own_stack(
    values: SimpleNamespace, say: Callable[[str], None] = print, **overrides: object
) -> Iterator[Target]:
    """Start what `kvrelay up` would, wait until it serves, stop it at the end.

    Args:
        values: resolved `MODEL_FLAG`, `STACK_FLAGS` and `POOL_FLAGS`; others are ignored.
        say: takes lines of progress.
        overrides: values that replace those.

    Raises:
        StartupError: everything `kvrelay up` refuses.
    """
    from kvrelay.cli.stack import defaults, describe, plan_stack
    from kvrelay_bench.models import MODELS, bench_model
    from kvrelay_infra.console import Console
    from kvrelay_infra.local import LocalStack

    names = {flag.dest for flag in (*STACK_FLAGS, *POOL_FLAGS)}
    given = {name: value for name, value in vars(values).items() if name in names}
    model = str(bench_model(values.model)) if values.model in MODELS else values.model
    settled = {**given, "model": model, "port": 0, "join_port": 0, **overrides}
    if values.model in MODELS and not settled.get("served_model_name"):
        settled["served_model_name"] = values.model
    plan = plan_stack(defaults(**settled))
    say(describe(plan))
    with LocalStack(plan.fleet, Console(relay=False)) as stack:
        config = plan.model.config
        yield Target(stack.base_url, plan.name, plan.memory.max_model_len, config.vocab_size)


def fetch_target(
    base_url: str, *, api_key: str = "", model: str | None = None, vocabulary: int
) -> Target:
    """Ask a running server what it serves.

    Raises:
        UsageError: nobody answers there, it serves nothing, or several models and none was named.
    """
    import httpx

    from kvrelay_protocol.errors import UsageError

    root = base_url.rstrip("/").removesuffix("/v1")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx.get(f"{root}/v1/models", headers=headers, timeout=10)
        response.raise_for_status()
        served = {str(card["id"]): card for card in response.json()["data"]}
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--base-url {base_url}: /v1/models gives no models: {error}") from None
    name = model or (next(iter(served)) if len(served) == 1 else None)
    if name is None or name not in served:
        listed = ", ".join(served) or "none"
        raise UsageError(
            f"--base-url {base_url} serves {listed}; name one of them with --served-model-name"
        )
    limit = served[name].get("max_model_len")
    return Target(root, name, limit if isinstance(limit, int) else None, vocabulary)


@contextmanager
def stop_on_signal() -> Iterator[asyncio.Event]:
    """Inside a running loop: the first SIGINT or SIGTERM sets the event, the next one acts as usual."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)

    def on_signal() -> None:
        stop.set()
        restore()

    for number in before:
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop
    finally:
        restore()
