"""A scaling law as tables: the same cells on the terminal and in ``scaling-law.md``. No torch."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from sentcompress.studies.scaling_law import (
    RATIO,
    TOKENS,
    Fit,
    Gap,
    ScalingLaw,
    fixed,
    mean_flops,
    millions,
    runs_of,
)
from sentcompress.studies.scaling_points import RunPoint, Spread
from sentcompress.table import Table, as_markdown, as_rich, number

WARNING = (
    "An extrapolation is an extrapolation: nothing was measured there. Lines in log-log bend (towards a floor, or when "
    "the text begins to repeat), and the figure moves by far more than its interval when they do."
)


def points_table(law: ScalingLaw) -> Table:
    """A row a size and budget."""
    rows = []
    for point in law.points:
        first = runs_of(law, point)[0]
        ours, twin = mean_flops(law, point)
        rows.append(
            [
                millions(point.backbone_parameters),
                f"{point.ours_tokens:,.0f}",
                str(len(point.seeds)),
                _spread(point.ours),
                _spread(point.twin),
                _spread(point.ratio),
                _sizes(first.ours.parameters, first.ours.trainable_parameters),
                _sizes(first.twin.parameters, first.twin.trainable_parameters),
                number(first.ours.vae_tokens),
                f"{ours:.2e}",
                f"{twin:.2e}",
                decoding(first),
            ]
        )
    columns = [
        "backbone",
        "tokens",
        "seeds",
        "sentence model",
        "baseline",
        "ratio",
        "its weights (learn)",
        "baseline's (learn)",
        "SentenceVAE tokens",
        "its FLOPs",
        "baseline's",
        "decoding",
    ]
    notes = [
        f"Bits per byte; all scored the same {law.heldout.bytes:,} bytes of {law.heldout.documents} held-out "
        "documents. Several seeds: mean (lowest to highest).",
        "Backbone: weights of the LLM's blocks without embedding tables, the same in both systems. Tokens: of the "
        "graft; the baseline read the same passages. The SentenceVAE's tokens come on top and have no counterpart.",
        "FLOPs of training, SentenceVAE included: 6 N D, each weight by the tokens it multiplies (the backbone of the "
        "sentence model reads a position a sentence), attention over positions and a teacher left out.",
        "Decoding: FLOPs and bytes read to write a token, computed from shapes, as shares of the baseline's.",
    ]
    return Table("Points", columns, rows, notes)


def _spread(spread: Spread) -> str:
    if len(spread.seeds) == 1:
        return f"{spread.mean:.4f}"
    return f"{spread.mean:.4f} ({spread.low:.4f} to {spread.high:.4f})"


def decoding(run: RunPoint) -> str:
    """FLOPs and bytes of writing a token, as shares of the twin's; ``-`` where they are not known."""
    ours, twin = run.ours.cost, run.twin.cost
    return f"{ours.flops / twin.flops:.0%}, {ours.bytes / twin.bytes:.0%}" if ours and twin else "-"


def _sizes(total: int, learn: int | None) -> str:
    return f"{millions(total)} ({'-' if learn is None else millions(learn)})"


def fits_table(law: ScalingLaw) -> Table:
    """A row a fitted line of bits per byte."""
    rows = [
        [fit.curve, fit.against, fixed(fit.against, fit.at), *_fitted(fit)]
        for fit in law.fits
        if fit.curve != RATIO
    ]
    return Table(
        "Bits per byte: L = A x^-alpha",
        ["system", "x", "at", *FITTED],
        rows,
        _interval_notes(law) if rows else [],
    )


FITTED = ["points", "alpha", "95% interval", "over seeds", "A", "residual"]


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
        "Intervals: Student's t from the residuals, two degrees of freedom less than points"
        + (f"; with {few} points they are wide, and rightly so." if few <= 4 else ".")
    ]
    if any(fit.seeds_interval for fit in law.fits):
        notes.append(
            "Over seeds: bootstrap, the seeds of each point drawn anew; it knows nothing of bends, and is too narrow "
            "with few seeds."
        )
    return notes


