"""Packing: each position of the sentence is written into the latents by a matrix of its own."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from sentcompress.contracts import Fusion, Options


class PackOptions(Options):
    """Options of ``pack``."""

    latents: int = Field(default=1, ge=1, le=64)
    """Latents a sentence."""
    slot_size: int = Field(default=64, ge=1, le=1024)
    """Numbers a token is brought down to before it is written."""
    positions: int = Field(default=64, ge=1, le=1024)
    """Positions with a matrix of their own; a longer sentence begins again with the first."""


class Pack(Fusion):
    """The sum over positions of ``W[position] @ narrow(hidden_state)``, normalized: k latents.

    A lookup-and-concatenate embedder (Block Transformer, arXiv 2406.02657, section 2.2) for units of any length. A
    pooling has to learn to keep the order of the words apart, here it is apart from the beginning.
    """

    Options: ClassVar[type[Options]] = PackOptions

    def __init__(self, hidden_size: int, options: Any | None = None) -> None:
        super().__init__(hidden_size, options)
        self.narrow = nn.Linear(hidden_size, self.options.slot_size, bias=False)
        width = self.options.latents * hidden_size
        self.write = nn.Parameter(torch.empty(self.options.positions, self.options.slot_size, width))
        self.norm = nn.LayerNorm(hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrices."""
        nn.init.normal_(self.write, std=self.options.slot_size**-0.5)

    @property
    def latents(self) -> int:
        return int(self.options.latents)

    def products(self, tokens: float) -> float:
        each = self.narrow.weight.numel() + self.write[0].numel()
        return tokens * each

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        narrow = self.narrow(hidden_states.masked_fill(~mask[:, :, None], 0.0))
        length = min(mask.shape[1], self.options.positions)
        # The first token has place 0 on whichever side the padding is.
        places = (mask.long().cumsum(1) - 1).clamp_min(0) % length
        slots = narrow.new_zeros(len(mask), length, narrow.shape[2])
        slots = slots.scatter_add(1, places[:, :, None].expand_as(narrow), narrow)
        written = slots.flatten(1) @ self.write[:length].to(narrow.dtype).flatten(0, 1)
        return self.norm(written.unflatten(1, (self.latents, self.hidden_size)))
