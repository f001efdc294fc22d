"""From what client and mock workers saw to the numbers of the report.

Every stamp is of the one monotonic clock of the machine. For a request that leaves the client at
`sent`, reaches the worker that computes its prompt at `submitted`, whose first token that worker hands
to gRPC at `answered`, and whose first event the client has at `arrived`:

    added latency = (submitted - sent) + (arrived - answered)

What the mock worker waits lies between the two brackets and is in neither; its and the client's own
work on a message (deserialising, a turn of their loops) is in them, so that the figure is an upper
bound of the router's share. The row `floor` is the same figure with the router's libraries alone in
its place (`floor.py`), in the same run.
"""

from dataclasses import dataclass
from typing import Any

from kvrelay_bench.report import Summary, summarise
from kvrelay_bench.router.stack import Seen
from kvrelay_bench.router.workload import Workload


@dataclass(frozen=True, slots=True)
class Measurement:
    """One workload's result. Times in the unit of their name; CPU is the router process's, all threads."""

    name: str
    requests: int
    errors: int
    first_error: str
    lost_tokens: int
    """Tokens that did not come, or not as they should, over all requests."""
    tokens_per_event: float
    """1 where every token had a server-sent event of its own."""
    seconds: float
    requests_per_s: float
    tokens_per_s: float
    router_cpu_s: float
    """Inside the window that the rates are of."""
    cpu_us_per_request: float
    """All the router did, tokens included, over the requests of the window; NaN of a stream's window."""
    cpu_us_per_token: float
    tokens_per_cpu_s: float
    tokens_per_read: float
    """Tokens in one read of the client: 1 where each had a write of its own."""
    added_ms: Summary | None
    to_worker_ms: Summary | None
    to_client_ms: Summary | None
    relay_ms: Summary | None
    """Later tokens: from the worker's step to the client's event."""
    late_ms: Summary
    """How late the client itself sent."""
    client_cpu_share: float
    """Of the window: near 1 the client was the limit."""


def evaluate(workload: Workload, seen: Seen) -> Measurement:
    """The numbers of one workload."""
    measured = seen.client["exchanges"][workload.warmup :]
    good = [exchange for exchange in measured if not exchange["error"]]
    failed = [exchange["error"] for exchange in measured if exchange["error"]]
    times = _Times(seen.workers)
    begin, end = _window(workload, seen.client["marks"])
    seconds = (end[0] - begin[0]) / 1e9
    cpu, own = end[1] - begin[1], end[2] - begin[2]
    arrivals = [exchange["arrived"] for exchange in seen.client["exchanges"]]
    tokens = sum(begin[0] <= at < end[0] for arrived in arrivals for at in arrived)
    reads = sum(len({at for at in arrived if begin[0] <= at < end[0]}) for arrived in arrivals)
    legs = [_legs(exchange, times) for exchange in good if exchange["arrived"]]
    open_loop = workload.rate > 0
    return Measurement(
        name=workload.name,
        requests=len(measured),
        errors=len(failed),
        first_error=failed[0] if failed else "",
        lost_tokens=sum(workload.tokens - len(exchange["arrived"]) for exchange in measured),
        tokens_per_event=_ratio(
            sum(len(exchange["arrived"]) for exchange in good),
            sum(exchange["events"] for exchange in good),
        ),
        seconds=seconds,
        requests_per_s=len(measured) / seconds,
        tokens_per_s=tokens / seconds,
        router_cpu_s=cpu,
        cpu_us_per_request=cpu / len(measured) * 1e6 if open_loop else float("nan"),
        cpu_us_per_token=_ratio(cpu, tokens) * 1e6,
        tokens_per_cpu_s=_ratio(tokens, cpu),
        tokens_per_read=_ratio(tokens, reads),
        added_ms=_summary([to + back for to, back in legs]) if open_loop else None,
        to_worker_ms=_summary([to for to, _ in legs]) if open_loop else None,
        to_client_ms=_summary([back for _, back in legs]) if open_loop else None,
        relay_ms=_summary([gap for exchange in good for gap in times.relays(exchange)])
        if workload.step_s
        else None,
        late_ms=summarise((exchange["sent"] - exchange["due"]) / 1e6 for exchange in measured),
        client_cpu_share=own / seconds,
    )


def _window(workload: Workload, marks: dict[str, list[float]]) -> tuple[list[float], list[float]]:
    """Open loop: from the first measured request to the end. Else: while all streams run at once."""
    streaming, first_end = marks.get("streaming"), marks.get("first end")
    if workload.rate == 0 and streaming and first_end and streaming[0] < first_end[0]:
        return streaming, first_end
    return marks["begin"], marks["end"]


class _Times:
    """The mock workers' stamps."""

    def __init__(self, workers: dict[str, Any]) -> None:
        self.submitted = dict(workers["submitted"])
        self._answered = dict(workers["answered"])
        self._steps: list[int] = workers["steps"]
        self._joined = dict(workers["joined"])

    def answered(self, request: int) -> int:
        """When the first token left its worker."""
        at: int = self._answered.get(request) or self._steps[self._joined[request][0]]
        return at

    def relays(self, exchange: dict[str, Any]) -> list[float]:
        """Milliseconds each token of the decode worker but the first event's took."""
        first_step, first_index = self._joined.get(exchange["request"], (0, 0))
        later = enumerate(exchange["arrived"][max(first_index, 1) :], max(first_index, 1))
        return [(at - self._steps[first_step + i - first_index]) / 1e6 for i, at in later]


def _legs(exchange: dict[str, Any], times: _Times) -> tuple[float, float]:
    """Milliseconds from client to worker, and from worker to client."""
    request = exchange["request"]
    to_worker = times.submitted[request] - exchange["sent"]
    to_client = exchange["arrived"][0] - times.answered(request)
    return to_worker / 1e6, to_client / 1e6


def _ratio(amount: float, of: float) -> float:
    return amount / of if of else float("nan")


def _summary(values: list[float]) -> Summary | None:
    return summarise(values) if values else None
