"""A learned weight for each token."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sentcompress.contracts import Fusion


class WeightedSum(Fusion):
    """Weigh each token by a softmax over a learned score, sum and normalize: one latent."""

    def __init__(self, hidden_size: int, options: Any | None = None) -> None:
        super().__init__(hidden_size, options)
        self.score = nn.Linear(hidden_size, 1)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        scores = self.score(hidden_states).squeeze(-1).masked_fill(~mask, float("-inf"))
        weights = scores.softmax(1)[:, :, None]
        return self.norm((weights * hidden_states.masked_fill(~mask[:, :, None], 0.0)).sum(1))[:, None]
