"""`kvrelay bench interference`: what is counted, who wins, and a round on real workers."""

import json

import pytest
from http_stack import MODEL, http_stack
from tiny_models import tiny_model

from kvrelay.cli.settings import resolve
from kvrelay_bench.interference.command import COMMAND
from kvrelay_bench.interference.experiment import Plan, Round, check_context, run_round
from kvrelay_bench.interference.numbers import (
    METRICS,
    Metric,
    Spread,
    gaps_between,
    round_numbers,
    spread,
    tokens_between,
    winner,
)
from kvrelay_bench.interference.run import (
    Contender,
    contenders,
    measure,
    plan_of,
    result_table,
    verdict,
)
from kvrelay_bench.serve.client import Answer, Outcome
from kvrelay_bench.serve.load import Sample
from kvrelay_bench.serve.stack import Target
from kvrelay_bench.serve.workload import PlannedRequest
from kvrelay_protocol.errors import UsageError

PLAN = Plan(
    streams=2, stream_input=8, quiet_s=0.2, arrivals=2, every_s=0.2, long_input=100, long_output=2
)


def flags(**given):
    return resolve(COMMAND.flags, given, environ={})


@pytest.mark.parametrize(
    ("cores", "chunks", "expected"),
    [
        (2, (512,), [("disaggregated", 1, 1, 512), ("aggregated 512", 0, 2, 512)]),
        (5, (512, 64, 512), [("disaggregated", 1, 2, 512), ("aggregated 512", 0, 4, 512),
                             ("aggregated 64", 0, 4, 64)]),
        (1, (64,), [("disaggregated", 1, 1, 64), ("aggregated 64", 0, 2, 64)]),
    ],
)  # fmt: skip
def test_contenders_have_equal_threads_in_all(cores, chunks, expected):
    found = contenders(cores, chunks)
    assert [(c.name, c.prefill, c.threads, c.chunk) for c in found] == expected
    assert len({(c.prefill + 1) * c.threads for c in found}) == 1


def made_round():
    """Two streams of a token a second from 0 on; a stall of 3 s while a prompt is computed."""
    chunks = [0.0, 1.0, 2.0, 3.0, 6.0, 7.0]
    streams = [Answer(chunks=list(chunks), counts=[1, 2, 3, 4, 5, 6]) for _ in range(2)]
    answer = Answer(sent=2.5, chunks=[5.5], ended=6.0, outcome=Outcome.OK, completion_tokens=2)
    long = [Sample(PlannedRequest(9, 0.0, 100, 2), 2.5, answer)]
    return Round(streams, quiet_from=0.0, busy_from=2.5, busy_until=7.5, long=long)


def test_a_gap_counts_where_it_ends():
    answer = made_round().streams[0]
    assert gaps_between(answer, 0.0, 2.5) == [(1.0, 1.0), (2.0, 1.0)]
    assert gaps_between(answer, 2.5, 7.5) == [(3.0, 1.0), (6.0, 3.0), (7.0, 1.0)]
    assert [tokens_between(answer, 0.0, 2.5), tokens_between(answer, 2.5, 7.5)] == [2, 3]


def test_numbers_of_a_round_are_those_of_its_windows():
    numbers = round_numbers(made_round(), PLAN)
    assert numbers["quiet_itl_p50_ms"] == 1000
    assert numbers["busy_itl_p50_ms"] == 1000
    assert numbers["busy_itl_max_ms"] == 3000
    assert numbers["p99_over_quiet_p50"] == pytest.approx(3.0)
    assert numbers["long_ttft_p50_ms"] == 3000
    assert numbers["quiet_stream_tokens_per_s"] == pytest.approx(4 / 2.5)
    assert numbers["busy_stream_tokens_per_s"] == pytest.approx(6 / 5)
    assert numbers["busy_total_tokens_per_s"] == pytest.approx((6 + 102) / 5)
    assert numbers["tokens_together_share"] == 0.0
    assert {metric.key for metric in METRICS} <= set(numbers)


def test_a_round_without_an_answer_has_no_ttft_but_the_rest():
    result = made_round()
    result.long[0].answer.outcome = Outcome.ABORTED
    numbers = round_numbers(result, PLAN)
    assert numbers["long_ttft_p50_ms"] is None
    assert numbers["busy_total_tokens_per_s"] == pytest.approx(6 / 5)


def test_the_winner_is_clear_of_the_others_rounds():
    low, high = Metric("x", "latency"), Metric("x", "rate", lower_is_better=False)
    apart = {"a": Spread(10, 9, 11), "b": Spread(20, 18, 25)}
    assert winner(low, apart) == "a"
    assert winner(high, apart) == "b"
    assert winner(low, {"a": Spread(10, 9, 19), "b": Spread(20, 18, 25)}) is None
    assert winner(low, {"a": Spread(100, 100, 100), "b": Spread(101, 101, 101)}) is None
    assert winner(low, {"a": Spread(1, 1, 1), "b": None}) is None
    assert spread([{"x": 3.0}, {"x": None}, {"x": 1.0}, {"x": 2.0}], "x") == Spread(2.0, 1.0, 3.0)
    assert spread([{"x": None}], "x") is None


