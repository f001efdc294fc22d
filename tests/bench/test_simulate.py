"""The simulator against what can be worked out by hand, and the command end to end."""

import itertools
import json
import random
from dataclasses import replace

import pytest

from kvrelay.cli.main import main
from kvrelay_bench.serve.workload import PlannedRequest
from kvrelay_bench.simulate import oracle
from kvrelay_bench.simulate.fleet import Fleet, PoolFleet, Rates, Slo, read_fleet
from kvrelay_bench.simulate.loads import LOADS, multiply
from kvrelay_bench.simulate.oracle import Work, cheapest
from kvrelay_bench.simulate.outcome import summarise_run
from kvrelay_bench.simulate.policies import AlwaysOn, Kvrelay
from kvrelay_bench.simulate.run import fleet_path, simulate
from kvrelay_bench.simulate.simulation import Simulation
from kvrelay_protocol.errors import UsageError
from kvrelay_router.scaling import Targets, decode_load, prefill_load

RATES = Rates(
    prefill_tokens_per_s=1000, context_doubling_tokens=1e12, step_s=0.01, step_per_stream_s=0.0,
    step_per_context_token_s=0.0, block_size=16, blocks=1000, kv_bytes_per_token=1e6,
    link_bytes_per_s=1e9, exposed_transfer=0.1, chunk_tokens=100,
)  # fmt: skip
POOL = PoolFleet(cold_start_s=20, max=8)
FLEET = Fleet("test", Slo(ttft_s=30, tpot_s=0.1), RATES, prefill=POOL, decode=POOL)
WARM = replace(FLEET, prefill=replace(POOL, initial=1), decode=replace(POOL, initial=1))


def _at(*times, prompt=1000, output=101, blocks=()):
    return [PlannedRequest(n, t, prompt, output, blocks, 512) for n, t in enumerate(times)]


def test_a_request_on_two_idle_pools_takes_prompt_transfer_and_steps():
    run = Simulation(WARM, AlwaysOn(Targets(1, 1))).run(_at(0.0))
    request = run.requests[0]
    assert request.ttft_s == pytest.approx(1.0)
    assert request.done_at == pytest.approx(1.0 + 0.1 + 100 * 0.01)
    assert run.gpu_seconds() == pytest.approx(2 * request.done_at)


def test_a_decode_worker_alone_computes_the_prompt_in_chunks_between_its_steps():
    run = Simulation(WARM, AlwaysOn(Targets(0, 1))).run(_at(0.0, 1.0))
    first, second = run.requests
    assert first.path is not None
    assert first.path.reason == "no_prefill_worker"
    assert first.ttft_s == pytest.approx(1.1)  # ten chunks, each with a step
    # While the second prompt is computed a step takes 110 ms instead of 10.
    assert first.tpot_s > 0.011
    assert second.ttft_s == pytest.approx(1.2)


def test_equal_leading_blocks_are_computed_once():
    plans = _at(0.0, 10.0, blocks=(7,))
    run = Simulation(WARM, AlwaysOn(Targets(1, 1))).run(plans)
    assert [r.computed_tokens for r in run.requests] == [1000, 488]


def test_a_lone_request_waits_for_a_start_and_everything_goes_back_to_zero():
    policy = Kvrelay(FLEET.scaler())
    run = Simulation(FLEET, policy).run(_at(0.0, 4000.0))
    assert [r.ttft_s for r in run.requests] == [pytest.approx(21.1)] * 2
    assert all(r.parked for r in run.requests)
    assert run.decode.starts == 2
    assert run.prefill.starts == 0
    assert run.gpu_seconds() < 150


def test_a_hundred_requests_at_zero_cause_one_start_before_it_is_up():
    run = Simulation(FLEET, Kvrelay(FLEET.scaler())).run(_at(*[0.0] * 100, prompt=50))
    assert all(r.done for r in run.requests)
    assert max(n for when, n in run.decode.timeline if when < 20) == 1


def test_nobody_loses_a_request_and_the_oracle_is_cheaper_than_anybody():
    fleet = read_fleet(fleet_path("h100-8b-sleep"))
    runs, known, _ = simulate(fleet, LOADS["square"](3)[:600])
    rows = [summarise_run(n, run, fleet.slo, known.best.gpu_seconds) for n, run in runs.items()]
    assert all(row.lost == 0 for row in rows)
    # The bound holds up to the width of a bin: one second, three times in these bursts.
    slack = 3 * known.best.bin_s / known.best.gpu_seconds
    assert all(row.regret is not None and row.regret >= 1 - slack for row in rows)


