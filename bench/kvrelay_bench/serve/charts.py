"""The picture of a serving run: how latencies are distributed, and what happened when."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrelay_bench.plot import COLOURS, draw_cdf, panels
from kvrelay_bench.serve.client import Answer, Outcome
from kvrelay_bench.serve.load import LoadRun
from kvrelay_bench.serve.metrics import gaps, tpot, ttft

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MILLISECONDS = 1e3


def draw(path: Path, runs: Mapping[str, LoadRun], *, title: str) -> None:
    """Three distributions over all loads, then a timeline of each load."""
    with panels(path, 3 + len(runs), columns=3, title=title) as axes:
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
    """A bar for each request, from sending to its end: waiting in one colour, answering in another."""
    for row, sample in enumerate(run.samples):
        answer = sample.answer
        sent, end = answer.sent - run.began, (answer.ended or run.ended) - run.began
        first = answer.chunks[0] - run.began if answer.chunks else end
        bar: dict[str, Any] = {"height": 0.8, "linewidth": 0.0}
        axes.barh(row, first - sent, left=sent, color=COLOURS[4], **bar)
        axes.barh(row, end - first, left=first, color=COLOURS[0], **bar)
        if _failed(answer):
            axes.plot([end], [row], marker="x", color=COLOURS[1], markersize=4)
    # Empty bars, for the legend.
    axes.barh(0, 0, color=COLOURS[4], label="waiting for the first token")
    axes.barh(0, 0, color=COLOURS[0], label="answering")
    if any(_failed(sample.answer) for sample in run.samples):
        axes.plot([], [], "x", color=COLOURS[1], label="failed")
    axes.set_xlabel("time (s)")
    axes.set_ylabel("request, in order of arrival")
    axes.set_title(load)
    axes.legend(loc="lower right")


def _failed(answer: Answer) -> bool:
    return answer.outcome not in {Outcome.OK, Outcome.STOPPED}
