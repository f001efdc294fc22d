"""`kvrelay up --min 0`, asked again and again after it has gone back to zero."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import httpx

from kvrelay_bench.machine import describe_machine
from kvrelay_bench.models import MODELS, bench_model
from kvrelay_bench.report import Table, summarise, write_report
from kvrelay_protocol.errors import WorkerStartFailed

_IDLE_S = 1.0
_ZERO_S = 120.0
_POLL_S = 0.1
_TOKENS = 4
_WAKE = re.compile(r"^kvrelay_queue_to_wake_seconds_(sum|count) (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ColdStart:
    """One request that found no worker. Seconds from its sending, but for `queue_to_wake_s`."""

    queue_to_wake_s: float
    """From the router's having it to the call that starts a worker, by the router's own clock."""
    phases: dict[str, float]
    """When the client first heard of each phase of the decode worker's start."""
    first_token_s: float


def run_coldstart(values: SimpleNamespace) -> int:
    """`kvrelay bench coldstart`; 0 when every start ended in an answer.

    Raises:
        KvrelayError: a model is unusable, or a stack does not start; one clear line.
    """
    found: dict[tuple[str, str], list[ColdStart]] = {}
    for model in values.models:
        for how, preload in (("forked", True), ("new process", False)):
            starts = found.setdefault((model, how), [])
            with _stack(model, preload=preload) as url:
                for number in range(values.rounds + 1):
                    start = measure_once(url)
                    if number:
                        starts.append(start)
                    count = f"{number}/{values.rounds}" if number else "not counted"
                    print(f"{model}, {how}  {count:<11} {start.first_token_s:6.2f} s", flush=True)
    print(f"\n{table(found).text()}\n")
    rows = [
        {
            "model": model,
            "how": how,
            "first_token_s": summarise(start.first_token_s for start in starts),
            "queue_to_wake_s": summarise(start.queue_to_wake_s for start in starts),
            "starts": starts,
        }
        for (model, how), starts in found.items()
    ]
    path = write_report("coldstart", values, rows, describe_machine(), values.out)
    print(f"written: {path}")
    return 0


@contextmanager
def _stack(model: str, *, preload: bool) -> Iterator[str]:
    """A stack with nothing but its router running; its address.

    Args: without `preload` every worker is a new process that imports torch itself, as in a container.
    """
    from kvrelay.cli.stack import defaults, describe, plan_stack
    from kvrelay_infra.console import Console
    from kvrelay_infra.local import LocalStack

    folder = str(bench_model(model)) if model in MODELS else None if model == "demo" else model
    plan = plan_stack(defaults(model=folder, port=0, join_port=0, min=0, idle=_IDLE_S))
    print(describe(plan), flush=True)
    fleet = plan.fleet if preload else replace(plan.fleet, preload="")
    with LocalStack(fleet, Console(relay=False)) as stack:
        yield stack.base_url


def measure_once(url: str) -> ColdStart:
    """Wait for zero, ask, and note when what came.

    Raises:
        WorkerStartFailed: the pools do not go to zero.
    """
    from kvrelay import Client, TextDelta
    from kvrelay import ColdStart as Heard

    _until(lambda: not httpx.get(f"{url}/health?verbose").json()["workers"])
    woken = _woken(url)
    phases: dict[str, float] = {}
    first_token_s = None
    with Client(base_url=url) as client:
        client.models()  # a connection, and the model's name
        sent = time.monotonic()
        with client.stream("What is len?", max_tokens=_TOKENS, temperature=0) as stream:
            for event in stream:
                now = time.monotonic() - sent
                if isinstance(event, Heard) and event.pool == "decode":
                    phases.setdefault(event.phase, round(now, 4))
                if isinstance(event, TextDelta) and first_token_s is None:
                    first_token_s = now
    if first_token_s is None:
        raise WorkerStartFailed("the answer of a cold start was empty")
    return ColdStart(_woken(url) - woken, phases, first_token_s)


def _woken(url: str) -> float:
    """Seconds between requests and the starts they caused, summed over all so far."""
    return float(dict(_WAKE.findall(httpx.get(f"{url}/metrics").text))["sum"])


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _ZERO_S
    while not condition():
        if time.monotonic() > deadline:
            raise WorkerStartFailed(f"the pools were not at zero after {_ZERO_S:g} s")
        time.sleep(_POLL_S)


def table(found: dict[tuple[str, str], list[ColdStart]]) -> Table:
    """One line for each model and way to start."""
    rows = []
    for (model, how), starts in found.items():
        first = summarise(start.first_token_s for start in starts)
        wake = summarise(1e3 * start.queue_to_wake_s for start in starts)
        rows.append((model, how, first.median, first.p99, wake.median, wake.p99, first.count))
    header = ("model", "worker", "first token s", "p99 s", "queue to wake ms", "p99 ms", "n")
    return Table(header, rows)
