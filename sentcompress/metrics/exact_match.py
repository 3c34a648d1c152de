"""Sentences reconstructed exactly."""

from __future__ import annotations

from collections.abc import Sequence

from sentcompress.contracts import Metric, Reconstruction


class ExactMatch(Metric):
    """Share of sentences whose every token came back right."""

    def compute(self, reconstructions: Sequence[Reconstruction]) -> dict[str, float]:
        right = sum(r.reference_ids == r.hypothesis_ids for r in reconstructions)
        return {"sentences": right / len(reconstructions)}
