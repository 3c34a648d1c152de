"""The paper's fusion: ``LayerNorm(sum of hidden states)`` (equation 1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sentcompress.contracts import Fusion


class SumNorm(Fusion):
    """Sum the hidden states of a sentence and normalize: one latent."""

    def __init__(self, hidden_size: int, options: Any | None = None) -> None:
        super().__init__(hidden_size, options)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        return self.norm(hidden_states.masked_fill(~mask[:, :, None], 0.0).sum(1))[:, None]
