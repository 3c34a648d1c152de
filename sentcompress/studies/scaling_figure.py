"""The picture of a scaling law: bits per byte and ratio, against tokens and parameters, in log-log. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sentcompress.benchmark.drawing import BASELINE_COLOR, SENTENCE_COLOR
from sentcompress.benchmark.measurement import SENTENCE_MODEL
from sentcompress.studies.presentation import (
    DARK,
    MARKERS,
    PALETTE,
    cycled,
    legend_line,
    legend_marker,
    save_png,
)
from sentcompress.studies.scaling_law import (
    PARAMETERS,
    RATIO,
    TOKENS,
    Against,
    ScalingLaw,
    curves,
    fixed,
    groups,
    is_ratio,
    on_curve,
    systems,
    x_of,
    y_of,
)
from sentcompress.studies.scaling_points import BASELINE, Point

COLORS = {SENTENCE_MODEL: SENTENCE_COLOR, BASELINE: BASELINE_COLOR, RATIO: DARK}
"""By curve; those of an opponent have one of the palette's."""


def draw(law: ScalingLaw, path: Path) -> None:
    """Write the picture as PNG: a column for each of tokens and parameters that takes more than one value.

    A system has a color, a size (or budget) a marker and a tint, lightest first. Whiskers reach from the lowest to the
    highest seed. Solid lines are the fits; thin dotted ones join points without a fit.

    Raises:
        InputError: matplotlib is not installed.
        StorageError: it cannot be written.
    """
    shown = systems(law.points)
    ratios = [curve for curve in curves(law.points) if is_ratio(curve)]
    label = "ratio of bits per byte" + (", to the baseline's" if ratios == [RATIO] else "")
    both: list[Against] = [TOKENS, PARAMETERS]
    wanted = [a for a in both if len({x_of(point, SENTENCE_MODEL, a) for point in law.points}) > 1]

    def panels(figure: Any) -> None:
        axes = figure.subplots(2, len(wanted), squeeze=False)
        for column, against in enumerate(wanted):
            _panel(axes[0, column], law, against, shown, "bits per byte")
            _panel(axes[1, column], law, against, ratios, label)
            axes[1, column].axhline(1.0, color="#dc2626", linewidth=1.0, linestyle="--", zorder=1)

    save_png(path, (6.4 * len(wanted), 8.2), panels)


def _panel(axes: Any, law: ScalingLaw, against: Against, drawn: Sequence[str], label: str) -> None:
    lines = groups(law.points, against)
    for number, (at, members) in enumerate(lines.items()):
        for place, curve in enumerate(drawn):
            color = _tint(_color(curve, place), number, len(lines))
            if through := on_curve(members, curve):
                _line(axes, law, against, at, through, curve, color, cycled(MARKERS, number))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("training tokens" if against == TOKENS else "backbone parameters")
    axes.set_ylabel(label)
    _decimal_ticks(axes)
    axes.margins(x=0.08, y=0.12)
    _legend(axes, against, list(lines), drawn)


def _color(curve: str, place: int) -> str:
    """Color of a curve, by its place among those of a panel; an opponent's ratio has the color of its bits per byte."""
    opponent = place - (1 if is_ratio(curve) else 2)
    return COLORS.get(curve) or cycled(PALETTE[2:], opponent)


def _line(
    axes: Any,
    law: ScalingLaw,
    against: Against,
    at: int,
    members: Sequence[Point],
    curve: str,
    color: tuple[float, ...],
    marker: str,
) -> None:
    x = np.array([x_of(point, curve, against) for point in members])
    figures = [y_of(point, curve) for point in members]
    y = np.array([figure.mean for figure in figures])
    whiskers = [[f.mean - f.low for f in figures], [f.high - f.mean for f in figures]]
    axes.errorbar(
        x, y, yerr=whiskers, fmt=marker, color=color, markersize=6, capsize=3, elinewidth=1.0, zorder=3
    )
    fit = next((f for f in law.fits if (f.curve, f.against, f.at) == (curve, against, at)), None)
    if fit is None:
        axes.plot(x, y, color=color, linewidth=0.8, linestyle=":", zorder=2)
        return
    along = np.geomspace(fit.smallest, fit.largest, 50)
    axes.plot(along, fit.coefficient * along**-fit.exponent, color=color, linewidth=1.6, zorder=2)


def _tint(color: str, number: int, count: int) -> tuple[float, ...]:
    """The color itself for the last of ``count``, lighter ones before it."""
    from matplotlib.colors import to_rgb

    white = 0.55 * (1 - (number + 1) / count)
    return tuple(white + (1 - white) * part for part in to_rgb(color))


def _decimal_ticks(axes: Any) -> None:
    """Labels such as 1.62, not 1.62 x 10^0: the figures span far less than a decade."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, min_n_ticks=3))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(axes: Any, against: Against, values: Sequence[int], drawn: Sequence[str]) -> None:
    names = {RATIO: "ratio to the baseline"}
    entries = [legend_line(_color(curve, i), names.get(curve, curve)) for i, curve in enumerate(drawn)]
    if drawn == [RATIO]:
        entries = []
    for i, value in enumerate(values):
        label = f"backbone of {fixed(against, value)}" if against == TOKENS else fixed(against, value)
        entries.append(legend_marker(cycled(MARKERS, i), _tint(DARK, i, len(values)), label))
    axes.legend(
        handles=entries,
        fontsize=8,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        ncols=3,
        columnspacing=1.2,
    )
