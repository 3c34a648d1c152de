"""What the pictures and pages of all studies have in common: style, markers, legends, files, cautions. No torch."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sentcompress.benchmark.drawing import MATPLOTLIB_STYLE
from sentcompress.benchmark.measurements.quality import Quality
from sentcompress.benchmark.results import Results
from sentcompress.errors import InputError
from sentcompress.files import storage_errors
from sentcompress.recipe.training_sections import EQUAL_COST
from sentcompress.table import Table, as_markdown

MARKERS = "osD^vP*X"
PALETTE = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#64748b", "#be185d")
DARK, NEUTRAL = "#334155", "#475569"
Color = str | tuple[float, ...]
T = TypeVar("T")


def require_matplotlib() -> None:
    """Raises InputError where it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("the plots need matplotlib", fix="pip install 'sentcompress[bench]'") from None


def save_png(path: Path, size: tuple[float, float], draw: Callable[[Any], None]) -> None:
    """Write what ``draw`` draws on a matplotlib figure of so many inches as a PNG file.

    Raises:
        InputError: matplotlib is not installed.
        StorageError: the file cannot be written.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(MATPLOTLIB_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=140, metadata={"Software": None})
    with storage_errors(path.parent):
        path.write_bytes(buffer.getvalue())


def cycled(items: Sequence[T], index: int) -> T:
    """An item of a sequence that starts again at its end."""
    return items[index % len(items)]


def legend_marker(marker: str, color: Color, label: str) -> Any:
    """An entry of a legend: a marker without a line."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="", marker=marker, color=color, label=label)


def legend_line(color: Color, label: str) -> Any:
    """An entry of a legend: a line without a marker."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linewidth=2, label=label)


def cost_cautions(results: Sequence[Results]) -> list[str]:
    """Names the opponents that do not cost what the sentence models beside them cost."""
    shares: dict[str, list[float]] = {}
    for result in results:
        for score in Quality.of(result):
            if score.cost_share is not None:
                shares.setdefault(score.system, []).append(score.cost_share)
    return [
        f"{system} is not of equal cost: {min(found):.2f} to {max(found):.2f} times the sentence model's"
        for system, found in shares.items()
        if max(abs(share - 1) for share in found) > EQUAL_COST
    ]


def heading(title: str, command: str) -> list[str]:
    """The first lines of a page: its title, and the command that made it."""
    return [f"# {title}", "", "```bash", command, "```", ""]


def section(table: Table) -> list[str]:
    """Lines of a page with a table's title, rows and notes; none for a table without rows."""
    if not table.rows:
        return []
    return [f"## {table.title}", "", *as_markdown(table.columns, table.rows), "", *table.notes, ""]
