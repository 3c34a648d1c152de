"""A scaling law as tables, on the terminal and as a page: ``scaling-law.md`` beside ``.json`` and ``.png``."""

from __future__ import annotations

import statistics
from pathlib import Path

from rich.console import Console
from rich.text import Text

from sentcompress.files import storage_errors, write_atomically
from sentcompress.studies.presentation import heading, section
from sentcompress.studies.scaling_figure import draw
from sentcompress.studies.scaling_law import (
    TOKENS,
    Fit,
    Gap,
    ScalingLaw,
    fixed,
    is_ratio,
    mean_flops,
    millions,
    runs_of,
)
from sentcompress.studies.scaling_points import BASELINE, RunPoint, SeedFigures, SystemPoint
from sentcompress.table import Table, as_rich, number

NAME = "scaling-law"
"""Of the files, without the suffix."""
WARNING = (
    "nothing was measured at an extrapolated point. Lines in log-log bend (towards a floor, or when the text begins to "
    "repeat), and then the figure moves by far more than its interval."
)


def points_table(law: ScalingLaw) -> Table:
    """One row for each size and budget."""
    rows = []
    for point in law.points:
        first = runs_of(law, point)[0]
        ours, baseline = mean_flops(law, point)
        rows.append(
            [
                millions(point.backbone_parameters),
                f"{point.ours_tokens:,.0f}",
                str(len(point.seeds)),
                _over_seeds(point.ours),
                _over_seeds(point.twin),
                _over_seeds(point.ratio),
                _sizes(first.ours.parameters, first.ours.trainable_parameters),
                _sizes(first.twin.parameters, first.twin.trainable_parameters),
                number(first.ours.vae_tokens),
                f"{ours:.2e}",
                f"{baseline:.2e}",
                _decoding(first.ours, first.twin),
            ]
        )
    columns = [
        "backbone",
        "tokens",
        "seeds",
        "sentence model",
        "baseline",
        "ratio",
        "its weights (trained)",
        "baseline's (trained)",
        "SentenceVAE tokens",
        "its FLOPs",
        "baseline's",
        "decoding",
    ]
    notes = [
        f"Bits per byte; all models scored the same {law.heldout.bytes:,} bytes of {law.heldout.documents} held-out "
        "documents. Several seeds: mean (lowest to highest).",
        "Backbone: weights of the LLM's blocks without embedding tables, the same in both systems. Tokens: the "
        "graft's; the baseline read the same passages. The SentenceVAE's tokens come on top and have no counterpart.",
        "FLOPs of training, SentenceVAE included: 6 N D, each weight by the tokens it multiplies (the backbone of the "
        "sentence model reads one position per sentence), attention over positions and a teacher left out.",
        "Decoding: FLOPs and bytes read per token written, computed from shapes, as shares of the baseline's.",
    ]
    return Table("Points", columns, rows, notes)


def opponents_table(law: ScalingLaw) -> Table:
    """One row for each opponent at each size and budget."""
    rows = []
    for point in law.points:
        runs = runs_of(law, point)
        for name, opponent in point.opponents.items():
            first = runs[0].opponents[name]
            rows.append(
                [
                    millions(point.backbone_parameters),
                    f"{opponent.tokens:,.0f}",
                    str(len(point.seeds)),
                    name,
                    _over_seeds(opponent.bits_per_byte),
                    _over_seeds(opponent.ratio),
                    _sizes(first.parameters, first.trainable_parameters),
                    f"{statistics.mean(run.opponents[name].flops for run in runs):.2e}",
                    _decoding(first, runs[0].twin),
                ]
            )
    columns = [
        "backbone",
        "tokens",
        "seeds",
        "opponent",
        "bits/byte",
        "ratio",
        "its weights (trained)",
        "its FLOPs",
        "decoding",
    ]
    notes = [
        "Backbone: that of the sentence model it is compared with. Ratio: of the sentence model's bits per byte to the "
        "opponent's. Decoding: as above, as shares of the baseline's."
    ]
    return Table("Opponents", columns, rows, notes)


def _over_seeds(figures: SeedFigures) -> str:
    if len(figures.seeds) == 1:
        return f"{figures.mean:.4f}"
    return f"{figures.mean:.4f} ({figures.low:.4f} to {figures.high:.4f})"


