"""One latent for each part of a sentence."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

import sentcompress


class SpanPooling(sentcompress.Fusion):
    """Divides a sentence into k equal spans and averages each: k latents, in the order of the text."""

    class Options(sentcompress.Options):
        latents: int = Field(default=4, ge=1, le=64)
        """Spans, and so latents, per sentence."""

    def __init__(self, hidden_size: int, options: Any | None = None) -> None:
        super().__init__(hidden_size, options)
        self.norm = nn.LayerNorm(hidden_size)

    @property
    def latents(self) -> int:
        return int(self.options.latents)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        # Positions count only tokens, so that padding on either side changes nothing.
        position = (mask.cumsum(1) - 1)[:, None, :]
        tokens = mask.sum(1)[:, None, None]
        span = torch.arange(self.latents, device=mask.device)[None, :, None]
        # Rounded outwards: in a sentence of fewer than k tokens, spans overlap instead of being empty.
        inside = (position >= span * tokens // self.latents) & (
            position < -(-(span + 1) * tokens // self.latents)
        )
        weights = (inside & mask[:, None, :]).to(hidden_states.dtype)
        total = weights @ hidden_states.masked_fill(~mask[:, :, None], 0.0)
        return self.norm(total / weights.sum(2, keepdim=True).clamp(min=1))
