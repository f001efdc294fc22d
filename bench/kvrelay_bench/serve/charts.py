"""The picture of a serving run: how latencies are distributed, and what happened when."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvrelay_bench.plot import COLOURS, draw_cdf, panels
from kvrelay_bench.serve.client import Answer, Outcome
from kvrelay_bench.serve.load import LoadRun
from kvrelay_bench.serve.metrics import gaps, tpot, ttft

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MILLISECONDS = 1e3


def draw(path: Path, runs: Mapping[str, LoadRun], *, title: str) -> None:
    """Three distributions over all loads, then a timeline of each load."""
    with panels(path, 3 + len(runs), columns=2, title=title) as axes:
        for place, (name, label) in enumerate(
            (("ttft", "TTFT (ms)"), ("itl", "ITL, gap between chunks (ms)"), ("tpot", "TPOT (ms)"))
        ):
            series = {load: _values(name, run) for load, run in runs.items()}
            draw_cdf(axes[place], series, label=label)
        for place, (load, run) in enumerate(runs.items()):
            _timeline(axes[3 + place], load, run)


def _values(name: str, run: LoadRun) -> Sequence[float]:
    answers = [s.answer for s in run.samples if s.answer.outcome is Outcome.OK]
    if name == "itl":
        return [gap * _MILLISECONDS for answer in answers for gap in gaps(answer)]
    pick = {"ttft": ttft, "tpot": tpot}[name]
    return [value * _MILLISECONDS for a in answers if (value := pick(a)) is not None]


def _timeline(axes: "Axes", load: str, run: LoadRun) -> None:
    """A line for each request, from sending to its end: waiting in one colour, answering in another."""
    rows = range(len(run.samples))
    answers = [sample.answer for sample in run.samples]
    sent = [answer.sent - run.began for answer in answers]
    end = [(answer.ended or run.ended) - run.began for answer in answers]
    first = [
        answer.chunks[0] - run.began if answer.chunks else ended
        for answer, ended in zip(answers, end, strict=True)
    ]
    width = min(6.0, 160 / max(1, len(rows)))
    axes.hlines(rows, sent, first, color=COLOURS[4], linewidth=width, label="until the first token")
    axes.hlines(rows, first, end, color=COLOURS[0], linewidth=width, label="answering")
    failed = [row for row in rows if _failed(answers[row])]
    if failed:
        places = [end[row] for row in failed]
        axes.plot(places, failed, "x", color=COLOURS[1], markersize=4, label="failed")
    axes.set_xlabel("time (s)")
    axes.set_ylabel("request, in order of arrival")
    axes.set_title(load)
    axes.legend(loc="lower right")


def _failed(answer: Answer) -> bool:
    return answer.outcome not in {Outcome.OK, Outcome.STOPPED}
