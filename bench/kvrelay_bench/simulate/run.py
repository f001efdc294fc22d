"""Run every policy on one load and report."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

from kvrelay_bench.machine import describe_machine
from kvrelay_bench.plot import require_matplotlib
from kvrelay_bench.report import Table, write_report
from kvrelay_bench.serve.traces import read_trace
from kvrelay_bench.serve.workload import PlannedRequest
from kvrelay_bench.simulate.charts import draw
from kvrelay_bench.simulate.fleet import Fleet, read_fleet
from kvrelay_bench.simulate.loads import LOADS, multiply
from kvrelay_bench.simulate.oracle import Clairvoyant, Plan, clairvoyant
from kvrelay_bench.simulate.outcome import Outcome, summarise_run
from kvrelay_bench.simulate.policies import AlwaysOn, KeepAlive, Kvrelay, Planned, QueueHpa
from kvrelay_bench.simulate.simulation import Policy, Run, Simulation
from kvrelay_protocol.errors import UsageError

_FLEETS = Path(__file__).parent / "fleets"


def run_simulate(values: SimpleNamespace) -> int:
    """The command; 1 where a request was lost."""
    if values.plot:
        require_matplotlib()
    plans = read_load(values)
    if values.warmup and values.warmup >= plans[-1].arrival_s:
        raise UsageError(f"--warmup {values.warmup:g} must end before the last arrival")
    settings = dict(values.set or ())
    if values.brief or any(len(choices) > 1 for choices in settings.values()):
        if values.plot:
            raise UsageError("--plot draws all policies on one fleet: leave it or --brief out, and give "
                             "each --set one value")  # fmt: skip
        return run_sweep(values, plans, settings)
    changes = {key: choices[0] for key, choices in settings.items()}
    fleet = read_fleet(fleet_path(values.fleet), changes)
    began = time.perf_counter()
    runs, known, policy = simulate(fleet, plans, seed=values.seed)
    took = time.perf_counter() - began
    plan = known.best
    oracle_s = plan.gpu_seconds_from(values.warmup, fleet)
    apart_s = known.apart.gpu_seconds_from(values.warmup, fleet) if known.apart else None
    rows = [_outcome(name, run, known, fleet, values.warmup) for name, run in runs.items()]
    _print(fleet, plan, rows, oracle_s=oracle_s, run=runs["kvrelay"], took=took)
    if values.plot:
        title = f"{load_name(values)} on {fleet.name}"
        draw(
            values.plot,
            runs["kvrelay"],
            plan,
            rows,
            oracle_s=oracle_s,
            goal=fleet.slo.attainment,
            title=title,
        )
    path = write_report(
        "simulate",
        _arguments(values),
        [asdict(row) for row in rows],
        describe_machine(),
        Path(values.out) if values.out else None,
        details={
            "fleet": fleet,
            "oracle": {
                "gpu_hours": oracle_s / 3600,
                "gpu_hours_with_warmup": plan.gpu_seconds / 3600,
                "aggregated": plan.aggregated,
                "two_pools_gpu_hours": None if apart_s is None else apart_s / 3600,
                "peak_prefill": plan.peak.prefill,
                "peak_decode": plan.peak.decode,
            },
            "reasons": dict(sorted(policy.reasons.items())),
            "simulated_s": runs["kvrelay"].ended_at,
            "took_s": took,
        },
        command="kvrelay simulate",
    )
    print(f"\nresult: {path}")
    return 1 if any(row.lost for row in rows) else 0


def run_sweep(
    values: SimpleNamespace,
    plans: list[PlannedRequest],
    settings: Mapping[str, Sequence[str]],
) -> int:
    """Our policy and the oracle for each combination of settings; 1 where a request was lost."""
    path = fleet_path(values.fleet)
    began, rows = time.perf_counter(), []
    for choice in itertools.product(*settings.values()):
        changes = dict(zip(settings, choice, strict=True))
        fleet = read_fleet(path, changes)
        run = Simulation(fleet, Kvrelay(fleet.scaler()), seed=values.seed).run(plans)
        known = clairvoyant(fleet, run.requests, run.ended_at)
        rows.append((changes, _outcome("kvrelay", run, known, fleet, values.warmup)))
    print(_sweep_table(rows))
    print(f"\nsimulated in {time.perf_counter() - began:.1f} s")
    written = write_report(
        "simulate-sweep",
        _arguments(values),
        [{"settings": changes, **asdict(row)} for changes, row in rows],
        describe_machine(),
        Path(values.out) if values.out else None,
        details={"fleet": read_fleet(path)},
        command="kvrelay simulate",
    )
    print(f"\nresult: {written}")
    return 1 if any(row.lost for _, row in rows) else 0


def simulate(
    fleet: Fleet, plans: list[PlannedRequest], *, seed: int = 0
) -> tuple[Mapping[str, Run], Clairvoyant, Kvrelay]:
    """Our policy first, the oracle's plans for what the requests cost in that run, then the others."""
    config = fleet.scaler()
    ours = Kvrelay(config)
    runs = {"kvrelay": Simulation(fleet, ours, seed=seed).run(plans)}
    known = clairvoyant(fleet, runs["kvrelay"].requests, runs["kvrelay"].ended_at)
    plan = known.best
    lead = (fleet.prefill.start_s, fleet.decode.start_s)
    others: Mapping[str, Callable[[], Policy]] = {
        "plan replayed": lambda: Planned(plan.replicas, plan.bin_s, lead),
        "always on": lambda: AlwaysOn(plan.peak),
        "queue HPA": lambda: QueueHpa(config),
        "keep-alive": lambda: KeepAlive(config),
    }
    for name, make in others.items():
        runs[name] = Simulation(fleet, make(), seed=seed).run(plans)
    return runs, known, ours


