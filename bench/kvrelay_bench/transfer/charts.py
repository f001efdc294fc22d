"""Rates over message sizes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kvrelay.cli.units import format_size
from kvrelay_bench.plot import panels, series_style, use_log_scale


def draw(
    path: Path, sizes: Sequence[int], rates: Mapping[str, Sequence[float | None]], *, title: str
) -> None:
    """One line for each rate.

    Args:
        path: where to write.
        sizes: of the messages, in bytes, ascending.
        rates: by name, for each size; None where it was not measured. 10^9 bytes a second.
        title: above the picture.
    """
    with panels(path, 1, title=title) as (axes,):
        for index, (name, values) in enumerate(rates.items()):
            points = [(x, y) for x, y in zip(sizes, values, strict=True) if y is not None]
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                marker="o",
                markersize=3,
                label=name,
                **series_style(index),
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(sizes), [format_size(size) for size in sizes])
        axes.minorticks_off()
        use_log_scale(axes, vertical=True)
        axes.set_xlabel("payload of a message")
        axes.set_ylabel("rate (GB/s, one way)")
        axes.legend(fontsize=7, ncols=2)
