"""`kvrelay bench transfer`: sizes, stages, UCX's own numbers, and one run between real processes."""

import json

import pytest
import torch

from kvrelay.cli.settings import resolve
from kvrelay_bench.transfer import run as run_module
from kvrelay_bench.transfer import stages as stages_module
from kvrelay_bench.transfer.command import COMMAND, SIZES
from kvrelay_bench.transfer.perftest import parse_result
from kvrelay_bench.transfer.pieces import LAYOUT, make_pool, piece_of, shuffled_blocks
from kvrelay_bench.transfer.run import Results, describe, run_transfer, share_table
from kvrelay_bench.transfer.stages import Stages
from kvrelay_protocol.errors import TransferError, TransportMisconfigured, UsageError
from kvrelay_transfer.frames import CorruptFrame
from kvrelay_transfer.layout import WireFormat

KIB = 1024


def flags(**given):
    return resolve(COMMAND.flags, given, environ={})


@pytest.mark.parametrize("size", [*SIZES, 16 * KIB, 48 * KIB, 96 * KIB * KIB])
def test_a_message_has_the_blocks_that_make_its_size(size):
    piece = piece_of(size)
    assert WireFormat.between(LAYOUT, LAYOUT).payload_bytes(piece) == size
    assert piece.layer_count <= LAYOUT.num_layers
    assert piece.token_count <= 256 * LAYOUT.block_size


@pytest.mark.parametrize("size", [16 * KIB + 1, 8 * KIB, 16 * KIB * 6151])
def test_a_size_that_no_blocks_make_is_refused_with_one_that_works(size):
    with pytest.raises(UsageError, match=rf"--size {size}: .* take a multiple of 16384"):
        piece_of(size)


def test_blocks_are_distinct_and_in_no_order():
    blocks = shuffled_blocks(20, 64, seed=1)
    assert len(set(blocks)) == 20
    assert list(blocks) != sorted(blocks)
    assert max(blocks) < 64


def test_stages_move_the_blocks_they_are_timed_with():
    rates = Stages(pool_blocks=8).measure(64 * KIB, ring_bytes=256 * KIB)
    parts = (rates.memcpy, rates.gather, rates.scatter, rates.seal_us, rates.open_us)
    assert all(part > 0 for part in parts)


def test_stages_notice_a_scatter_that_loses_a_block(monkeypatch):
    stages = Stages(pool_blocks=8)
    whole = stages._target.scatter
    monkeypatch.setattr(
        stages._target, "scatter",
        lambda first, end, blocks, payload, *, digest: (
            whole(first, end, blocks, payload, digest=digest),
            stages._target.tensor[:, :, blocks[-1]].zero_(),
        )[0],
    )  # fmt: skip
    with pytest.raises(AssertionError, match="same blocks"):
        stages.measure(64 * KIB, ring_bytes=128 * KIB)


def test_stages_notice_damage_between_gather_and_scatter(monkeypatch):
    opened = stages_module.open_frame

    def damaged(buffer, nbytes, expected):
        buffer[-1] ^= 1
        return opened(buffer, nbytes, expected)

    monkeypatch.setattr(stages_module, "open_frame", damaged)
    with pytest.raises((AssertionError, CorruptFrame), match="digest"):
        Stages(pool_blocks=8).measure(64 * KIB, ring_bytes=128 * KIB)


def test_the_pool_of_a_seed_is_random_and_repeatable():
    one, two, zero = make_pool(4, seed=1), make_pool(4, seed=1), make_pool(4)
    # As bits: random bfloat16 values hold NaN, which equals nothing.
    assert torch.equal(one.tensor.view(torch.int16), two.tensor.view(torch.int16))
    assert one.tensor.view(torch.int16).unique().numel() > 1000
    assert not zero.tensor.any()


PERFTEST = """\
+--------------+--------------+----------+---------+---------+----------+----------+-----------+
|     Test     | # iterations | 50.0%ile | average | overall |  average |  overall |  average  |
+--------------+--------------+----------+---------+---------+----------+----------+-----------+
                         200      7.111  1274.810  1274.810     3137.72    3137.72         784         784
"""


def test_perftests_mebibytes_become_decimal_gigabytes():
    assert parse_result(PERFTEST) == pytest.approx(3137.72 * 2**20 / 1e9)
    assert parse_result("failed to connect\n") is None


