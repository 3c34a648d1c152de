"""SentenceDecoder: writes a sentence's tokens from its latents (paper section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from sentcompress.modeling.configuration import SentenceVAEConfig
from sentcompress.modeling.layers import DecoderBlock, LayerCache, Unpack
from sentcompress.modeling.ragged import Ragged


@dataclass
class DecoderContext:
    """What is kept of a batch of texts from one sentence to the next: their last ``n`` positions.

    Attributes:
        layers: keys and values ``[B, heads, n, d]`` of each block.
        filled: ``[B, n]`` bool; a text shorter than ``n`` stands on the right.
        stream_positions: ``[B]`` int64, positions of the text so far.
    """

    layers: list[LayerCache]
    filled: Tensor
    stream_positions: Tensor

    def keep(self, rows: Tensor) -> DecoderContext:
        """Only some rows, ``[B']``."""
        return DecoderContext(
            [LayerCache(layer.keys[rows], layer.values[rows]) for layer in self.layers],
            self.filled[rows],
            self.stream_positions[rows],
        )


@dataclass
class DecoderCache:
    """Everything cached while a batch of sentences is written, dropped when they are done.

    Attributes:
        layers: keys and values of each block.
        prepared: what each block computed from the latents, once.
        slots: ``[B, positions, size]``, what the latents give each position; None without ``unpack_size``.
        positions: ``[B]`` int64, positions filled so far in each row.
        context: where the sentences begin, and what the first places of ``layers`` hold; None without context.
    """

    layers: list[LayerCache]
    prepared: list[tuple[Tensor, ...]]
    positions: Tensor
    context: DecoderContext | None = None
    slots: Tensor | None = None


class SentenceDecoder(nn.Module):
    """``decoder_layers`` causal blocks told what to write by cross-attention, addition or a prefix.

    With ``decoder_context`` they also see the positions before the sentence (tokens, and the latents of a prefix), so
    that what the words just before it decide need not pass through the latents. Positions are then rotary too.
    """

    def __init__(self, config: SentenceVAEConfig) -> None:
        super().__init__()
        self.context = config.decoder_context
        self.prefix = config.latents if config.conditioning == "prefix" else 0
        self.capacity = config.max_sentence_tokens + 1 + self.prefix
        self.embed_positions = nn.Embedding(self.capacity, config.hidden_size)
        self.unpack = Unpack(config) if config.unpack_size else None
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
            latents: ``[S, k, H]``; zeros for a sentence that only stands before others.

        Returns:
            hidden_states ``[T, H]``: position t predicts token t of the sentence, or its end.
        """
        return self._run(embeddings, layout, latents)[0]

    def _run(
        self,
        embeddings: Tensor,
        layout: Ragged,
        latents: Tensor,
        kept: list[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Ragged]:
        """The states, and the layout of the positions they were computed at, the prefix included."""
        inner = layout
        if self.unpack is not None:
            slots = self.unpack.prepare(latents.to(embeddings.dtype))
            embeddings = embeddings + self.unpack(slots, layout.sentence_ids, layout.positions)
        if self.prefix:
            inner = layout.longer_by(self.prefix)
            embeddings = inner.unpad(torch.cat([latents.to(embeddings.dtype), layout.pad(embeddings)], dim=1))
        hidden_states = self.dropout(embeddings + self.embed_positions(inner.positions))
        for block in self._decoder_blocks():
            hidden_states = block(hidden_states, inner, block.prepare(latents), kept)
        if self.prefix:
            hidden_states = layout.unpad(inner.pad(hidden_states)[:, self.prefix :])
        return self.norm(hidden_states), inner

    def read(self, embeddings: Tensor, layout: Ragged, latents: Tensor, texts: int) -> DecoderContext:
        """Read the sentences before those that are to be written.

        Args:
            embeddings, layout, latents: as in ``forward``; ``layout.streams`` numbers the texts from 0.
            texts: ``B``; a text without a sentence has an empty context.
        """
        kept: list[tuple[Tensor, Tensor]] = []
        _, inner = self._run(embeddings, layout, latents, kept)
        streams = inner.streams
        assert streams is not None
        lengths = inner.lengths.new_zeros(texts).index_add(0, streams, inner.lengths)
        ends = lengths.cumsum(0)
        places = ends[:, None] + torch.arange(-self.context, 0, device=ends.device)
        filled = places >= (ends - lengths)[:, None]
        places = places.clamp_min(0)
        return DecoderContext(
            [LayerCache(k[places].transpose(1, 2), v[places].transpose(1, 2)) for k, v in kept],
            filled,
            lengths,
        )

    def sentences_read(self, lengths: Sequence[int]) -> int:
        """How many of a text's last sentences, given all their ``lengths``, the next one's states depend on."""
        first = len(lengths)
        for (
            _
        ) in self.blocks:  # each block looks further back, from the beginning of the sentence it looked into
            seen = 0
            while first > 0 and seen < self.context:
                first -= 1
                seen += lengths[first] + 1 + self.prefix
        return len(lengths) - first

    def start(self, latents: Tensor, context: DecoderContext | None = None) -> DecoderCache:
        """Begin ``B`` sentences from ``latents [B, k, H]``: an empty cache with what the latents give.

        Args:
            context: what stands before them; None where nothing does.
        """
        batch, _, width = latents.shape
        shape = (batch, self.num_heads, self.context + self.capacity, width // self.num_heads)
        positions = torch.zeros(batch, dtype=torch.long, device=latents.device)
        cache = DecoderCache(
            layers=[LayerCache(latents.new_zeros(shape), latents.new_zeros(shape)) for _ in self.blocks],
            prepared=[block.prepare(latents) for block in self._decoder_blocks()],
            positions=positions,
            slots=None if self.unpack is None else self.unpack.prepare(latents),
        )
        if self.context:
            if context is None:
                filled = torch.zeros(batch, self.context, dtype=torch.bool, device=latents.device)
                context = DecoderContext([], filled, positions)
            for layer, before in zip(cache.layers, context.layers, strict=False):
                layer.keys[:, :, : self.context] = before.keys
                layer.values[:, :, : self.context] = before.values
            cache.context = replace(context, layers=[])
        for i in range(self.prefix):
            self._step(latents[:, i], cache)
        return cache

    def step(self, embeddings: Tensor, cache: DecoderCache) -> Tensor:
        """One more token in every row: ``[B, H] -> [B, H]``, extending ``cache``."""
        if self.unpack is not None and cache.slots is not None:
            rows = torch.arange(len(embeddings), device=embeddings.device)
            embeddings = embeddings + self.unpack(cache.slots, rows, cache.positions - self.prefix)
        return self._step(embeddings, cache)

    def _step(self, embeddings: Tensor, cache: DecoderCache) -> Tensor:
        hidden_states = embeddings + self.embed_positions(cache.positions)
        across: tuple[Tensor, ...] = ()
        if cache.context is not None:
            across = (cache.context.stream_positions + cache.positions, cache.context.filled)
        for block, layer, prepared in zip(self._decoder_blocks(), cache.layers, cache.prepared, strict=True):
            hidden_states = block.step(hidden_states, layer, cache.positions, prepared, *across)
        cache.positions = cache.positions + 1
        return self.norm(hidden_states)

    def finish(self, cache: DecoderCache, lengths: Tensor) -> DecoderContext | None:
        """What the next sentences see of these and of what stood before them.

        Args:
            cache: in which every sentence's tokens have been read, the last one too.
            lengths: ``[B]`` tokens of each, start token and end mark not counted.
        """
        if cache.context is None:
            return None
        used = self.prefix + 1 + lengths
        places = used[:, None] + torch.arange(self.context, device=used.device)
        own = cache.context.filled.new_ones(len(used), self.capacity)
        layers = []
        for layer in cache.layers:
            index = places[:, None, :, None].expand(-1, self.num_heads, -1, layer.keys.shape[-1])
            layers.append(LayerCache(layer.keys.gather(2, index), layer.values.gather(2, index)))
        return DecoderContext(
            layers,
            torch.cat([cache.context.filled, own], 1).gather(1, places),
            cache.context.stream_positions + used,
        )