def test_the_same_seed_gives_the_same_run():
    fleet = read_fleet(fleet_path("h100-8b"))
    plans = LOADS["step"](5)[:400]
    first, second = (Simulation(fleet, Kvrelay(fleet.scaler())).run(plans) for _ in range(2))
    assert [r.done_at for r in first.requests] == [r.done_at for r in second.requests]
    assert first.gpu_seconds() == second.gpu_seconds()


def _by_trying(work, bin_s, limit_s, start_s, initial, most):
    """Every plan there is."""
    best = float("inf")
    allowed = oracle._windows(work.arriving_s, max(1, int(limit_s / bin_s)))
    for plan in itertools.product(range(most + 1), repeat=len(work.arriving_s)):
        backlog, cost, before, ok = 0.0, 0.0, initial, True
        for n, arriving, least, bound in zip(
            plan, work.arriving_s, work.floor, allowed, strict=True
        ):
            backlog = max(0.0, backlog + arriving - n * bin_s)
            ok &= n >= least and backlog <= bound + 1e-9
            cost += n * bin_s + start_s * max(0, n - before)
            before = n
        if ok and backlog <= 1e-9:
            best = min(best, cost)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_the_oracle_finds_what_trying_every_plan_finds(seed):
    generator = random.Random(seed)
    quiet = [0.0, 0.0]  # so that whatever may wait can be done before the end
    arriving = [float(generator.randint(0, 3)) for _ in range(6)] + quiet
    work = Work(arriving, [generator.randint(0, 1) for _ in arriving])
    start_s, limit_s = generator.choice([0.5, 2.0, 4.0]), 2.0
    _, cost = cheapest(work, 1.0, limit_s, start_s, initial=1)
    assert cost == pytest.approx(_by_trying(work, 1.0, limit_s, start_s, 1, most=3))


def test_the_oracle_keeps_a_worker_through_a_gap_shorter_than_a_start():
    def starts(gap):
        work = Work([0.0] * (gap + 2), [1, *[0] * gap, 1])
        plan, _ = cheapest(work, 1.0, 5.0, start_s=10.0, initial=0)
        return sum(n == 0 for n in plan)

    assert (starts(9), starts(11)) == (0, 11)


def test_copies_come_within_a_minute_and_share_no_prefix_with_each_other():
    many = multiply(_at(0.0, blocks=(0, 1)), 3, seed=1)
    assert len({plan.blocks for plan in many}) == 3
    assert all(0 <= plan.arrival_s <= 60 for plan in many)


def test_a_thousand_workers_take_a_sample_for_each_placement():
    big = replace(POOL, max=2000, initial=1000)
    fleet = replace(FLEET, prefill=big, decode=big)
    run = Simulation(fleet, AlwaysOn(Targets(1000, 1000))).run(_at(*[0.01 * n for n in range(500)]))
    assert len({r.path.decode_worker for r in run.requests if r.path}) > 250
    assert max(r.ttft_s for r in run.requests) == pytest.approx(1.0, abs=1.01)


@pytest.mark.parametrize(("text", "says"), [
    ("[]", "the file must be a mapping"),
    ("name: x", "slo is missing"),
    ("name: x\nspeed: 3", "speed is unknown"),
    ("{", "is no YAML"),
])  # fmt: skip
def test_a_wrong_fleet_file_is_one_clear_line(tmp_path, text, says):
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        read_fleet(path)


@pytest.mark.parametrize("name", ["h100-8b", "h100-8b-sleep", "h100-8b-one-pool",
                                  "h100-8b-one-pool-sleep"])  # fmt: skip
def test_shipped_fleets_can_be_read(name):
    assert read_fleet(fleet_path(name)).rates.blocks > 0


def test_a_request_that_fits_no_worker_is_refused():
    with pytest.raises(UsageError, match=r"raise rates\.blocks"):
        Simulation(WARM, AlwaysOn(Targets(1, 1))).run(_at(0.0, prompt=20_000))


def test_the_command_writes_a_table_a_plot_and_json_without_anyones_paths(tmp_path, capsys):
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 1000 * n, "input_length": 900, "output_length": 20, "hash_ids": [1, n]}
            for n in range(30)]  # fmt: skip
    trace.write_text("\n".join(json.dumps(row) for row in rows))
    out, plot = tmp_path / "result.json", tmp_path / "plot.svg"
    code = main(["simulate", "--trace", str(trace), "--fleet", "h100-8b", "--out", str(out),
                 "--plot", str(plot)])  # fmt: skip
    assert code == 0
    assert "x oracle" in capsys.readouterr().out
    assert plot.stat().st_size > 0
    text = out.read_text()
    assert str(tmp_path) not in text
    result = json.loads(text)
    assert result["rows"][0]["policy"] == "kvrelay"
    assert result["rows"][0]["lost"] == 0


