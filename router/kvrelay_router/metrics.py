"""The router's Prometheus metrics; names mirror vLLM's, with our prefix.

`prometheus_client` adds `_total` to counters. What workers count (cache hits, preemptions, corrupt
frames) arrives as running totals in their load reports and is added up here, so that the sums outlive
a worker.
"""

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_router.fleet.slumber import Rest
from kvrelay_router.fleet.worker_link import WorkerLink
from kvrelay_router.requests.types import FinishReason, Path, PathKind, RequestStats

_LATENCY_S = (
    0.01,
    0.02,
    0.04,
    0.08,
    0.16,
    0.32,
    0.64,
    1.28,
    2.56,
    5.12,
    10.24,
    20.48,
    40.96,
    81.92,
)
_STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
MAX_REMEMBERED_WORKERS = 1024
_TRANSFER_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Histogram(Collector):
    """`prometheus_client.Histogram` for a single thread: no lock and no loop over the buckets.

    One is fed for every token; the library's own costs as much there as passing the token on.
    """

    def __init__(
        self, name: str, text: str, buckets: Sequence[float], registry: CollectorRegistry
    ) -> None:
        """Args: `buckets` are upper bounds, ascending, without infinity."""
        self._name, self._text = name, text
        self._bounds = tuple(buckets)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Iterable[Metric]:
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(names, map(float, accumulate(self._counts)), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


class RouterMetrics:
    """Every metric of one router. The registry is injected so that tests and processes can own theirs."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"kvrelay_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"kvrelay_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _LATENCY_S) -> Histogram:
            return Histogram(f"kvrelay_{name}", text, buckets, registry)

        self.running = gauge("num_requests_running", "Requests placed on workers.")
        self.waiting = gauge("num_requests_waiting", "Requests waiting in the router for a place.")
        self.success = counter("request_success", "Finished requests.", ("finished_reason",))
        self.failure = counter("request_failure", "Failed requests by error code.", ("code",))
        self.rejections = counter("admission_rejections", "Requests never admitted.", ("code",))
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of placed requests.")
        self.generation_tokens = counter("generation_tokens", "Output tokens sent to clients.")
        self.time_to_first_token = histogram(
            "time_to_first_token_seconds",
            "Admission to the first output token.",
        )
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds",
            "Time between output tokens of one request.",
            _STEP_S,
        )
        self.e2e_latency = histogram(
            "e2e_request_latency_seconds", "Admission to the terminal event."
        )
        self.queue_time = histogram(
            "request_queue_time_seconds", "Admission to the first placement."
        )
        self.queue_to_wake = histogram(
            "queue_to_wake_seconds",
            "First request that found its pool at zero, to the call that starts a worker.",
        )
        self.workers_wanted = gauge("workers_wanted", "Workers that were asked for.", ("pool",))
        self.scalings = counter(
            "scalings", "New numbers of workers, by the reason.", ("pool", "reason")
        )
        self.scaling_failures = counter(
            "scaling_failures", "Times the provider did not take a number.", ("pool",)
        )
        self.prefill_time = histogram("request_prefill_time_seconds", "Computing the prompt.")
        self.decode_time = histogram("request_decode_time_seconds", "First to last output token.")
        self.kv_bytes = counter(
            "kv_transfer_bytes",
            "KV bytes received by decode workers, by what carried them.",
            ("transport",),
        )
        self.kv_time = histogram(
            "kv_transfer_seconds",
            "Sending the KV of a prompt, summed over its messages.",
            _TRANSFER_S,
        )
        self.path = counter("path", "Attempts by path and why it was taken.", ("path", "reason"))
        self.replays = counter("replays", "Attempts that followed a lost one.", ("reason",))
        self.replay_gap = histogram(
            "replay_gap_seconds",
            "From a worker's loss to the next token of a stream that had begun.",
        )
        self.loss_to_error = histogram(
            "loss_to_error_seconds",
            "From a worker's loss to the typed error of a request that nobody took over.",
        )
        self.unknown_sequences = counter(
            "sequences_unknown", "Attempts whose worker did not have them any more."
        )
        self.out_of_step = counter(
            "attempts_out_of_step", "Attempts given up because their worker's tokens did not fit."
        )
        self._join_faults = counter(
            "join_faults",
            "Faults of Join streams: messages repeated or missing (up: of workers), routers silent.",
            ("direction", "kind"),
        )
        self.workers = gauge("workers", "Joined workers.", ("role", "state"))
        self.kv_cache_usage = gauge(
            "kv_cache_usage_perc",
            "Share of a worker's KV blocks that hold live sequences (0 to 1).",
            ("worker",),
        )
        self.open_transfers = gauge("kv_open_transfers", "Transfers under way.", ("worker",))
        self.bandwidth = gauge(
            "kv_transport_bytes_per_second",
            "Rate of a worker's latest KV transfer, while sending.",
            ("worker",),
        )
        self._from_workers = {
            "prefix_cache_queries": counter(
                "prefix_cache_queries",
                "Prompt tokens looked up in prefix caches.",
            ),
            "prefix_cache_hits": counter("prefix_cache_hits", "Prompt tokens found there."),
            "preemptions": counter("num_preemptions", "Sequences preempted for want of blocks."),
            "corrupt_frames": counter("kv_corrupt_frames", "KV frames that failed their digest."),
            "foreign_frames": counter(
                "kv_foreign_frames",
                "Whole KV frames of another lease, tenant, model or prompt.",
            ),
            "expired_leases": counter("kv_expired_leases", "KV leases that expired unused."),
            "let_go": counter("sequences_let_go", "Sequences that their router had no more."),
            "repeated_messages": self._join_faults.labels("down", "repeated"),
            "missing_messages": self._join_faults.labels("down", "missing"),
            "silent_routers": self._join_faults.labels("down", "silent"),
        }
        self._totals: dict[tuple[str, int], dict[str, int]] = {}
        # The library's look-up by label costs more than the count; every request needs two of them.
        self._ends = {reason: self.success.labels(reason.value) for reason in FinishReason}
        self._paths: dict[tuple[PathKind, str], Counter] = {}

    def wanted(self, pool: str, replicas: int, reason: str) -> None:
        """The provider took a new number of workers."""
        self.workers_wanted.labels(pool).set(replicas)
        self.scalings.labels(pool, reason).inc()

    def placed(self, path: Path, *, replay_cause: str | None) -> None:
        key = (path.kind, path.reason)
        if key not in self._paths:
            self._paths[key] = self.path.labels(path.kind.value, path.reason)
        self._paths[key].inc()
        if replay_cause is not None:
            self.replays.labels(replay_cause).inc()

    def kv_received(self, size: int, seconds: float, transport: str) -> None:
        self.kv_bytes.labels(transport).inc(size)
        self.kv_time.observe(seconds)

    def finished(self, reason: FinishReason, stats: RequestStats) -> None:
        self._ends[reason].inc()
        self.prefill_time.observe(stats.prefill_s)
        self.decode_time.observe(stats.decode_s)

    def failed(self, code: str) -> None:
        self.failure.labels(code).inc()

    def join_fault(self, direction: str, kind: str) -> None:
        self._join_faults.labels(direction, kind).inc()

    def worker_loads(self, link: WorkerLink) -> None:
        """Add what a worker counted since its last report."""
        load: pb.Load = link.load
        if load.total_blocks:
            used = load.used_blocks + load.leased_blocks
            self.kv_cache_usage.labels(link.name).set(used / load.total_blocks)
            self.open_transfers.labels(link.name).set(load.open_transfers)
            self.bandwidth.labels(link.name).set(load.transport_bandwidth)
        # Kept past the end of a link: the same incarnation may join again and go on counting.
        totals = self._totals.setdefault((link.name, link.incarnation), {})
        for field, counter in self._from_workers.items():
            total = getattr(load, field)
            counter.inc(max(0, total - totals.get(field, 0)))
            totals[field] = total
        if len(self._totals) > MAX_REMEMBERED_WORKERS:
            del self._totals[next(iter(self._totals))]

    def worker_left(self, link: WorkerLink) -> None:
        if link.load.total_blocks:
            for per_worker in (self.kv_cache_usage, self.open_transfers, self.bandwidth):
                per_worker.remove(link.name)

    def fleet(self, links: tuple[WorkerLink, ...]) -> None:
        """Count the joined workers."""
        tally = Tally((k.role.value, _state(k)) for k in links)
        for role in ("prefill", "decode"):
            for state in ("ready", "asleep", "draining"):
                self.workers.labels(role, state).set(tally[role, state])


def _state(link: WorkerLink) -> str:
    if link.draining or link.slumber.rest is Rest.RETIRING:
        return "draining"
    return "ready" if link.awake else "asleep"
