"""Plots of results: one look for all of them. matplotlib is loaded when the first one is drawn."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrelay_protocol.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito: told apart with any kind of colour vision; black and yellow left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
LINES = ("-", "--", "-.", ":")
"""A second way to tell series apart, for print."""
FORMATS = (".png", ".svg", ".pdf")
_PANEL_INCHES = (5.2, 3.4)
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.handlelength": 3.2,  # long enough to show dashes
    "lines.linewidth": 1.6,
    "svg.hashsalt": "kvrelay",  # the same numbers give the same file
}


def plot_file(value: str) -> Path:
    """A path whose ending says how to draw; for flags."""
    path = Path(value).expanduser()
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"must end in {', '.join(FORMATS)}")
    return path


def require_matplotlib() -> None:
    """Ask before a long run, not after it.

    Raises:
        UsageError: it is not installed.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise UsageError(
            f"--plot needs matplotlib ({error}): pip install 'kvrelay[bench]', or leave --plot out"
        ) from None


@contextmanager
def panels(
    path: Path, count: int, *, columns: int = 2, title: str = ""
) -> Iterator[Sequence["Axes"]]:
    """Axes to draw on, in reading order; written to `path` at the end of the block.

    Raises:
        UsageError: matplotlib is missing, or the file can't be written.
    """
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    with mpl.rc_context(_STYLE):
        size = (_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * rows)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)  # no display, no global state
        axes = [figure.add_subplot(rows, columns, index + 1) for index in range(count)]
        yield axes
        if title:
            figure.suptitle(title)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise UsageError(f"--plot {path} can't be written: {error.strerror}") from None


def series_style(index: int) -> dict[str, Any]:
    """Colour and dashes of the index-th series."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index // len(COLOURS) % len(LINES)],
    }


def use_log_scale(axes: "Axes", *, vertical: bool = False) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 of every decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    (axes.set_yscale if vertical else axes.set_xscale)("log")
    axis = axes.yaxis if vertical else axes.xaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))


def draw_cdf(
    axes: "Axes", series: Mapping[str, Sequence[float]], *, label: str, log: bool = True
) -> None:
    """Cumulative distributions: for each value, the share of all that are no larger.

    Args:
        axes: where to draw.
        series: values by name; empty ones are left out.
        label: of the horizontal axis, with its unit.
        log: a logarithmic horizontal axis; latencies span decades.
    """
    for index, (name, values) in enumerate(series.items()):
        if not values:
            continue
        ordered = sorted(values)
        shares = [(place + 1) / len(ordered) for place in range(len(ordered))]
        axes.step(ordered, shares, where="post", label=name, **series_style(index))
    if log and any(value > 0 for values in series.values() for value in values):
        use_log_scale(axes)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(label)
    axes.set_ylabel("share of all")
    if len(series) > 1:
        axes.legend()
