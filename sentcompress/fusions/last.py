"""The hidden state of the last token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sentcompress.contracts import Fusion


class Last(Fusion):
    """Take the last token's hidden state and normalize: one latent."""

    def __init__(self, hidden_size: int, options: Any | None = None) -> None:
        super().__init__(hidden_size, options)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        columns = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, columns, -1).amax(1)
        rows = torch.arange(len(mask), device=mask.device)
        return self.norm(hidden_states[rows, last])[:, None]
