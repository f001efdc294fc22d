"""What the cold-start benchmark waits for, and what it prints."""

import pytest

from kvrelay_bench.coldstart.run import WAYS, ColdStart, _at_rest, table

AWAKE, ASLEEP = {"asleep": False}, {"asleep": True}


@pytest.mark.parametrize(
    ("workers", "at_zero", "all_asleep"),
    [
        ([], True, False),
        ([AWAKE], False, False),
        ([ASLEEP], False, True),
        ([ASLEEP, AWAKE], False, False),
        ([ASLEEP, ASLEEP], False, True),
    ],
)
def test_a_round_begins_where_nobody_is_or_where_all_sleep(workers, at_zero, all_asleep):
    assert _at_rest(workers, asleep=False) == at_zero
    assert _at_rest(workers, asleep=True) == all_asleep


def test_each_way_to_start_has_its_row():
    starts = [ColdStart(0.002, {"wake": 0.01}, seconds, 0.25) for seconds in (0.5, 0.25, 1.0)]
    text = table({("demo", way.how): starts for way in WAYS}).text()
    rows = [line.split() for line in text.splitlines()[2:]]
    assert [" ".join(row[1:-6]) for row in rows] == ["woken from sleep", "forked", "new process"]
    for row in rows:
        assert (float(row[-6]), float(row[-4]), row[-2:]) == (0.5, 2.0, ["25%", "3"])
