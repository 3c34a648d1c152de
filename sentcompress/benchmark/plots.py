"""The report's figures, drawn with matplotlib as SVG text. No torch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from sentcompress.benchmark.records import BY, By, Results
from sentcompress.benchmark.rows import breakdown
from sentcompress.errors import InputError

OURS, TWIN, BACKBONE, GREY = "#2563eb", "#d97706", "#64748b", "#cbd5e1"
COLORS = {
    "sentence model": OURS,
    "baseline, equal data": TWIN,
    "backbone, as it came": BACKBONE,
    "backbone, KV cache": BACKBONE,
    "backbone": BACKBONE,
}
STYLE = {
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


def figures(results: Results) -> dict[str, str]:
    """SVG documents by name; only those there is something to draw for.

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
    drawn: dict[str, str] = {}
    # Figures are drawn without pyplot: no global state, no display, nothing to close.
    with matplotlib.rc_context(STYLE):
        for name, (wanted, draw, size) in _FIGURES.items():
            if not wanted(results):
                continue
            figure = Figure(figsize=size, layout="constrained")
            draw(results, figure)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            drawn[name] = buffer.getvalue()
    return drawn


def _bars(axes: Any, names: Sequence[str], values: Sequence[float], labels: Sequence[str]) -> None:
    places = np.arange(len(names))
    bars = axes.barh(places, values, color=[COLORS.get(name, GREY) for name in names], height=0.62)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.bar_label(bars, labels=labels, padding=4, color="#334155")
    axes.margins(x=0.14)


def _quality(results: Results, figure: Any) -> None:
    axes = figure.subplots()
    scores = results.quality
    _bars(
        axes,
        [score.system for score in scores],
        [score.bits_per_byte for score in scores],
        [f"{score.bits_per_byte:.3f}" for score in scores],
    )
    axes.set_title("Bits per byte on the same held-out bytes (lower is better)")
    axes.set_xlabel("bits per byte")


def _by(by: By) -> Any:
    """Draws a breakdown: bits per byte by bucket for each system, and where the gap to the twin is."""

    def draw(results: Results, figure: Any) -> None:
        twin, rows = breakdown(results.quality, by)
        buckets = [row for row in rows[:-1] if row.bytes]
        places = np.arange(len(buckets))
        left, *right = figure.subplots(
            1, 2 if twin else 1, squeeze=False, width_ratios=[3, 2][: 2 if twin else 1]
        )[0]
        styles = iter([":", "--", "-."])  # of the systems that have no colour of their own
        for depth, system in enumerate(rows[-1].bits):
            color = COLORS.get(system, GREY)
            left.plot(
                places,
                [row.bits[system] for row in buckets],
                color=color,
                linestyle="-" if color != GREY else next(styles, ":"),
                linewidth=1.6,
                marker="o",
                markersize=3.5,
                label=system,
                zorder=10 - depth,
            )
        left.set_xticks(places, [row.label for row in buckets], rotation=45)
        left.set_title(f"Bits per byte by {by}")
        left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3)
        for axes in right:
            names = [row.label for row in rows[:-1]]
            gaps = [row.gap for row in rows[:-1]]
            axes.bar(np.arange(len(names)), gaps, color=OURS, width=0.7)
            axes.set_xticks(np.arange(len(names)), names, rotation=45, ha="right")
            axes.axhline(0, color="#94a3b8", linewidth=0.8)
            axes.set_title("Where the gap is (bits over all bytes)")
            axes.grid(axis="x", visible=False)

    return draw


def _curves(results: Results, figure: Any) -> None:
    stages = list(dict.fromkeys(curve.stage for curve in results.curves if curve.name == "loss"))
    all_axes = figure.subplots(1, len(stages), squeeze=False)[0]
    for axes, stage in zip(all_axes, stages, strict=True):
        for curve in results.curves:
            if curve.stage == stage and curve.name == "loss":
                steps, values = zip(*curve.points, strict=True)
                axes.plot(steps, values, color=OURS if stage != "baseline" else TWIN, linewidth=1.6)
        axes.set_title({"vae": "SentenceVAE", "graft": "graft", "baseline": "baseline"}.get(stage, stage))
        axes.set_xlabel("step")
    all_axes[0].set_ylabel("training loss")


def _speed(results: Results, figure: Any) -> None:
    assert results.speed is not None
    axes = figure.subplots()
    runs = results.speed.runs
    several = len({run.batch_size for run in runs}) > 1
    names = [run.system for run in runs]
    _bars(
        axes,
        names,
        [run.output_tokens_per_second for run in runs],
        [
            f"{run.output_tokens_per_second:,.0f}"
            + (f"  ({run.ratio:.2f}x)" if run.ratio is not None else "")
            for run in runs
        ],
    )
    if several:
        axes.set_yticks(
            np.arange(len(runs)),
            [f"{name}, batch {run.batch_size}" for name, run in zip(names, runs, strict=True)],
        )
    axes.set_title("Output tokens per second")
    axes.set_xlabel("tokens/s")


def _memory(results: Results, figure: Any) -> None:
    axes = figure.subplots()
    for report in results.memory:
        tokens, sizes = np.array(report.series, dtype=np.float64).T
        kwargs = {"color": COLORS.get(report.system, GREY)}
        axes.plot(tokens, sizes / 2**20, linewidth=1.8, label=report.system, **kwargs)
        axes.plot(
            tokens, tokens * report.cache_bytes_per_token / 2**20, linestyle=":", linewidth=1.2, **kwargs
        )
    axes.set_title("Memory beyond the weights against length of text")
    axes.set_xlabel("tokens of text (dotted: the cache alone, from its tensors)")
    axes.set_ylabel("MiB allocated at the most")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left")


def _histogram(results: Results, figure: Any) -> None:
    assert results.data is not None
    axes = figure.subplots()
    lengths, counts = zip(*results.data.histogram, strict=True)
    axes.bar(lengths, counts, width=0.85, color=OURS)
    mean = results.data.mean_sentence_tokens
    axes.axvline(mean, color=TWIN, linewidth=1.4)
    axes.annotate(
        f"mean {mean:.1f}", (mean, max(counts)), xytext=(5, -4), textcoords="offset points", color=TWIN
    )
    axes.set_title("Tokens of a held-out sentence")
    axes.set_xlabel("tokens")
    axes.set_ylabel("sentences")
    axes.grid(axis="x", visible=False)


_FIGURES: dict[str, tuple[Any, Any, tuple[float, float]]] = {
    "quality": (lambda r: bool(r.quality), _quality, (7.6, 2.9)),
    "curves": (lambda r: any(c.name == "loss" and c.points for c in r.curves), _curves, (9.4, 2.9)),
    "speed": (lambda r: r.speed is not None and bool(r.speed.runs), _speed, (7.6, 2.6)),
    "memory": (lambda r: any(m.series for m in r.memory), _memory, (7.6, 3.1)),
    "data": (lambda r: r.data is not None, _histogram, (7.6, 2.7)),
    **{
        f"by {by}": (lambda r, by=by: any(by in score.by for score in r.quality), _by(by), (10.4, 3.2))
        for by in BY
    },
}
