"""Power laws through points: lines in log-log, the joint law, and how sure one can be. Numpy only.

A line is ``y = A x^-alpha``, least squares in logarithms, each point with the same weight. Its interval holds if the
points scatter evenly around a straight line; whether they lie on one, the reader of the plot has to judge.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_POINTS = 3
"""A line passes through any two points, and nothing says how certain it is."""
CONFIDENCE = 0.95
RESAMPLES = 2000
"""Of the bootstrap over seeds."""
JOINT_PARAMETERS = 5
EXPONENTS = (0.01, 3.0)
"""Between which the joint law's exponents are searched."""

Interval = tuple[float, float]


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Half-width of the two-sided interval of Student's t: ``P(|T| < t) = confidence``.

    The finite series for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4), bisected.
    """
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, degrees) < confidence else (low, middle)
    return high


def _t_inside(t: float, degrees: int) -> float:
    angle = math.atan(t / math.sqrt(degrees))
    square, odd = math.cos(angle) ** 2, degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(1, (degrees - odd) // 2 + 1):
        total += term
        term *= square * (2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k))
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


@dataclass(frozen=True)
class Line:
    """``y = coefficient * x^-exponent``.

    Attributes:
        interval: 95% interval of the exponent, t with ``points - 2`` degrees of freedom.
        residual: standard deviation of the residuals, in logarithms of y.
        crossing: x at which y is 1; None where the line does not fall or rise towards it.
        crossing_interval: 95%, by Fieller; an end is None where it is unbounded, all is None without a crossing.
    """

    coefficient: float
    exponent: float
    interval: Interval
    residual: float
    points: int
    crossing: float | None
    crossing_interval: tuple[float | None, float | None] | None

    def at(self, x: np.ndarray) -> np.ndarray:
        """The line's y, of the shape of ``x``."""
        return self.coefficient * np.asarray(x, dtype=float) ** -self.exponent


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """A straight line in log-log through at least three points, of which not all x are the same.

    Raises:
        ValueError: there are fewer, or a value is not positive.
    """
    log_x, log_y = _logarithms(x), _logarithms(y)
    count = len(log_x)
    if len(set(log_x.tolist())) < LEAST_POINTS:
        raise ValueError(f"a line needs {LEAST_POINTS} different values of x, not {len(set(log_x.tolist()))}")
    middle, height = log_x.mean(), log_y.mean()
    across = log_x - middle
    squares = float(across @ across)
    slope = float(across @ log_y) / squares
    left = log_y - height - slope * across
    variance = float(left @ left) / (count - 2)
    half = t_quantile(count - 2) * math.sqrt(variance)
    error = half / math.sqrt(squares)
    crossing, bounds = _crossing(slope, height, middle, error, half / math.sqrt(count))
    return Line(
        coefficient=math.exp(height - slope * middle),
        exponent=-slope,
        interval=(-slope - error, -slope + error),
        residual=math.sqrt(variance),
        points=count,
        crossing=crossing,
        crossing_interval=bounds,
    )


def _crossing(
    slope: float, height: float, middle: float, slope_error: float, height_error: float
) -> tuple[float | None, tuple[float | None, float | None] | None]:
    """Where the line is 1, and the x whose own interval of y holds 1 (errors are half-widths of intervals)."""
    if slope == 0:
        return None, None
    crossing = _exp(middle - height / slope)
    # (height + slope u)^2 <= height_error^2 + slope_error^2 u^2, solved for u.
    a, b, c = slope**2 - slope_error**2, height * slope, height**2 - height_error**2
    if a <= 0:
        return crossing, (None, None)
    root = math.sqrt(max(0.0, b * b - a * c))
    return crossing, (_exp(middle + (-b - root) / a), _exp(middle + (-b + root) / a))


def _exp(value: float) -> float | None:
    """None where the result overflows: as good as never."""
    return math.exp(value) if value < 700 else None