def results(**rates):
    made = Results({64 * KIB: {name: list(found) for name, found in rates.items()}})
    made.transport, made.rounds = "tcp/lo", 3
    made.latency_us, made.plain_latency_us = [100.0], [50.0]
    return made


def test_shares_are_of_medians_and_absent_where_nothing_was_measured():
    made = results(send=[1.0, 3.0, 2.0], plain=[4.0], memcpy=[8.0, 16.0])
    assert made.share(64 * KIB, "send", "plain") == 0.5
    assert made.share(64 * KIB, "send", "perftest") is None
    assert share_table(made).rows == [["64 KiB", None, "50%", None, "17%"]]
    assert "tcp/lo" in describe(made)


def test_only_ucx_can_be_compared_with_ucx(tmp_path):
    with pytest.raises(UsageError, match="only ucx://"):
        run_transfer(flags(transport="inproc://"))
    with pytest.raises(TransportMisconfigured, match="shared memory"):
        run_transfer(flags(transport="ucx://?tls=posix"))


def test_a_run_between_real_processes_hands_over_exact_blocks(tmp_path, capsys):
    out = tmp_path / "result.json"
    plot = tmp_path / "plot.svg"
    values = flags(
        size=["64KiB"],
        prompt_tokens=["40"],
        rounds="1",
        out=str(out),
        plot=str(plot),
        skip_perftest="true",
        model="tiny",
    )
    assert run_transfer(values) == 0
    report = json.loads(out.read_text())
    (asked,) = report["stack"]
    assert asked["tokens"] == 40
    # 40 tokens in blocks of 16 and 2 layers of 2 heads of 16, keys and values of two bytes each.
    assert asked["kv_bytes"] - 48 * 2 * 2 * 16 * 2 * 2 in range(160, 4096)
    assert asked["kv_exposed_ms"] >= 0 < asked["ttft_ms"]
    (row,) = report["rows"]
    assert set(row["gb_per_s"]) == {"memcpy", "gather", "scatter", "send", "asleep", "plain"}
    assert all(rate > 0 for rate in row["gb_per_s"].values())
    assert set(row["framing_us"]) == {"seal_us", "open_us"}
    assert all(us > 0 for us in row["framing_us"].values())
    (whole,) = report["handovers"]
    assert whole["exact"]
    assert whole["transport"] == report["transport"]
    # 40 tokens are three blocks; the header of each message and the record come on top.
    assert whole["bytes"] - 3 * LAYOUT.block_bytes in range(160, 4096)
    assert "<svg" in plot.read_text()
    printed = capsys.readouterr().out
    assert report["transport"] in printed
    assert "exposed of TTFT" in printed


def scripted(monkeypatch, *endings):
    """Rounds that end in an exception, or well."""
    left = list(endings)

    def one_round(_values, _config, _stages, made):
        ending = left.pop(0)
        if ending is not None:
            raise ending
        made.transport = "tcp/lo"
        made.latency_us.append(1.0)
        made.plain_latency_us.append(1.0)
        made.stolen.append(0.0)
        for size in made.rates:
            for name in ("memcpy", "send"):
                made.add(name, size, 2.0)

    monkeypatch.setattr(run_module, "_round", one_round)
    monkeypatch.setattr(run_module, "Stages", lambda: None)


@pytest.mark.parametrize(
    ("endings", "code", "rounds", "failures"),
    [
        ((None, KeyboardInterrupt()), 130, 1, 0),
        ((TransferError("lost"), None), 0, 1, 1),
        ((None, TransferError("lost")), 0, 1, 1),
    ],
)
def test_rounds_that_ended_are_kept_whatever_happens_to_the_others(
    monkeypatch, tmp_path, endings, code, rounds, failures
):
    scripted(monkeypatch, *endings)
    out = tmp_path / "result.json"
    assert run_transfer(flags(rounds="2", out=str(out))) == code
    report = json.loads(out.read_text())
    assert (report["rounds"], len(report["rows"])) == (rounds, len(SIZES))
    if failures and endings[-1] is None:
        assert report["failures"] == ["lost"]


def test_nothing_but_failures_is_a_failure(monkeypatch, tmp_path):
    scripted(monkeypatch, TransferError("lost"))
    assert run_transfer(flags(rounds="1", out=str(tmp_path / "result.json"))) == 1
    assert not (tmp_path / "result.json").exists()
