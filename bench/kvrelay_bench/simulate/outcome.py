"""What is reported of a run."""

from dataclasses import dataclass

from kvrelay_bench.report import percentile
from kvrelay_bench.simulate.fleet import Slo
from kvrelay_bench.simulate.simulation import Run


@dataclass(frozen=True, slots=True)
class Outcome:
    """One policy on one load; times in seconds."""

    policy: str
    requests: int
    lost: int
    """Without an end: must be 0."""
    attainment: float
    """Share within both limits."""
    ttft_attainment: float
    tpot_attainment: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p99_s: float
    longest_wait_s: float
    """For a first token."""
    gpu_hours: float
    prefill_gpu_hours: float
    decode_gpu_hours: float
    regret: float | None
    """GPU-hours over the oracle's."""
    regret_two_pools: float | None
    """The same over the cheapest plan that keeps both pools apart; None without a prefill pool."""
    cold_starts: int
    """Replicas started, or woken, after the beginning."""
    met_cold_start: int
    """Requests that came while there was no decode worker."""
    flaps: int
    peak_prefill: int
    peak_decode: int


def summarise_run(
    policy: str,
    run: Run,
    slo: Slo,
    oracle_gpu_s: float,
    two_pools_gpu_s: float | None = None,
    *,
    warmup_s: float = 0.0,
) -> Outcome:
    """Reduce a run to its row: what arrived and was paid after the warm-up; starts and losses of all."""
    counted = [request for request in run.requests if request.plan.arrival_s >= warmup_s]
    done = [request for request in counted if request.done]
    first = [r.ttft_s <= slo.ttft_s for r in done]
    pace = [r.tpot_s <= slo.tpot_s for r in done]
    total = len(counted)
    paid = run.gpu_seconds(warmup_s)
    ttft = [r.ttft_s for r in done]
    return Outcome(
        policy=policy,
        requests=total,
        lost=sum(not request.done for request in run.requests),
        attainment=sum(a and b for a, b in zip(first, pace, strict=True)) / total,
        ttft_attainment=sum(first) / total,
        tpot_attainment=sum(pace) / total,
        ttft_p50_s=percentile(ttft, 50),
        ttft_p99_s=percentile(ttft, 99),
        tpot_p99_s=percentile([r.tpot_s for r in done], 99),
        longest_wait_s=max(ttft),
        gpu_hours=paid / 3600,
        prefill_gpu_hours=run.prefill.gpu_seconds_from(warmup_s) / 3600,
        decode_gpu_hours=run.decode.gpu_seconds_from(warmup_s) / 3600,
        regret=paid / oracle_gpu_s if oracle_gpu_s else None,
        regret_two_pools=paid / two_pools_gpu_s if two_pools_gpu_s else None,
        cold_starts=run.prefill.starts + run.decode.starts,
        met_cold_start=sum(r.parked for r in counted),
        flaps=run.prefill.flaps + run.decode.flaps,
        peak_prefill=run.prefill.peak,
        peak_decode=run.decode.peak,
    )
