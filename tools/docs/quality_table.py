"""Prints the table of docs/results/quality.md: ``python tools/docs/quality_table.py LABEL RUN [RUN ...]``."""

from __future__ import annotations

import sys
from pathlib import Path

from sentcompress.studies.scaling_law import ScalingLaw, runs_of, scaling_law
from sentcompress.studies.scaling_points import Point, SeedFigures
from sentcompress.studies.scaling_report import decoding
from sentcompress.table import as_markdown

COLUMNS = (
    "backbone",
    "tokens",
    "seeds",
    "sentence model",
    "baseline",
    "ratio",
    "decoding",
    "recipe",
    "commit",
)


def row(label: str, law: ScalingLaw, point: Point) -> list[str]:
    """One size at one budget."""
    runs = runs_of(law, point)
    if runs[0].ours.cost is None or runs[0].twin.cost is None:
        sys.exit(
            f"{runs[0].folder}: no cost of decoding; measure again: sentcompress bench quality {runs[0].folder}"
        )
    return [
        f"{runs[0].twin.parameters / 1e6:.1f} M{label}",
        f"{point.ours_tokens:,.0f}",
        ", ".join(map(str, point.seeds)),
        over_seeds(point.ours),
        over_seeds(point.twin),
        over_seeds(point.ratio),
        decoding(runs[0].ours, runs[0].twin),
        ", ".join(dict.fromkeys(f"`{run.honesty.recipe_digest}`" for run in runs)),
        ", ".join(dict.fromkeys(f"`{run.honesty.commit}`" for run in runs)),
    ]


def over_seeds(figure: SeedFigures) -> str:
    """Mean, and half of what lies between the lowest and the highest seed."""
    if len(figure.seeds) == 1:
        return f"{figure.mean:.4f}"
    return f"{figure.mean:.4f} ± {(figure.high - figure.low) / 2:.4f}"


def main() -> None:
    law = scaling_law([Path(name) for name in sys.argv[2:]])
    print("\n".join(as_markdown(COLUMNS, [row(sys.argv[1], law, point) for point in law.points])))


if __name__ == "__main__":
    main()