def gaps_table(law: ScalingLaw) -> Table:
    """A row a fitted line of the ratio."""
    rows = []
    for fit in law.fits:
        if fit.curve == RATIO:
            first, last = (fit.coefficient * x**-fit.exponent for x in (fit.smallest, fit.largest))
            rows.append(
                [fit.against, fixed(fit.against, fit.at), *_fitted(fit), f"{first:.4f}", f"{last:.4f}"]
            )
    columns = ["x", "at", *FITTED, "at the smallest", "at the largest"]
    notes = ["Sentence model over baseline: a positive alpha closes the gap. The last columns are the fit's."]
    return Table("Ratio of bits per byte: does the gap close?", columns, rows, notes if rows else [])


def joint_table(law: ScalingLaw) -> Table:
    """A row a system."""
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
    notes = ["N in backbone parameters, D in training tokens, no part negative; intervals by linearisation."]
    if any(not fit.intervals for fit in law.joint):
        notes.append(
            "Without intervals: these points do not determine all five parameters, so read nothing into them."
        )
    return Table("Jointly: L = E + A N^-alpha + B D^-beta", columns, rows, notes)


def gap_line(gap: Gap) -> str:
    """What one fitted ratio says, in a line."""
    kind = "tokens" if gap.against == TOKENS else "size"
    line = f"Against {kind}, at {fixed(gap.against, gap.at)}: {gap.verdict}."
    if gap.times_beyond and gap.joint_limit is not None:
        line += f" By the joint laws, which have floors, the ratio tends to {gap.joint_limit:.3f}."
    return line


def caveats(law: ScalingLaw) -> list[str]:
    """What stands below the tables."""
    lines = [f"not fitted: {skipped.what}: {skipped.reason}" for skipped in law.skipped]
    return lines + [f"careful: {note}" for note in law.notes]


def render(law: ScalingLaw, console: Console) -> None:
    """Print the tables, what the ratio says, and what to be careful about."""
    for table in (points_table(law), fits_table(law), joint_table(law), gaps_table(law)):
        if table.rows:
            console.print(as_rich(table))
    for gap in law.gaps:
        console.print(Text(gap_line(gap), style="bold red" if gap.times_beyond else "bold"), soft_wrap=True)
    if any(gap.times_beyond for gap in law.gaps):
        console.print(Text(f"WARNING: {WARNING}", style="bold red"), soft_wrap=True)
    for line in caveats(law):
        console.print(Text(line, style="yellow"), soft_wrap=True)


def markdown(law: ScalingLaw, picture: str) -> str:
    """A page with all of it: command, points, fits, and where each run comes from.

    Args:
        picture: file name of the plots, beside the page.
    """
    names = ", ".join(dict.fromkeys(run.honesty.recipe for run in law.runs))
    lines = [f"# Scaling law: {names}", "", "```bash", law.command, "```", ""]
    lines += [f"{law.created}, commit `{law.commit}`, {_versions(law)}.", ""]
    lines += [f"![Bits per byte and ratio against tokens and parameters]({picture})", ""]
    lines += _section(points_table(law)) + _section(fits_table(law))
    if law.joint:
        lines += _section(joint_table(law))
    gaps = gaps_table(law)
    if gaps.rows:
        lines += _section(gaps)
        lines += [f"- {gap_line(gap)}" for gap in law.gaps] + [""]
        if any(gap.times_beyond for gap in law.gaps):
            lines += [f"**Warning. {WARNING}**", ""]
    if below := caveats(law):
        lines += ["## Not fitted, and to be careful about", "", *(f"- {line}" for line in below), ""]
    lines += ["## Where each run comes from", ""]
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
    ]
    lines += as_markdown([*columns, "device", "command"], [_origin(run) for run in law.runs])
    return "\n".join(lines) + "\n"


def _section(table: Table) -> list[str]:
    if not table.rows:
        return []
    return [f"## {table.title}", "", *as_markdown(table.columns, table.rows), "", *table.notes, ""]


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