def fleet_path(value: str) -> Path:
    """A file, or the name of a fleet that comes with the package.

    Raises:
        UsageError: neither.
    """
    path = Path(value).expanduser()
    if path.is_file():
        return path
    shipped = {file.stem: file for file in sorted(_FLEETS.glob("*.yaml"))}
    if value in shipped:
        return shipped[value]
    raise UsageError(f"--fleet {value} is no file, and none of {', '.join(shipped)}")


def read_load(values: SimpleNamespace) -> list[PlannedRequest]:
    """The trace, or the synthetic load of that name.

    Raises:
        UsageError: neither.
    """
    if values.trace in LOADS:
        plans = LOADS[values.trace](values.seed)
    else:
        path = Path(values.trace).expanduser()
        if not path.is_file():
            raise UsageError(f"--trace {values.trace} is no file, and none of {', '.join(LOADS)}")
        plans = read_trace(path)
    plans = plans[values.skip :][: values.limit]
    if not plans:
        raise UsageError(f"--skip {values.skip} leaves no request of {load_name(values)}")
    if values.skip:
        began = plans[0].arrival_s
        plans = [replace(plan, arrival_s=plan.arrival_s - began) for plan in plans]
    return multiply(plans, values.copies, values.seed) if values.copies > 1 else plans


def load_name(values: SimpleNamespace) -> str:
    return values.trace if values.trace in LOADS else Path(values.trace).name


def _outcome(name: str, run: Run, known: Clairvoyant, fleet: Fleet, warmup_s: float) -> Outcome:
    oracle_s = known.best.gpu_seconds_from(warmup_s, fleet)
    apart_s = known.apart.gpu_seconds_from(warmup_s, fleet) if known.apart else None
    return summarise_run(name, run, fleet.slo, oracle_s, apart_s, warmup_s=warmup_s)


def _arguments(values: SimpleNamespace) -> Mapping[str, object]:
    arguments = {**vars(values), "trace": load_name(values), "fleet": Path(values.fleet).name}
    return arguments | {"out": _shown(values.out), "plot": _shown(values.plot)}


def _shown(value: str | Path | None) -> str | None:
    """Published results name files, never the folders of whoever made them."""
    if value is None:
        return None
    path = Path(value)
    return path.name if path.is_absolute() else str(path)


def _sweep_table(rows: Sequence[tuple[Mapping[str, str], Outcome]]) -> str:
    return Table(
        [*rows[0][0], "GPU-h", "prefill", "x oracle", "x two pools", "within %", "TTFT p99", "TPOT p99",
         "starts", "flaps"],
        [
            [*changes.values(), row.gpu_hours, row.prefill_gpu_hours, row.regret,
             row.regret_two_pools, round(100 * row.attainment, 2), row.ttft_p99_s, row.tpot_p99_s,
             row.cold_starts, row.flaps]
            for changes, row in rows
        ],
    ).text()  # fmt: skip


def _print(
    fleet: Fleet, plan: Plan, rows: list[Outcome], *, oracle_s: float, run: Run, took: float
) -> None:
    slo = fleet.slo
    print(
        f"{fleet.name}: TTFT <= {slo.ttft_s:g} s and TPOT <= {1e3 * slo.tpot_s:g} ms for "
        f"{slo.attainment:.0%} of {rows[0].requests} requests in {run.ended_at / 3600:.2f} h\n"
        f"oracle: {oracle_s / 3600:.2f} GPU-hours, at most {plan.peak.prefill} + "
        f"{plan.peak.decode} replicas{', one pool' if plan.aggregated else ''}\n"
    )
    table = Table(
        ["policy", "GPU-h", "x oracle", "x two pools", "within %", "TTFT p50", "p99", "longest", "TPOT p99",
         "starts", "met cold", "flaps", "lost"],
        [
            [row.policy, row.gpu_hours, row.regret, row.regret_two_pools, round(100 * row.attainment, 2), row.ttft_p50_s,
             row.ttft_p99_s, row.longest_wait_s, row.tpot_p99_s, row.cold_starts,
             row.met_cold_start, row.flaps, row.lost]
            for row in rows
        ],
    )  # fmt: skip
    print(table.text())
    print(f"\nsimulated in {took:.1f} s")
