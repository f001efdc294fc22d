"""Demand and replicas over time, and what each policy costs for what it keeps."""

from collections.abc import Sequence
from pathlib import Path

from kvrelay_bench.plot import COLOURS, panels
from kvrelay_bench.simulate.oracle import Plan
from kvrelay_bench.simulate.outcome import Outcome
from kvrelay_bench.simulate.simulation import Run

_BINS = 300


def draw(
    path: Path,
    run: Run,
    plan: Plan,
    outcomes: Sequence[Outcome],
    *,
    oracle_s: float,
    goal: float,
    title: str,
) -> None:
    """Three panels: work that arrives, replicas beside the oracle's, cost against attainment."""
    hours = run.ended_at > 3 * 3600
    unit, name = (3600.0, "hours") if hours else (60.0, "minutes")
    with panels(path, 3, columns=3, title=title) as (demand, replicas, cost):
        width = max(run.ended_at / _BINS, 1.0)
        arriving = [0.0] * (int(run.ended_at / width) + 1)
        for request in run.requests:
            arriving[int(request.plan.arrival_s / width)] += request.computed_s / width
        times = [place * width / unit for place in range(len(arriving))]
        demand.step(times, arriving, where="post", color=COLOURS[0], linewidth=0.9)
        demand.set_ylabel("prefill workers' worth of prompts arriving")
        demand.set_xlabel(name)
        timelines = {"prefill": run.prefill.timeline, "decode": run.decode.timeline}
        for place, (label, timeline) in enumerate(timelines.items()):
            replicas.step(
                [t / unit for t, _ in timeline], [n for _, n in timeline],
                where="post", color=COLOURS[place], label=label,
            )  # fmt: skip
        total = [t.prefill + t.decode for t in plan.replicas]
        replicas.step(
            [place * plan.bin_s / unit for place in range(len(total))], total,
            where="post", color=COLOURS[2], linestyle="--", linewidth=0.9, label="oracle, both pools",
        )  # fmt: skip
        replicas.set_ylabel("replicas paid for")
        replicas.set_xlabel(name)
        replicas.legend()
        for place, outcome in enumerate(outcomes):
            cost.plot(
                [outcome.gpu_hours], [100 * outcome.attainment], "o",
                color=COLOURS[place % len(COLOURS)], label=outcome.policy,
            )  # fmt: skip
        cost.axvline(oracle_s / 3600, color=COLOURS[2], linestyle="--", linewidth=0.9)
        cost.axhline(100 * goal, color="grey", linestyle=":", linewidth=0.9)
        cost.set_xlabel("GPU-hours (dashed: the oracle's)")
        cost.set_ylabel("requests within their limits, %")
        cost.legend()