def test_the_verdict_names_what_the_first_wins_and_loses():
    slow = dict.fromkeys([m.key for m in METRICS], 10.0) | {"long_ttft_p50_ms": 1.0}
    fast = dict.fromkeys([m.key for m in METRICS], 5.0) | {"long_ttft_p50_ms": 3.0}
    parties = [Contender("ours", 1, 1, 512), Contender("theirs", 0, 2, 512)]
    parties[0].numbers, parties[1].numbers = [fast], [slow]
    text = verdict(parties)
    better, worse = text.split("  worse")
    assert "ours against theirs" in better
    assert "ITL p99, prompts arriving (ms): 5, 10" in better
    assert "TTFT p50 of long prompts (ms): 3, 1" in worse
    assert "stream tokens/s, alone: 5, 10" in worse
    assert "about equal: nothing" in worse


def test_a_prompt_longer_than_the_context_is_refused_before_anything_is_sent():
    with pytest.raises(UsageError, match=r"--long-input 100 .* 102; this model has 64"):
        check_context(PLAN, Target("http://x", "m", 64, 100))
    check_context(PLAN, Target("http://x", "m", 102, 100))


async def test_rounds_on_real_workers_take_turns_and_are_written(tmp_path, capsys):
    values = flags(
        model="tiny", streams="2", stream_input="8", long_input="100", long_output="2",
        arrivals="2", every="0.2", quiet="0.2", rounds="2", chunk=["64"],
        out=str(tmp_path / "result.json"),
    )  # fmt: skip
    plan = plan_of(values)
    assert plan == Plan(2, 8, 0.2, 2, 0.2, 100, 2)
    parties = contenders(2, values.chunk)
    # Streams that outlast a round on any machine.
    long = 20_000
    model = tiny_model("llama3", max_position_embeddings=long)
    pool = {"kv_memory_bytes": 64 * 2**20}
    settings = {"prefill_settings": pool, "decode_settings": pool}
    async with (
        http_stack(model, **settings) as split,
        http_stack(model, prefill=0, **settings) as whole,
    ):
        for party, url in zip(parties, (split, whole), strict=True):
            party.target = Target(url, MODEL, long, 256)
        assert not await measure(values, plan, parties)
    for party in parties:
        assert len(party.rounds) == 2
        for result in party.rounds:
            assert result.problems == []
            assert result.quiet_from < result.busy_from < result.busy_until
            assert [s.answer.outcome for s in result.long] == [Outcome.OK] * 2
            # Every one of its prompts is new: nothing comes from a prefix cache.
            assert [s.answer.cached_tokens for s in result.long] == [0, 0]
            assert {a.outcome for a in result.streams} == {Outcome.STOPPED}
            assert all(a.chunks[-1] > result.busy_from for a in result.streams)
    assert {s.answer.path for s in parties[0].rounds[0].long} == {"disaggregated"}
    assert all("local" in s.answer.path for s in parties[1].rounds[0].long)
    report = json.loads((tmp_path / "result.json").read_text())
    assert [(r["contender"], r["round"]) for r in report["rows"]] == [
        ("disaggregated", 0), ("disaggregated", 1), ("aggregated 64", 0), ("aggregated 64", 1),
    ]  # fmt: skip
    assert all(row["busy_itl_p99_ms"] > 0 for row in report["rows"])
    table = result_table(parties)
    assert len(table.rows) == len(METRICS)
    lines = capsys.readouterr().out.splitlines()
    order = ["disaggregated" in line for line in lines if line.startswith("round ")]
    assert order == [True, False, False, True]


async def test_a_stream_that_ends_early_is_said():
    async with http_stack(prefill=0) as url:
        # A context that ends the stream at 1000 tokens, beside a later answer of 1300 in the same steps.
        plan = Plan(1, 8, 0.1, 1, 0.1, 10, 1300)
        result = await run_round(Target(url, MODEL, 1008, 256), plan, 0)
    assert any("in the middle" in problem for problem in result.problems)


def test_the_plot_shows_the_rounds(tmp_path):
    pytest.importorskip("matplotlib")
    from kvrelay_bench.interference.charts import draw

    path = tmp_path / "plot.svg"
    draw(path, {"one": [made_round()], "two": [made_round()], "none": []}, title="a title")
    assert "<svg" in path.read_text()


def test_an_unwritable_plot_is_one_clear_line(tmp_path):
    pytest.importorskip("matplotlib")
    from kvrelay_bench.interference.charts import draw

    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--plot .* can't be written"):
        draw(tmp_path / "file" / "plot.png", {"one": [made_round()]}, title="a title")


def test_the_command_defaults_to_the_half_billion_model_and_two_chunk_sizes():
    values = flags()
    assert (values.model, values.chunk, values.kv_memory) == ("0.5b", (512, 128), 1024**3)
