"""The picture of a sweep: bits per byte against reconstruction, and against speed. No torch."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sentcompress.benchmark.drawing import STYLE
from sentcompress.errors import InputError
from sentcompress.files import storage_errors
from sentcompress.studies.sweep_results import CellFigures, CellRow, SweepResults

COLORS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#64748b", "#be185d")
MARKERS = "osD^vP*X"
Figure = Callable[[CellFigures], float | None]


def require_matplotlib() -> None:
    """Raises InputError where it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("the plot needs matplotlib", fix="pip install 'sentcompress[bench]'") from None


def draw(sweep: SweepResults, path: Path) -> bool:
    """Write the picture as PNG; False where no cell has figures to draw.

    Points have the colour of their first axis and the shape of their second; the number is the row of the table.

    Raises:
        InputError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    panels: list[tuple[str, Figure]] = [
        ("tokens that come back right, %", lambda f: _percent(f.token_accuracy)),
        # The ratio, not tokens/s: it was taken side by side, whatever else the machine did in that cell's time.
        ("output speed over the backbone's own generate", lambda f: f.speed_ratio),
    ]
    rows = list(enumerate(sweep.ranked(), 1))
    wanted = [(title, figure) for title, figure in panels if _points(rows, figure)]
    if not wanted:
        return False
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(5.4 * len(wanted), 4.6), layout="constrained")
        for axes, (title, figure) in zip(
            canvas.subplots(1, len(wanted), squeeze=False)[0], wanted, strict=True
        ):
            _scatter(axes, sweep, rows, figure)
            axes.set_xlabel(title)
            axes.set_ylabel("bits per byte (lower is better)")
        _legend(canvas, sweep)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png", dpi=140, metadata={"Software": None})
    with storage_errors(path.parent):
        path.write_bytes(buffer.getvalue())
    return True


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _points(rows: list[tuple[int, CellRow]], figure: Figure) -> list[tuple[int, CellRow, float, float]]:
    found = []
    for place, row in rows:
        x = figure(row.figures) if row.figures else None
        if row.figures and x is not None and row.figures.bits_per_byte is not None:
            found.append((place, row, x, row.figures.bits_per_byte))
    return found


def _scatter(axes: Any, sweep: SweepResults, rows: list[tuple[int, CellRow]], figure: Figure) -> None:
    for place, row, x, y in _points(rows, figure):
        color, marker = _look(sweep, row)
        axes.scatter([x], [y], color=color, marker=marker, s=46, linewidths=0, zorder=3)
        axes.annotate(
            str(place), (x, y), xytext=(5, 3), textcoords="offset points", fontsize=8, color="#334155"
        )
    axes.margins(0.1)


def _values(sweep: SweepResults, axis: int) -> list[str]:
    return list(dict.fromkeys(row.values[axis] for row in sweep.cells))


def _look(sweep: SweepResults, row: CellRow) -> tuple[str, str]:
    color = COLORS[_values(sweep, 0).index(row.values[0]) % len(COLORS)]
    marker = MARKERS[_values(sweep, 1).index(row.values[1]) % len(MARKERS)] if len(row.values) > 1 else "o"
    return color, marker


def _legend(canvas: Any, sweep: SweepResults) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", marker="o", color=COLORS[i % len(COLORS)], label=value)
        for i, value in enumerate(_values(sweep, 0))
    ]
    if len(sweep.axes) > 1:
        handles += [
            Line2D([], [], linestyle="", marker=MARKERS[i % len(MARKERS)], color="#475569", label=value)
            for i, value in enumerate(_values(sweep, 1))
        ]
    canvas.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=9)
