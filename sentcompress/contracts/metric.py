"""Metric: a further figure for ``bench quality``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sentcompress.contracts.options import Component


@dataclass(frozen=True)
class Reconstruction:
    """A held-out sentence and what the model made of its latent by free-running greedy decoding."""

    reference: str
    hypothesis: str
    reference_ids: tuple[int, ...]
    hypothesis_ids: tuple[int, ...]


class Metric(Component):
    """Turns reconstructions of held-out sentences into named figures."""

    def compute(self, reconstructions: Sequence[Reconstruction]) -> dict[str, float]:
        """Return figures by name; names are prefixed with the metric's own in reports."""
        raise NotImplementedError(f"{type(self).__name__} must implement compute(reconstructions)")
