"""A slice of `kvrelay chaos --scenario transfers`: real processes killed, bits flipped, nothing comes of it."""

import json
from dataclasses import replace
from types import SimpleNamespace

from tiny_models import tiny_model

from kvrelay_chaos.transfers.arrivals import Arrivals
from kvrelay_chaos.transfers.command import run_answers, run_flips, run_transfers
from kvrelay_chaos.transfers.flips import SHAPE, FlipReport
from kvrelay_chaos.transfers.kills import KillReport, kill_sides
from kvrelay_chaos.transfers.side import Side
from kvrelay_transfer.inproc import InprocTransport


def test_survivors_of_killed_sides_live_let_go_and_work_on():
    report = kill_sides(10, seed=3)
    assert report.held, report
    assert report.killed == {"sender": 5, "receiver": 5}
    assert report.exact_afterwards == 10
    assert report.survivor_deaths == 0
    for before, after in report.growth.values():
        assert after <= before + 2, report.growth  # a pool of threads may have started one


def test_every_flipped_bit_is_found_and_mended():
    report = run_flips(300, seed=3)
    assert report.held, report
    assert (report.flips, report.detected, report.exact) == (300, 300, 300)
    assert all(report.where[place] for place in ("header", "payload", "record header"))


def test_answers_over_damaged_transfers_are_exact():
    report = run_answers(12, seed=3, model_dir=tiny_model("llama3"))
    assert report.held, report
    assert report.flips == report.detected == 12


def test_a_flip_that_nobody_notices_is_reported():
    assert FlipReport(flips=2, detected=2, exact=2).held
    assert not FlipReport(flips=2, detected=1, exact=2).held
    assert not FlipReport(flips=2, detected=2, exact=1).held
    assert not FlipReport(flips=1, detected=1, exact=1, leaks=["blocks"]).held


def test_a_survivor_that_dies_leaks_or_fails_without_a_type_is_reported():
    fine = KillReport(100)
    assert fine.held
    assert not replace(fine, survivor_deaths=1).held
    assert not replace(fine, leaks=["blocks"]).held
    assert not replace(fine, untyped=["KeyError"]).held
    fine.killed["sender"] += 1
    assert not fine.held  # and no whole transfer after it


def test_the_histogram_counts_by_share_of_the_transfer():
    report = KillReport(100, bytes_at_death=[0, 9, 10, 99, 130])
    assert report.histogram() == [2, 1, 0, 0, 0, 0, 0, 0, 0, 2]


async def test_arrived_bytes_are_seen_in_the_staging_buffer():
    side = await Side.start(SHAPE, InprocTransport(), staging_count=1)
    arrivals = Arrivals(side)
    memory = memoryview(side.staging_memory[0])
    assert not arrivals.reached(1)
    memory[:100] = bytes(range(1, 101))
    assert (arrivals.count(), arrivals.reached(100), arrivals.reached(200)) == (100, True, False)
    side.kit.transport.stats.messages_received += 1
    side.kit.transport.stats.bytes_received += 150
    assert (arrivals.count(), arrivals.reached(150), arrivals.reached(151)) == (150, True, False)
    await side.kit.close()


async def test_a_side_that_keeps_blocks_says_so():
    side = await Side.start(SHAPE, InprocTransport(), staging_count=1)
    held = side.take(leased=True)
    assert "blocks" in side.leaks()[0]
    side.allocator.release(held.blocks)
    staging = await side.kit.staging.acquire()
    assert "staging" in side.leaks()[0]
    staging.release()
    assert side.leaks() == []
    await side.kit.close()


def test_parts_of_a_result_are_written_one_by_one(tmp_path, capsys):
    out = tmp_path / "result.json"
    nothing = {"kills": 0, "flips": 0, "answers": 0, "seed": 1, "out": str(out)}
    assert run_transfers(SimpleNamespace(**nothing | {"flips": 3})) == 0
    assert run_transfers(SimpleNamespace(**nothing | {"kills": 1})) == 0
    rows = {row["part"]: row for row in json.loads(out.read_text())["rows"]}
    assert (rows["flips"]["detected"], rows["kills"]["kills"]) == (3, 1)
    assert "survivor deaths" in capsys.readouterr().out
