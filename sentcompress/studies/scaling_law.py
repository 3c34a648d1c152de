"""``scaling-law.json``: the points, the fits through them, and what they say about the gap to the baseline."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from sentcompress.benchmark.measurement import OPPONENT_SYSTEM, SENTENCE_MODEL
from sentcompress.benchmark.results import Skipped
from sentcompress.provenance import Record, command, commit, packages
from sentcompress.studies.power_laws import (
    CONFIDENCE,
    JOINT_PARAMETERS,
    LEAST_POINTS,
    Interval,
    Line,
    fit_line,
    fit_surface,
    seed_interval,
)
from sentcompress.studies.scaling_points import (
    BASELINE,
    Heldout,
    Point,
    RunPoint,
    SeedFigures,
    gather,
)

SCHEMA_VERSION = 1
Against = Literal["training tokens", "backbone parameters"]
TOKENS: Against = "training tokens"
PARAMETERS: Against = "backbone parameters"
RATIO = "ratio"
"""The curve of the sentence model's bits per byte over the baseline's; begins the names of those over an opponent's."""


class Fit(Record):
    """``y = coefficient * x^-exponent`` through the points of one size or one budget."""

    curve: str
    """One of :func:`figures_of`."""
    against: Against
    at: int
    """The backbone parameters, or the tokens of the budget, that the points have in common."""
    points: int
    smallest: float
    largest: float
    """Of the x that were measured."""
    coefficient: float
    exponent: float
    interval: Interval
    """95% of the exponent, from the residuals: Student's t with ``points - 2`` degrees of freedom."""
    seeds_interval: Interval | None
    """95% of the exponent, from a bootstrap over the seeds of each point; None unless every point has two or more."""
    residual: float
    """Standard deviation of the residuals in logarithms: a share of y, when small."""


class Gap(Record):
    """Where a fitted ratio is 1.00: from there on the sentence model has fewer bits per byte, or no longer has."""

    to: str = BASELINE
    """The system whose bits per byte the sentence model's are divided by."""
    against: Against
    at: int
    crossing: float | None
    """Tokens or parameters; None where the fit has none ahead of what was measured or within it."""
    interval: tuple[float | None, float | None] | None
    """95%, by Fieller; None at an end that is unbounded."""
    times_beyond: float | None
    """The crossing over the largest x measured, where it lies beyond; None where it does not."""
    joint_limit: float | None = None
    """What the ratio tends to by the joint laws of both systems, which have floors where lines have none; None
    without them."""
    verdict: str


class Joint(Record):
    """``L = E + A N^-alpha + B D^-beta`` of one system, N in backbone parameters, D in training tokens."""

    system: str
    points: int
    E: float
    A: float
    alpha: float
    B: float
    beta: float
    intervals: dict[str, Interval]
    """95% of E, alpha and beta, by linearisation; empty where the points do not determine all five parameters."""
    residual: float
    """Relative standard deviation of the residuals."""


class ScalingLaw(Record):
    """Everything that is known from some runs about the scaling of all systems."""

    schema_version: int = SCHEMA_VERSION
    command: str
    commit: str
    created: str
    """UTC."""
    packages: dict[str, str]
    confidence: float = CONFIDENCE
    heldout: Heldout
    runs: list[RunPoint]
    points: list[Point]
    fits: list[Fit]
    gaps: list[Gap]
    joint: list[Joint]
    skipped: list[Skipped]
    """What was not fitted, and why."""
    notes: list[str]
    """Why figures may not be comparable."""


