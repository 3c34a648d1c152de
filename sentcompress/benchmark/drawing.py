"""The look of figures, and how they become SVG text. No torch."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sentcompress.benchmark.measurement import BASELINES, SENTENCE_MODEL
from sentcompress.errors import InputError

SENTENCE_COLOR, BASELINE_COLOR, BACKBONE_COLOR, GREY = "#2563eb", "#d97706", "#64748b", "#cbd5e1"
COLORS = {
    SENTENCE_MODEL: SENTENCE_COLOR,
    BASELINES[0]: BASELINE_COLOR,
    BASELINES[1]: BACKBONE_COLOR,
    "backbone, KV cache": BACKBONE_COLOR,
    "backbone": BACKBONE_COLOR,
}
"""By system; others are grey."""
MATPLOTLIB_STYLE = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#334155",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "axes.axisbelow": True,
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "sentcompress",
}
"""Settings of matplotlib."""


def svg(draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    """What ``draw`` draws on a matplotlib figure, as an SVG document.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "the report's figures need matplotlib", fix="pip install 'sentcompress[bench]'"
        ) from None
    # Figures are drawn without pyplot: no global state, no display, nothing to close.
    with matplotlib.rc_context(MATPLOTLIB_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def bars(axes: Any, systems: Sequence[str], values: Sequence[float], labels: Sequence[str]) -> None:
    """Horizontal bars in the systems' colors, each with a label behind it."""
    heights = np.arange(len(systems))
    drawn = axes.barh(heights, values, color=[COLORS.get(name, GREY) for name in systems], height=0.62)
    axes.set_yticks(heights, systems)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.bar_label(drawn, labels=labels, padding=4, color="#334155")
    axes.margins(x=0.14)