def _decoding(system: SystemPoint, baseline: SystemPoint) -> str:
    """FLOPs and bytes of writing a token, as shares of the baseline's; ``-`` where they are not known."""
    own, whole = system.cost, baseline.cost
    if own is None or whole is None:
        return "-"
    return f"{own.flops / whole.flops:.0%}, {own.bytes / whole.bytes:.0%}"


def _sizes(total: int, trainable: int | None) -> str:
    return f"{millions(total)} ({'-' if trainable is None else millions(trainable)})"


def fits_table(law: ScalingLaw) -> Table:
    """One row for each fitted line of bits per byte."""
    rows = [
        [fit.curve, fit.against, fixed(fit.against, fit.at), *_fitted(fit)]
        for fit in law.fits
        if not is_ratio(fit.curve)
    ]
    return Table(
        "Bits per byte: L = A x^-alpha",
        ["system", "x", "at", *FIT_COLUMNS],
        rows,
        _interval_notes(law) if rows else [],
    )


FIT_COLUMNS = ["points", "alpha", "95% interval", "over seeds", "A", "residual"]


def _fitted(fit: Fit) -> list[str]:
    return [
        str(fit.points),
        f"{fit.exponent:.4f}",
        _interval(fit.interval),
        _interval(fit.seeds_interval),
        f"{fit.coefficient:.4g}",
        f"{100 * fit.residual:.2g}%",
    ]


