import json

import pytest

from kvrelay.cli.commands.chaos import CHAOS
from kvrelay.cli.main import main
from kvrelay.cli.settings import resolve
from kvrelay_chaos.ledger import Fired, Leak, Ledger
from kvrelay_chaos.report import print_result, write_result
from kvrelay_chaos.run import make_plan, make_settings
from kvrelay_chaos.shape import Shape
from kvrelay_chaos.soak import Growth


def _values(**given: str):
    return resolve(CHAOS.flags, given, environ={})


def test_the_printed_plan_is_that_of_its_seed(capsys):
    printed = []
    for seed in ("3", "3", "4"):
        assert main(["chaos", "--faults", "40", "--seed", seed, "--print-plan"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    assert len(printed[0].splitlines()) == 40


def test_a_saved_plan_is_carried_out_instead_of_a_drawn_one(tmp_path):
    path = tmp_path / "plan.json"
    plan = make_plan(_values(faults="30", seed="9", routers="2"))
    plan.save(path)
    assert make_plan(_values(faults="5", seed="1", plan=str(path))) == plan


def test_a_plan_that_is_none_is_one_line(tmp_path, capsys):
    path = tmp_path / "plan.json"
    path.write_text("not JSON")
    assert main(["chaos", "--plan", str(path), "--print-plan"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"kvrelay: --plan {path} is no plan of kvrelay chaos")


def test_the_stack_is_checked_as_kvrelay_up_would(capsys):
    assert main(["chaos", "--faults", "1", "--kv-memory", "900000GiB"]) == 6
    assert "workers need" in capsys.readouterr().err
    settings = make_settings(_values(deadline="7", lease="2"), Shape(1, 3, 1))
    values = settings.values
    assert (values.prefill, values.decode, values.request_timeout, values.lease) == (1, 3, 7, 2)


@pytest.fixture
def ledger() -> Ledger:
    plan = make_plan(_values(faults="3"))
    ledger = Ledger(plan.counts())
    ledger.fired = [Fired(fault, 1.0, breaks=True) for fault in plan.faults]
    ledger.leaks.append(Leak("decode-1", "blocks", 5))
    counted = {"resident_bytes": 2**20, "descriptors": 3, "threads": 4, "segments": 0}
    ledger.growth = [Growth("decode-1", 60.0, counted, counted)]
    return ledger


def test_the_table_names_what_must_not_be(ledger, capsys):
    print_result(ledger, make_plan(_values(faults="3")), 12.0)
    out = capsys.readouterr().out
    assert "leaked: decode-1: 5 blocks" in out
    assert [line.split()[1:] for line in out.splitlines() if line.startswith("all ")] == [
        ["3", "3"]
    ]
    assert any(line.startswith("decode-1") for line in out.splitlines())


def test_the_file_holds_machine_arguments_and_every_number(ledger, tmp_path):
    path = tmp_path / "chaos.json"
    values = _values(faults="3", out=str(path))
    write_result(values, ledger, make_plan(values), 12.0)
    found = json.loads(path.read_text())
    assert found["command"] == "kvrelay chaos"
    assert found["arguments"]["faults"] == 3
    assert found["machine"]["cores"] >= 1
    assert (found["faults_planned"], found["faults_fired"], found["blocks_leaked"]) == (3, 3, 5)
    assert found["time_to_error_s"]["count"] == 0
    assert found["growth"][0]["per_hour"]["threads"] == 4
