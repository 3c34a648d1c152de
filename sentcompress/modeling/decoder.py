"""SentenceDecoder: writes a sentence's tokens from its latents (paper section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sentcompress.modeling.configuration import SentenceVAEConfig
from sentcompress.modeling.layers import DecoderBlock, LayerCache
from sentcompress.modeling.ragged import Ragged


@dataclass
class DecoderCache:
    """Everything cached while a batch of sentences is written, dropped when they are done.

    Attributes:
        layers: keys and values of each block.
        prepared: what each block computed from the latents, once.
        positions: ``[B]`` int64, positions filled so far in each row.
    """

    layers: list[LayerCache]
    prepared: list[tuple[Tensor, ...]]
    positions: Tensor


class SentenceDecoder(nn.Module):
    """``decoder_layers`` causal blocks told what to write by cross-attention, addition or a prefix."""

    def __init__(self, config: SentenceVAEConfig) -> None:
        super().__init__()
        self.prefix = config.latents if config.conditioning == "prefix" else 0
        self.capacity = config.max_sentence_tokens + 1 + self.prefix
        self.embed_positions = nn.Embedding(self.capacity, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.num_heads = config.num_heads

    def _decoder_blocks(self) -> list[DecoderBlock]:
        return cast("list[DecoderBlock]", list(self.blocks))

    def forward(self, embeddings: Tensor, layout: Ragged, latents: Tensor) -> Tensor:
        """Teacher-forced pass.

        Args:
            embeddings: ``[T, H]`` of the start token and the sentence's tokens.
            layout: where they lie; ``S`` sentences.
            latents: ``[S, k, H]``.

        Returns:
            hidden_states ``[T, H]``: position t predicts token t of the sentence, or its end.
        """
        inner = layout
        if self.prefix:
            inner = layout.longer_by(self.prefix)
            embeddings = inner.unpad(torch.cat([latents.to(embeddings.dtype), layout.pad(embeddings)], dim=1))
        hidden_states = self.dropout(embeddings + self.embed_positions(inner.positions))
        for block in self._decoder_blocks():
            hidden_states = block(hidden_states, inner, block.prepare(latents))
        if self.prefix:
            hidden_states = layout.unpad(inner.pad(hidden_states)[:, self.prefix :])
        return self.norm(hidden_states)

    def start(self, latents: Tensor) -> DecoderCache:
        """Begin ``B`` sentences from ``latents [B, k, H]``: an empty cache with what the latents give."""
        batch, _, width = latents.shape
        shape = (batch, self.num_heads, self.capacity, width // self.num_heads)
        cache = DecoderCache(
            layers=[LayerCache(latents.new_zeros(shape), latents.new_zeros(shape)) for _ in self.blocks],
            prepared=[block.prepare(latents) for block in self._decoder_blocks()],
            positions=torch.zeros(batch, dtype=torch.long, device=latents.device),
        )
        for i in range(self.prefix):
            self.step(latents[:, i], cache)
        return cache

    def step(self, embeddings: Tensor, cache: DecoderCache) -> Tensor:
        """One more position in every row: ``[B, H] -> [B, H]``, extending ``cache``."""
        hidden_states = embeddings + self.embed_positions(cache.positions)
        for block, layer, prepared in zip(self._decoder_blocks(), cache.layers, cache.prepared, strict=True):
            hidden_states = block.step(hidden_states, layer, cache.positions, prepared)
        cache.positions = cache.positions + 1
        return self.norm(hidden_states)
