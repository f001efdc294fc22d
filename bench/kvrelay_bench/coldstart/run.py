"""`kvrelay up --min 0`, asked again and again after it has gone back to zero, or to sleep."""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import httpx

from kvrelay_bench.machine import StolenTime, describe_machine
from kvrelay_bench.models import MODELS, bench_model
from kvrelay_bench.report import Table, summarise, write_report
from kvrelay_protocol.errors import WorkerStartFailed

_IDLE_S = 1.0
_ZERO_S = 120.0
_POLL_S = 0.1
_TOKENS = 4
_SLEEP_S = 3600.0
"""Longer than any round: who sleeps is woken, and not ended."""
_WAKE = re.compile(r"^kvrelay_queue_to_wake_seconds_(sum|count) (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Way:
    """Where the worker of a cold start comes from."""

    how: str
    preload: bool = True
    """False: every worker is a new process that imports torch itself, as in a container."""
    asleep: bool = False
    """It is there and sleeps."""


WAYS = (Way("woken from sleep", asleep=True), Way("forked"), Way("new process", preload=False))


@dataclass(frozen=True, slots=True)
class ColdStart:
    """One request that found no worker awake. Seconds from its sending, but for `queue_to_wake_s`."""

    queue_to_wake_s: float
    """From the router's having it to the call that starts a worker or wakes one, by the router's own clock."""
    phases: dict[str, float]
    """When the client first heard of each phase of the decode worker's start."""
    first_token_s: float
    stolen: float
    """Share of the processor time wanted meanwhile that the machine's host did not give."""


def run_coldstart(values: SimpleNamespace) -> int:
    """`kvrelay bench coldstart`; 0 when every start ended in an answer.

    Raises:
        KvrelayError: a model is unusable, or a stack does not start; one clear line.
    """
    found: dict[tuple[str, str], list[ColdStart]] = {}
    for model in values.models:
        for way in WAYS:
            starts = found.setdefault((model, way.how), [])
            with _stack(model, way) as url:
                # The first of them makes the worker that sleeps from then on.
                for number in range(values.rounds + 1):
                    start = measure_once(url, asleep=way.asleep and number > 0)
                    if number:
                        starts.append(start)
                    count = f"{number}/{values.rounds}" if number else "not counted"
                    line = f"{model}, {way.how}  {count:<11} {start.first_token_s:7.3f} s"
                    print(f"{line}, {start.stolen:.0%} stolen", flush=True)
    print(f"\n{table(found).text()}\n")
    rows = [
        {
            "model": model,
            "how": how,
            "first_token_s": summarise(start.first_token_s for start in starts),
            "queue_to_wake_s": summarise(start.queue_to_wake_s for start in starts),
            "stolen": summarise(start.stolen for start in starts),
            "starts": starts,
        }
        for (model, how), starts in found.items()
    ]
    path = write_report("coldstart", values, rows, describe_machine(), values.out)
    print(f"written: {path}")
    return 0


@contextmanager
def _stack(model: str, way: Way) -> Iterator[str]:
    """A stack with nothing but its router running; its address."""
    from kvrelay.cli.stack import defaults, describe, plan_stack
    from kvrelay_infra.console import Console
    from kvrelay_infra.local import LocalStack

    folder = str(bench_model(model)) if model in MODELS else None if model == "demo" else model
    sleep_s = _SLEEP_S if way.asleep else 0.0
    plan = plan_stack(
        defaults(model=folder, port=0, join_port=0, min=0, idle=_IDLE_S, sleep=sleep_s)
    )
    print(describe(plan), flush=True)
    fleet = plan.fleet if way.preload else replace(plan.fleet, preload="")
    with LocalStack(fleet, Console(relay=False)) as stack:
        yield stack.base_url


def measure_once(url: str, *, asleep: bool = False) -> ColdStart:
    """Wait for zero, ask, and note when what came.

    Args: with `asleep` a worker is there by then, and all that are sleep.

    Raises:
        WorkerStartFailed: the pools do not go to zero, or not to sleep.
    """
    from kvrelay import Client, TextDelta
    from kvrelay import ColdStart as Heard

    _until(lambda: _at_rest(httpx.get(f"{url}/health?verbose").json()["workers"], asleep=asleep))
    woken, stolen = _woken(url), StolenTime()
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
    return ColdStart(_woken(url) - woken, phases, first_token_s, stolen.share())


def _at_rest(workers: Sequence[Mapping[str, object]], *, asleep: bool) -> bool:
    """Whether nobody is there, or somebody and all of them sleep."""
    return bool(workers) == asleep and all(worker["asleep"] for worker in workers)


def _woken(url: str) -> float:
    """Seconds between requests and the starts they caused, summed over all so far."""
    return float(dict(_WAKE.findall(httpx.get(f"{url}/metrics").text))["sum"])


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _ZERO_S
    while not condition():
        if time.monotonic() > deadline:
            raise WorkerStartFailed(f"the pools were not at zero or asleep after {_ZERO_S:g} s")
        time.sleep(_POLL_S)


def table(found: dict[tuple[str, str], list[ColdStart]]) -> Table:
    """One line for each model and way to start."""
    rows = []
    for (model, how), starts in found.items():
        first = summarise(start.first_token_s for start in starts)
        wake = summarise(1e3 * start.queue_to_wake_s for start in starts)
        stolen = f"{summarise(start.stolen for start in starts).median:.0%}"
        rows.append(
            (model, how, first.median, first.p99, wake.median, wake.p99, stolen, first.count)
        )
    header = (
        "model",
        "worker",
        "first token s",
        "p99 s",
        "queue to wake ms",
        "p99 ms",
        "stolen",
        "n",
    )
    return Table(header, rows)