def seed_interval(x: Sequence[float], values: Sequence[Sequence[float]]) -> Interval | None:
    """95% bootstrap interval of the exponent: seeds are resampled at each point. None unless each has two or more.

    Args:
        values: the y of the seeds at each x.
    """
    if any(len(seeds) < 2 for seeds in values):
        return None
    draw = np.random.default_rng(0)
    means = np.stack(
        [
            np.array(seeds)[draw.integers(len(seeds), size=(RESAMPLES, len(seeds)))].mean(1)
            for seeds in values
        ],
        axis=1,
    )
    across = _logarithms(x) - _logarithms(x).mean()
    exponents = -(np.log(means) @ across) / (across @ across)
    low, high = np.quantile(exponents, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _logarithms(values: Sequence[float]) -> np.ndarray:
    array = np.array(values, dtype=float)
    if not (array > 0).all() or not np.isfinite(array).all():
        raise ValueError("logarithms are of positive numbers")
    return np.log(array)


@dataclass(frozen=True)
class Surface:
    """``L = E + A N^-alpha + B D^-beta``.

    Attributes:
        intervals: 95% of E, alpha and beta by linearisation, t with ``points - 5`` degrees of freedom; empty where
            the points do not determine all five.
        residual: relative standard deviation of the residuals.
    """

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    intervals: dict[str, Interval]
    residual: float
    points: int


def fit_surface(n: Sequence[float], d: Sequence[float], loss: Sequence[float]) -> Surface:
    """Least squares of relative residuals, with no part negative.

    For given exponents the rest is linear, so only the two are searched: over a grid that closes in on the best.

    Raises:
        ValueError: fewer than six points.
    """
    if len(loss) <= JOINT_PARAMETERS:
        raise ValueError(f"{JOINT_PARAMETERS} parameters need at least {JOINT_PARAMETERS + 1} points")
    log_n, log_d, y = _logarithms(n), _logarithms(d), np.array(loss, dtype=float)
    x = np.stack([log_n - log_n.mean(), log_d - log_d.mean()])
    low, high = (np.full(2, math.log(edge)) for edge in EXPONENTS)
    bounds = (low[0], high[0])
    exponents, parts = np.ones(2), np.ones(3)
    for _ in range(14):
        axes = [np.linspace(low[i], high[i], 21) for i in range(2)]
        grid = np.exp(np.stack(np.meshgrid(*axes), -1).reshape(-1, 2))
        parts_of, squares = _linear(grid, x, y)
        best = int(squares.argmin())
        exponents, parts = grid[best], parts_of[best]
        reach = (high - low) / 6
        low = np.clip(np.log(exponents) - reach, *bounds)
        high = np.clip(np.log(exponents) + reach, *bounds)
    # Undo the centring of the logarithms.
    scales = np.exp(exponents * np.array([log_n.mean(), log_d.mean()]))
    residual, intervals = _surface_error(exponents, parts, x, y, bounds)
    return Surface(
        E=float(parts[0]),
        A=float(parts[1] * scales[0]),
        alpha=float(exponents[0]),
        B=float(parts[2] * scales[1]),
        beta=float(exponents[1]),
        intervals=intervals,
        residual=residual,
        points=len(y),
    )


def _columns(exponents: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``[..., 2]`` exponents to ``[..., points, 3]``: what E, A and B are multiplied with, relative to the loss."""
    powers = np.exp(-exponents[..., None] * x)
    return np.stack([np.ones_like(powers[..., 0, :]), powers[..., 0, :], powers[..., 1, :]], -1) / y[:, None]


def _linear(grid: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best E, A, B ``[G, 3]``, none negative, and the squares left ``[G]``, for each pair of exponents.

    With three of them, trying each subset that may be other than zero is exact and quick.
    """
    columns = _columns(grid, x, y)
    parts, squares = np.zeros((len(grid), 3)), np.full(len(grid), np.inf)
    for size in (1, 2, 3):
        for subset in itertools.combinations(range(3), size):
            chosen = columns[..., list(subset)]
            found = np.linalg.pinv(chosen).sum(-1)  # the target is 1 everywhere: loss over itself
            left = ((np.einsum("gpk,gk->gp", chosen, found) - 1) ** 2).sum(-1)
            better = (found >= 0).all(-1) & (left < squares)
            squares[better] = left[better]
            parts[better] = 0.0
            parts[np.ix_(better, list(subset))] = found[better]
    return parts, squares


def _surface_error(
    exponents: np.ndarray, parts: np.ndarray, x: np.ndarray, y: np.ndarray, bounds: tuple[float, float]
) -> tuple[float, dict[str, Interval]]:
    columns = _columns(exponents, x, y)
    left = columns @ parts - 1
    free = len(y) - JOINT_PARAMETERS
    variance = float(left @ left) / free
    residual = math.sqrt(variance)
    at_an_edge = np.isclose(np.log(exponents)[:, None], np.array(bounds), atol=1e-3).any()
    if at_an_edge or (parts <= 0).any():
        return residual, {}
    slopes = -parts[1:] * columns[:, 1:] * x.T
    jacobian = np.concatenate([columns, slopes], axis=1)
    if np.linalg.matrix_rank(jacobian) < JOINT_PARAMETERS:
        return residual, {}
    halves = t_quantile(free) * np.sqrt(variance * np.diag(np.linalg.inv(jacobian.T @ jacobian)))
    middles = {
        "E": (parts[0], halves[0]),
        "alpha": (exponents[0], halves[3]),
        "beta": (exponents[1], halves[4]),
    }
    return residual, {name: (float(m - half), float(m + half)) for name, (m, half) in middles.items()}
