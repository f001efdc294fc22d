"""Order statistics, tables and the JSON that every benchmark writes."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from kvrelay_bench.machine import Limits, Machine
from kvrelay_bench.report import Table, format_cell, percentile, summarise, write_report
from kvrelay_protocol.errors import UsageError

MACHINE = Machine("a CPU", 2, 1 << 30, "Linux", limits=Limits(2, 1e10, {"float32": 1e11}))


@pytest.mark.parametrize("count", [1, 2, 5, 100])
@pytest.mark.parametrize("q", [0, 1, 50, 95, 99, 100])
def test_percentiles_are_numpys(count, q):
    values = np.random.default_rng(count).normal(size=count)
    assert percentile(values.tolist(), q) == pytest.approx(float(np.percentile(values, q)))


def test_nothing_has_no_percentile_and_no_summary():
    assert math.isnan(percentile([], 50))
    with pytest.raises(ValueError, match="nothing was measured"):
        summarise([])


def test_a_summary_orders_what_it_is_given():
    summary = summarise([3.0, 1.0, 2.0, 10.0, 4.0])
    assert (summary.median, summary.minimum, summary.maximum, summary.count) == (3.0, 1.0, 10.0, 5)
    assert summary.spread == pytest.approx(3.0)


def test_numbers_align_right_and_words_left():
    text = Table(("name", "rate"), [("a", 1.5), ("longer", 1234.5)]).text()
    assert text.splitlines() == ["name    rate", "------------", "a        1.5", "longer  1234"]


def test_markdown_marks_the_columns_of_numbers():
    markdown = Table(("name", "rate"), [("a", 2)]).markdown()
    assert markdown.splitlines() == ["| name | rate |", "| --- | ---: |", "| a | 2 |"]


def test_a_table_without_rows_is_its_header():
    assert Table(("a", "b"), []).text().splitlines()[0] == "a  b"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (float("nan"), "–"), (0.12345, "0.123"), (123.4, "123"), (7, "7"), ("x", "x")],
)
def test_cells(value, shown):
    assert format_cell(value) == shown


def test_a_report_says_what_ran_where_and_with_what(tmp_path):
    out = tmp_path / "new" / "result.json"
    rows = [{"seconds": summarise([1.0, 2.0])}]
    written = write_report("engine", SimpleNamespace(batch=8, out=out), rows, MACHINE, out,
                           details={"note": "n"}, versions={"peer": "1.2"})  # fmt: skip
    assert written == out
    found = json.loads(out.read_text())
    assert found["command"] == "kvrelay bench engine"
    assert found["arguments"] == {"batch": 8, "out": str(out)}
    assert found["rows"][0]["seconds"]["median"] == 1.5
    assert found["machine"]["limits"]["gemm_flops"] == {"float32": 1e11}
    assert found["versions"]["peer"] == "1.2"
    assert {"python", "kvrelay", "torch"} <= found["versions"].keys()
    assert found["note"] == "n"
    assert found["date"].endswith("Z")
    assert list(out.parent.iterdir()) == [out]


def test_a_report_does_not_tell_whose_home_it_was_in(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "somebody"))
    where = SimpleNamespace(peers=tmp_path / "somebody" / "peers", out=tmp_path / "a.json")
    found = json.loads(write_report("b", where, [], MACHINE, tmp_path / "a.json").read_text())
    assert found["arguments"] == {"peers": "~/peers", "out": str(tmp_path / "a.json")}


def test_a_report_without_a_place_goes_below_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    written = write_report("engine", {}, [], MACHINE)
    assert written.parent == tmp_path / "kvrelay" / "bench" / "results"


def test_a_report_that_cannot_be_written_names_the_file(tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "result.json"
    with pytest.raises(UsageError, match=r"--out .*result.json can't be written: "):
        write_report("engine", {}, [], MACHINE, out)
