"""Attention pooling: k learned queries, k latents."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from sentcompress.contracts import Fusion, Options


class AttentionOptions(Options):
    """Options of ``attention``."""

    latents: int = Field(default=2, ge=1, le=64)
    """Latents a sentence."""


class AttentionPooling(Fusion):
    """Each of k learned queries attends over the sentence's tokens: k latents."""

    Options: ClassVar[type[Options]] = AttentionOptions

    def __init__(self, hidden_size: int, options: Any | None = None) -> None:
        super().__init__(hidden_size, options)
        self.queries = nn.Parameter(torch.empty(self.options.latents, hidden_size))
        self.key_proj = nn.Linear(hidden_size, hidden_size)
        self.value_proj = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the queries."""
        nn.init.normal_(self.queries)

    @property
    def latents(self) -> int:
        return int(self.options.latents)

    def products(self, tokens: float) -> float:
        # Scores and sums at each token, queries and values once per sentence.
        return self.latents * (2 * tokens + 2 * self.hidden_size) * self.hidden_size

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        hidden_states = hidden_states.masked_fill(~mask[:, :, None], 0.0)
        # q·(W h + b) = (Wᵀq)·h + q·b, and the mean of V h + c is V (mean of h) + c: no token is projected. q·b is the
        # same for every token, so the softmax drops it; it stays because each parameter must get a gradient.
        queries, keys = self.queries.to(hidden_states.dtype), self.key_proj
        scores = F.linear(queries, keys.bias[None])[None].masked_fill(~mask[:, None, :], -torch.inf)
        projected = F.linear(queries, keys.weight.T).expand(len(mask), -1, -1)
        pooled = F.scaled_dot_product_attention(projected, hidden_states, hidden_states, attn_mask=scores)
        return self.norm(self.value_proj(pooled))