def _interval(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"


def _interval_notes(law: ScalingLaw) -> list[str]:
    few = min(fit.points for fit in law.fits)
    notes = [
        "Intervals: Student's t from the residuals, with two degrees of freedom fewer than points."
        + (f" With {few} points they are wide." if few <= 4 else "")
    ]
    if any(fit.seeds_interval for fit in law.fits):
        notes.append(
            "Over seeds: a bootstrap that resamples the seeds of each point. It does not see bends, and is too "
            "narrow with few seeds."
        )
    return notes


def gaps_table(law: ScalingLaw) -> Table:
    """One row for each fitted line of the ratio."""
    rows = []
    for fit in filter(lambda fit: is_ratio(fit.curve), law.fits):
        first, last = (fit.coefficient * x**-fit.exponent for x in (fit.smallest, fit.largest))
        rows.append([fit.against, fixed(fit.against, fit.at), *_fitted(fit), f"{first:.4f}", f"{last:.4f}"])
    columns = ["x", "at", *FIT_COLUMNS, "at the smallest", "at the largest"]
    over = "baseline"
    if any(gap.to != BASELINE for gap in law.gaps):
        over = "baseline or opponent"
        columns.insert(0, "to")
        for row, gap in zip(rows, law.gaps, strict=True):
            row.insert(0, gap.to)
    notes = [
        f"Sentence model over {over}: a positive alpha closes the gap. The last two columns are the fit's."
    ]
    return Table("Ratio of bits per byte: does the gap close?", columns, rows, notes if rows else [])


def joint_table(law: ScalingLaw) -> Table:
    """One row for each system."""
    rows = []
    for fit in law.joint:
        inside = {name: _interval(fit.intervals.get(name)) for name in ("E", "alpha", "beta")}
        rows.append(
            [
                fit.system,
                str(fit.points),
                f"{fit.E:.4f}",
                inside["E"],
                f"{fit.A:.4g}",
                f"{fit.alpha:.4f}",
                inside["alpha"],
                f"{fit.B:.4g}",
                f"{fit.beta:.4f}",
                inside["beta"],
                f"{100 * fit.residual:.2g}%",
            ]
        )
    columns = ["system", "points", "E", "95%", "A", "alpha", "95%", "B", "beta", "95%", "residual"]
    notes = [
        "N: backbone parameters. D: training tokens. All terms are at least 0; intervals by linearization."
    ]
    if any(not fit.intervals for fit in law.joint):
        notes.append(
            "There are no intervals where the points do not determine all five parameters. Do not interpret these "
            "values."
        )
    return Table("Jointly: L = E + A N^-alpha + B D^-beta", columns, rows, notes)


def gap_line(gap: Gap) -> str:
    """One fitted ratio in a line."""
    kind = "tokens" if gap.against == TOKENS else "size"
    to = "" if gap.to == BASELINE else f", over {gap.to}"
    line = f"Against {kind}, at {fixed(gap.against, gap.at)}{to}: {gap.verdict}."
    if gap.times_beyond and gap.joint_limit is not None:
        line += f" By the joint laws, which have floors, the ratio tends to {gap.joint_limit:.3f}."
    return line


def caveats(law: ScalingLaw) -> list[str]:
    """The lines below the tables."""
    lines = [f"not fitted: {skipped.what}: {skipped.reason}" for skipped in law.skipped]
    return lines + [f"caution: {note}" for note in law.notes]


def render(law: ScalingLaw, console: Console) -> None:
    """Print the tables, what the ratio says, and what to be careful about."""
    for table in (
        points_table(law),
        opponents_table(law),
        fits_table(law),
        joint_table(law),
        gaps_table(law),
    ):
        if table.rows:
            console.print(as_rich(table))
    for gap in law.gaps:
        console.print(Text(gap_line(gap), style="bold red" if gap.times_beyond else "bold"), soft_wrap=True)
    if any(gap.times_beyond for gap in law.gaps):
        console.print(Text(f"WARNING: {WARNING}", style="bold red"), soft_wrap=True)
    for line in caveats(law):
        console.print(Text(line, style="yellow"), soft_wrap=True)


def markdown(law: ScalingLaw, picture: str) -> str:
    """The whole page: command, points, fits, and where each run comes from.

    Args:
        picture: file name of the plots, in the page's folder.
    """
    names = ", ".join(dict.fromkeys(run.honesty.recipe for run in law.runs))
    lines = heading(f"Scaling law: {names}", law.command)
    lines += [f"{law.created}, commit `{law.commit}`, {_versions(law)}.", ""]
    lines += [f"![Bits per byte and ratio against tokens and parameters]({picture})", ""]
    lines += section(points_table(law)) + section(opponents_table(law)) + section(fits_table(law))
    if law.joint:
        lines += section(joint_table(law))
    gaps = gaps_table(law)
    if gaps.rows:
        lines += section(gaps)
        lines += [f"- {gap_line(gap)}" for gap in law.gaps] + [""]
        if any(gap.times_beyond for gap in law.gaps):
            lines += [f"**Warning: {WARNING}**", ""]
    if below := caveats(law):
        lines += ["## Not fitted, and cautions", "", *(f"- {line}" for line in below), ""]
    columns = [
        "folder",
        "backbone",
        "tokens",
        "seed",
        "sentence model",
        "baseline",
        "ratio",
        "recipe",
        "commit",
        "device",
        "command",
    ]
    origins = Table("Where each run comes from", columns, [_origin(run) for run in law.runs])
    return "\n".join([*lines, *section(origins)][:-1])


def write(law: ScalingLaw, folder: Path) -> Path:
    """Write ``scaling-law.json``, ``.md`` and ``.png`` into a folder, which is made; return the page's path.

    Raises:
        InputError: matplotlib is not installed.
        StorageError: a file cannot be written.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    draw(law, folder / f"{NAME}.png")
    page = folder / f"{NAME}.md"
    write_atomically(page, markdown(law, f"{NAME}.png"))
    write_atomically(folder / f"{NAME}.json", law.model_dump_json(indent=1) + "\n")
    return page


def _versions(law: ScalingLaw) -> str:
    return ", ".join(f"{name} {version}" for name, version in law.packages.items())


def _origin(run: RunPoint) -> list[str]:
    h = run.honesty
    return [
        f"`{run.folder}`",
        f"{run.backbone}, {millions(run.backbone_parameters)}",
        f"{run.ours.training_tokens:,}",
        str(run.seed),
        f"{run.ours.bits_per_byte:.4f}",
        f"{run.twin.bits_per_byte:.4f}",
        f"{run.ratio:.4f}",
        f"{h.recipe} `{h.recipe_digest}`",
        f"`{h.commit}`",
        f"{h.device}, {h.dtype}, {h.threads} threads",
        f"`{h.command}`",
    ]
