"""Tokens reconstructed right."""

from __future__ import annotations

from collections.abc import Sequence

from sentcompress.contracts import Metric, Reconstruction


class TokenAccuracy(Metric):
    """Share of tokens right by position in free-running greedy decoding."""

    def compute(self, reconstructions: Sequence[Reconstruction]) -> dict[str, float]:
        right = total = 0
        for r in reconstructions:
            total += len(r.reference_ids)
            right += sum(a == b for a, b in zip(r.reference_ids, r.hypothesis_ids, strict=False))
        return {"tokens": right / total}