def test_an_unknown_trace_or_fleet_is_one_clear_line(capsys):
    assert main(["simulate", "--trace", "nowhere.csv"]) == 2
    assert "none of lone, square" in capsys.readouterr().err
    assert main(["simulate", "--trace", "lone", "--fleet", "nowhere"]) == 2
    assert "none of h100-8b" in capsys.readouterr().err


def test_sums_kept_up_to_date_are_those_of_every_worker():
    """At every decision of a run in which workers come, drain and go."""
    fleet = read_fleet(fleet_path("h100-8b-sleep"), {"rates.blocks": "4000"})
    compared = 0

    class Watching(Kvrelay):
        def targets(self, state, now):
            nonlocal compared
            pools = simulation._prefill, simulation._decode
            workers = [w.state() for pool in pools for w in (*pool.ready, *pool.leaving)]
            prompts, blocks = state.prefill_load, state.decode_load
            expected = prefill_load(
                workers, parked_tokens=simulation._line_tokens, idle_s=prompts.idle_s,
                arriving_tokens_per_second=prompts.arriving_tokens_per_second)  # fmt: skip
            for speed in ("tokens_per_second", "local_tokens_per_second"):
                assert getattr(prompts, speed) == pytest.approx(getattr(expected, speed))
                prompts = replace(prompts, **{speed: getattr(expected, speed)})
            assert prompts == expected
            assert blocks == decode_load(
                workers, parked_blocks=simulation._line_blocks, idle_s=blocks.idle_s
            )
            compared += bool(simulation._prefill.leaving or simulation._decode.leaving)
            return super().targets(state, now)

    simulation = Simulation(fleet, Watching(fleet.scaler()))
    simulation.run(LOADS["swap"](1)[:1500] + _at(400.0, 900.0))
    assert compared > 3


def test_a_fleet_that_rests_decides_as_one_that_never_does():
    """Minutes of nothing between bursts, with a minimum of one worker each."""

    class Restless(Kvrelay):
        resting = False

    floor = replace(POOL, min=1, initial=1)
    fleet = replace(FLEET, prefill=floor, decode=floor)
    plans = [
        replace(plan, number=n, arrival_s=900.5 * (n // 40) + 0.7 * (n % 40))
        for n, plan in enumerate(_at(*[0.0] * 160))
    ]
    config = fleet.scaler()
    policies = Kvrelay(config), Restless(config)
    runs = [Simulation(fleet, policy).run(plans) for policy in policies]
    decisions = [sum(policy.reasons.values()) for policy in policies]
    assert decisions[0] < decisions[1] / 2
    assert [r.done_at for r in runs[0].requests] == [r.done_at for r in runs[1].requests]
    assert runs[0].decode.timeline == runs[1].decode.timeline
    assert runs[0].decode.starts + runs[0].prefill.starts > 0


def test_values_of_the_fleet_file_can_be_swept(tmp_path, capsys):
    out = tmp_path / "sweep.json"
    code = main(["simulate", "--trace", "square", "--limit", "200", "--skip", "50", "--out", str(out),
                 "--set", "slo.ttft_s=10,30", "--set", "prefill.min=0"])  # fmt: skip
    assert code == 0
    assert "slo.ttft_s" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [row["settings"] for row in rows] == [
        {"slo.ttft_s": "10", "prefill.min": "0"}, {"slo.ttft_s": "30", "prefill.min": "0"}
    ]  # fmt: skip
    assert all(row["requests"] == 200 for row in rows)


@pytest.mark.parametrize(("flags", "says"), [
    (["--set", "slo.speed=1"], "slo.speed is unknown"),
    (["--set", "slo=1"], "slo. must be a mapping"),
    (["--set", "decode.max=-1"], "decode.max is -1"),
    (["--skip", "99999999"], "leaves no request"),
    (["--set", "slo.ttft_s=1,2", "--plot", "x.png"], "--plot draws all policies on one fleet"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_one_clear_line(capsys, flags, says):
    assert main(["simulate", "--trace", "lone", *flags]) == 2
    assert says in capsys.readouterr().err