def scaling_law(sources: Sequence[Path]) -> ScalingLaw:
    """Fit the scaling of the sentence model, of its equal-data baseline and of its opponents over finished runs.

    Args:
        sources: folders of a finished run each, or of several runs (a sweep); or an earlier ``scaling-law.json``.

    Raises:
        InputError: naming the folder that cannot be used, and why (:func:`gather`).
    """
    found = gather(sources)
    law = ScalingLaw(
        command=command(),
        commit=commit(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        packages=packages(),
        heldout=found.heldout,
        runs=found.runs,
        points=found.points,
        fits=[],
        gaps=[],
        joint=[],
        skipped=[],
        notes=found.notes,
    )
    for against in (TOKENS, PARAMETERS):
        _fit_lines(law, against)
    _fit_joint(law)
    for gap in law.gaps:
        gap.joint_limit = _limit(law.joint, gap)
    return law


def groups(points: Sequence[Point], against: Against) -> dict[int, list[Point]]:
    """Points with one size in common (against tokens), or one budget (against parameters)."""
    found: dict[int, list[Point]] = {}
    for point in points:
        found.setdefault(point.backbone_parameters if against == TOKENS else point.budget, []).append(point)
    return found


def x_of(point: Point, curve: str, against: Against) -> float:
    """Where a point stands on an axis; a token-level model's tokens are its own, which are a few more or fewer."""
    if against == PARAMETERS:
        return float(point.backbone_parameters)
    own = {BASELINE: point.twin_tokens}
    own |= {OPPONENT_SYSTEM + name: opponent.tokens for name, opponent in point.opponents.items()}
    return own.get(curve, point.ours_tokens)


def figures_of(point: Point) -> dict[str, SeedFigures]:
    """What is fitted: bits per byte of each system, and the ratio of the sentence model's to each of the others'."""
    figures = {SENTENCE_MODEL: point.ours, BASELINE: point.twin, RATIO: point.ratio}
    for name, opponent in point.opponents.items():
        system = OPPONENT_SYSTEM + name
        figures |= {system: opponent.bits_per_byte, ratio_to(system): opponent.ratio}
    return figures


def y_of(point: Point, curve: str) -> SeedFigures:
    """One of :func:`figures_of`."""
    return figures_of(point)[curve]


def curves(points: Sequence[Point]) -> list[str]:
    """Names of the curves that some of the points are on."""
    return list(dict.fromkeys(curve for point in points for curve in figures_of(point)))


def systems(points: Sequence[Point]) -> list[str]:
    """Those of the curves that are not a ratio."""
    return [curve for curve in curves(points) if not is_ratio(curve)]


def on_curve(points: Sequence[Point], curve: str) -> list[Point]:
    """The points that a curve goes through."""
    return [point for point in points if curve in figures_of(point)]


def ratio_to(system: str) -> str:
    """Name of the curve of the sentence model's bits per byte over another system's."""
    return RATIO if system == BASELINE else f"{RATIO} to {system}"


def is_ratio(curve: str) -> bool:
    """Whether a curve is that of a ratio."""
    return curve.startswith(RATIO)


def fixed(against: Against, value: int) -> str:
    """What the points of a line have in common, in words."""
    return f"{millions(value)} parameters" if against == TOKENS else f"{value:,} tokens"


def millions(number: float) -> str:
    """Three figures: ``3.16 M``."""
    return f"{number / 1e6:.3g} M" if number < 1e9 else f"{number / 1e9:.3g} B"


def _fit_lines(law: ScalingLaw, against: Against) -> None:
    kind = "budgets" if against == TOKENS else "sizes"
    for at, members in groups(law.points, against).items():
        if len(members) < LEAST_POINTS:
            law.skipped.append(
                Skipped(
                    part="scaling-law",
                    what=f"a line against {against} at {fixed(against, at)}",
                    reason=f"{len(members)} of at least {LEAST_POINTS} {kind}",
                )
            )
            continue
        for curve in curves(members):
            through = on_curve(members, curve)
            if len(through) < LEAST_POINTS:
                what = f"a line of {curve} against {against} at {fixed(against, at)}"
                reason = f"{len(through)} of at least {LEAST_POINTS} {kind}"
                law.skipped.append(Skipped(part="scaling-law", what=what, reason=reason))
                continue
            x = [x_of(point, curve, against) for point in through]
            y = [y_of(point, curve) for point in through]
            line = fit_line(x, [figures.mean for figures in y])
            law.fits.append(
                Fit(
                    curve=curve,
                    against=against,
                    at=at,
                    points=line.points,
                    smallest=min(x),
                    largest=max(x),
                    coefficient=line.coefficient,
                    exponent=line.exponent,
                    interval=line.interval,
                    seeds_interval=seed_interval(x, [figures.seeds for figures in y]),
                    residual=line.residual,
                )
            )
            if is_ratio(curve):
                to = next(system for system in systems(members) if ratio_to(system) == curve)
                law.gaps.append(_gap(line, to, against, at, min(x), max(x)))


def _gap(line: Line, to: str, against: Against, at: int, smallest: float, largest: float) -> Gap:
    """What a fitted ratio says: does the gap close?"""
    unit = "tokens" if against == TOKENS else "parameters"
    crossing = line.crossing
    if crossing is not None and crossing < smallest:
        crossing = None
    bounds = line.crossing_interval if crossing is not None else None
    times_beyond = crossing / largest if crossing is not None and crossing > largest else None
    above = float(line.at(np.array(largest))) > 1
    if crossing is not None and times_beyond is not None:
        turn = "would be reached" if above else "would be passed again (the lead shrinks)"
        verdict = (
            f"EXTRAPOLATION: 1.00 {turn} at {_rounded(crossing)} {unit}{_interval(bounds)}, "
            f"{_times(times_beyond)} the largest measured ({largest:,.0f})"
        )
    elif crossing is not None:
        verdict = (
            f"1.00 is crossed at {_rounded(crossing)} {unit}{_interval(bounds)}, within what was measured"
        )
    elif above:
        how = "falls too slowly for any number of" if line.exponent > 0 else "does not fall with more"
        verdict = f"1.00 is not reached by this fit: the ratio {how} {unit}"
    else:
        verdict = (
            f"below 1.00 at the largest measured ({largest:,.0f} {unit}), and not rising to it by this fit"
        )
    if line.interval[0] <= 0 <= line.interval[1]:
        doubt = "not shown whether the ratio moves (the 95% interval of its alpha includes 0)"
        verdict = f"{doubt}. The fitted line alone says: {verdict}"
    return Gap(
        to=to,
        against=against,
        at=at,
        crossing=crossing,
        interval=bounds,
        times_beyond=times_beyond,
        verdict=verdict,
    )


def _interval(bounds: tuple[float | None, float | None] | None) -> str:
    if bounds is None or bounds == (None, None):
        return " (its 95% interval has no end)"
    low, high = ("no end" if bound is None else _rounded(bound) for bound in bounds)
    return f" (95%: {low} to {high})"


def _rounded(number: float) -> str:
    """Three significant digits: a fit does not know more."""
    return millions(number) if number < 1e12 else f"{number:.0e}"


def _times(factor: float) -> str:
    return f"{factor:,.1f} times" if factor < 1e6 else f"{factor:.0e} times"


def _fit_joint(law: ScalingLaw) -> None:
    what = "the joint law L = E + A N^-alpha + B D^-beta"
    if why := _too_few(law.points):
        law.skipped.append(Skipped(part="scaling-law", what=what, reason=why))
        return
    for system in systems(law.points):
        points = on_curve(law.points, system)
        if why := _too_few(points):
            law.skipped.append(Skipped(part="scaling-law", what=f"{what} of {system}", reason=why))
            continue
        surface = fit_surface(
            [x_of(point, system, PARAMETERS) for point in points],
            [x_of(point, system, TOKENS) for point in points],
            [y_of(point, system).mean for point in points],
        )
        law.joint.append(Joint(system=system, **vars(surface)))


def _too_few(points: Sequence[Point]) -> str | None:
    """Why the joint law cannot be fitted through these points; None where it can."""
    sizes = len({point.backbone_parameters for point in points})
    budgets = len({point.budget for point in points})
    if sizes < LEAST_POINTS or budgets < LEAST_POINTS:
        return f"{sizes} sizes and {budgets} budgets, of at least {LEAST_POINTS} each"
    if len(points) <= JOINT_PARAMETERS:
        return (
            f"{len(points)} points for its {JOINT_PARAMETERS} parameters, of at least {JOINT_PARAMETERS + 1}"
        )
    return None


def _limit(joint: Sequence[Joint], gap: Gap) -> float | None:
    """The joint laws' ratio for infinitely many tokens at a size, or an infinitely large backbone at a budget."""
    fits = {fit.system: fit for fit in joint if fit.intervals}
    if not {SENTENCE_MODEL, gap.to} <= set(fits):
        return None
    ours, theirs = (
        fit.E + (fit.A * gap.at**-fit.alpha if gap.against == TOKENS else fit.B * gap.at**-fit.beta)
        for fit in (fits[SENTENCE_MODEL], fits[gap.to])
    )
    return ours / theirs if theirs > 0 else None


def mean_flops(law: ScalingLaw, point: Point) -> tuple[float, float]:
    """Mean FLOPs of training of both systems over the seeds of a point."""
    runs = runs_of(law, point)
    return statistics.mean(run.ours.flops for run in runs), statistics.mean(run.twin.flops for run in runs)


def runs_of(law: ScalingLaw, point: Point) -> list[RunPoint]:
    """The runs a point is the mean of."""
    return [run for run in law.runs if run.folder in point.folders]
