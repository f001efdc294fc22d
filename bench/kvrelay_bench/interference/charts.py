"""ITL over time for every contender, with the long prompts marked, and its distributions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kvrelay_bench.interference.experiment import Round
from kvrelay_bench.interference.numbers import gaps_between
from kvrelay_bench.plot import COLOURS, draw_cdf, panels, use_log_scale

_PROMPT_COLOUR = COLOURS[5]


def draw(path: Path, rounds: Mapping[str, Sequence[Round]], *, title: str) -> None:
    """A panel over time for the last round of each, then ITL of all rounds, alone and interfered."""
    shown = {name: done for name, done in rounds.items() if done}
    with panels(path, len(shown) + 2, columns=2, title=title) as axes:
        limits: list[float] = []
        for place, (name, done) in enumerate(shown.items()):
            panel, last = axes[place], done[-1]
            points = [
                (when - last.busy_from, gap * 1e3)
                for answer in last.streams
                for when, gap in gaps_between(answer, last.quiet_from, last.busy_until)
            ]
            for index, sample in enumerate(last.long):
                answer = sample.answer
                until = answer.chunks[0] if answer.chunks else last.busy_until
                panel.axvspan(
                    answer.sent - last.busy_from,
                    until - last.busy_from,
                    color=_PROMPT_COLOUR,
                    alpha=0.25,
                    linewidth=0,
                    label="a long prompt, until its first token" if index == 0 else None,
                )
            panel.plot(
                [x for x, _ in points], [y for _, y in points], ".",
                color=COLOURS[place % 5], markersize=2.5,
            )  # fmt: skip
            limits += [y for _, y in points if y > 0]
            panel.set_title(name)
            panel.set_xlabel("time since the first long prompt (s)")
            panel.set_ylabel("ITL (ms)")
            panel.legend(loc="upper left")
        for panel in axes[: len(shown)]:
            use_log_scale(panel, vertical=True)
            if limits:
                panel.set_ylim(min(limits) * 0.8, max(limits) * 1.6)
        for panel, (label, quiet) in zip(
            axes[len(shown) :], (("streams alone", True), ("prompts arriving", False)), strict=True
        ):
            series = {
                name: [
                    gap * 1e3
                    for result in done
                    for answer in result.streams
                    for _, gap in gaps_between(answer, *_window(result, quiet=quiet))
                ]
                for name, done in shown.items()
            }
            draw_cdf(panel, series, label="ITL (ms)")
            panel.set_title(label)


def _window(result: Round, *, quiet: bool) -> tuple[float, float]:
    if quiet:
        return result.quiet_from, result.busy_from
    return result.busy_from, result.busy_until
