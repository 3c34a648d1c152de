"""Choices that several parts of the package offer under the same names. Imports nothing from the package."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

HeadKind = Literal["auto", "exact", "shortlist-exact", "shortlist"]
"""How the output head finds the next token (:mod:`sentcompress.generation.output_head`)."""
CacheKind = Literal["full", "int8", "offloaded", "offloaded-int8"]
"""How the backbone's keys and values are kept while generating (:mod:`sentcompress.generation.backbone_cache`)."""

MEASUREMENTS = Path(__file__).parent.parent / "benchmark" / "measurements"


def measurement_names() -> list[str]:
    """Names of the measurements, in alphabetical order: one for each file of ``benchmark/measurements``.

    Only file names are read. A recipe is checked against them without importing a measurement.
    """
    return sorted(module.name for module in pkgutil.iter_modules([str(MEASUREMENTS)]))


if TYPE_CHECKING:
    MeasurementName = str
else:
    MeasurementName = Literal[tuple(measurement_names())]
