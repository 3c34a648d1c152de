"""SentenceDecoder: decodes a sentence's tokens from its latents (paper section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from sentcompress.modeling.configuration import SentenceVAEConfig
from sentcompress.modeling.layers import (
    CacheSlot,
    DecoderBlock,
    LayerCache,
    Ragged,
    Unpack,
    latents_first,
    rotation,
)


@dataclass
class DecoderContext:
    """What a sentence sees of the sentences before it, for a batch of texts: their last ``n`` positions.

    Attributes:
        layers: keys and values ``[B, heads, n, d]`` of each block.
        filled: ``[B, n]`` bool; a text shorter than ``n`` is padded on the left.
        stream_positions: ``[B]`` int64, positions of the text so far.
    """

    layers: list[LayerCache]
    filled: Tensor
    stream_positions: Tensor

    @classmethod
    def joined(cls, parts: Sequence[DecoderContext], rows: Tensor) -> DecoderContext:
        """Select ``rows [B]`` from concatenated contexts; a row may be selected more than once."""
        layers = [
            LayerCache(
                torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers])
            ).keep(rows)
            for layers in zip(*(part.layers for part in parts), strict=True)
        ]
        filled = torch.cat([part.filled for part in parts])
        positions = torch.cat([part.stream_positions for part in parts])
        return cls(layers, filled[rows], positions[rows])


@dataclass
class DecoderCache:
    """The cache during generation: one row per text, each at its own position.

    Attributes:
        layers: keys and values of each block.
        latents: ``[B, k, H]`` that condition the sentences.
        prepared: what each block computed from the latents.
        unpacked: ``[B, positions, size]``, each position's part of the latents; None without ``unpack_size``.
        positions: ``[B]`` int64, positions filled in each row's sentence.
        context: the text before each sentence; its ``layers`` are empty, as ours hold it in their first columns.
        angles: cosine and sine ``[B, positions, d / 2]`` of the sentence's positions; None without context.
        shared_position: the position of all rows if it is the same and known on the CPU.
        latent_steps: steps in which some row may still read its latents.
    """

    layers: list[LayerCache]
    latents: Tensor
    prepared: list[tuple[Tensor, ...]]
    positions: Tensor
    context: DecoderContext
    unpacked: Tensor | None = None
    angles: tuple[Tensor, Tensor] | None = None
    shared_position: int | None = None
    latent_steps: int = 0


class SentenceDecoder(nn.Module):
    """``decoder_layers`` causal blocks, conditioned on the latents by cross-attention, addition or a prefix.

    With ``decoder_context`` they also see the positions before the sentence (tokens, and the latents of a prefix), so
    the latents need not carry what follows from the previous words. Positions are then rotary too.
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
            layout: of the ``S`` sentences.
            latents: ``[S, k, H]``; zeros for a sentence that is context only.

        Returns:
            hidden_states ``[T, H]``: position t predicts token t of the sentence, or its end mark.
        """
        return self._run(embeddings, layout, latents)[0]

    def _run(
        self,
        embeddings: Tensor,
        layout: Ragged,
        latents: Tensor,
        past_key_values: list[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Ragged]:
        """The hidden states, and the layout of all positions, the prefix included."""
        inner = layout
        if self.unpack is not None:
            unpacked = self.unpack.prepare(latents.to(embeddings.dtype))
            embeddings = embeddings + self.unpack(unpacked, layout.sentence_ids, layout.positions)
        if self.prefix:
            inner = layout.longer_by(self.prefix)
            embeddings = inner.unpad(torch.cat([latents.to(embeddings.dtype), layout.pad(embeddings)], dim=1))
        hidden_states = self.dropout(embeddings + self.embed_positions(inner.positions))
        for block in self._decoder_blocks():
            hidden_states = block(hidden_states, inner, block.prepare(latents), past_key_values)
        if self.prefix:
            hidden_states = layout.unpad(inner.pad(hidden_states)[:, self.prefix :])
        return self.norm(hidden_states), inner

    def read(self, embeddings: Tensor, layout: Ragged, latents: Tensor, texts: int) -> DecoderContext:
        """Read the sentences before those to be decoded.

        Args:
            embeddings, layout, latents: as in ``forward``; ``layout.streams`` numbers the texts from 0.
            texts: ``B``; a text without sentences has an empty context.
        """
        past_key_values: list[tuple[Tensor, Tensor]] = []
        _, inner = self._run(embeddings, layout, latents, past_key_values)
        streams = inner.streams
        assert streams is not None
        lengths = inner.lengths.new_zeros(texts).index_add(0, streams, inner.lengths)
        ends = lengths.cumsum(0)
        indices = ends[:, None] + torch.arange(-self.context, 0, device=ends.device)
        filled = indices >= (ends - lengths)[:, None]
        indices = indices.clamp_min(0)
        return DecoderContext(
            [LayerCache(k[indices].transpose(1, 2), v[indices].transpose(1, 2)) for k, v in past_key_values],
            filled,
            lengths,
        )

    def sentences_read(self, lengths: Sequence[int]) -> int:
        """How many of a text's last sentences the next one depends on, given the ``lengths`` of all."""
        first = len(lengths)
        # Each block reaches further back, from the beginning of the sentence that the one above it sees.
        for _ in self.blocks:
            seen = 0
            while first > 0 and seen < self.context:
                first -= 1
                seen += lengths[first] + 1 + self.prefix
        return len(lengths) - first

    def allocate(self, texts: int, like: Tensor, context: DecoderContext | None = None) -> DecoderCache:
        """An empty cache.

        Args:
            texts: number of texts.
            like: a tensor with the dtype and device of the latents.
            context: of the first sentences; None: there is none.
        """
        width = self.norm.normalized_shape[0]
        shape = (texts, self.num_heads, self.context + self.capacity, width // self.num_heads)
        positions = torch.zeros(texts, dtype=torch.long, device=like.device)
        if context is None:
            filled = torch.zeros(texts, self.context, dtype=torch.bool, device=like.device)
            context = DecoderContext([], filled, positions.clone())
        layers = [LayerCache(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.blocks]
        for layer, past in zip(layers, context.layers, strict=False):
            layer.keys[:, :, : self.context] = past.keys
            layer.values[:, :, : self.context] = past.values
        return DecoderCache(
            layers=layers,
            latents=like.new_zeros(texts, 0, width),
            prepared=[() for _ in self.blocks],
            positions=positions,
            context=replace(context, layers=[]),
        )

    def restart(self, cache: DecoderCache, rows: Tensor, latents: Tensor) -> int:
        """Begin a new sentence in some rows ``[b]`` from ``latents [b, k, H]``.

        Returns:
            steps in which these rows read latents before their first token.
        """
        texts = len(cache.positions)

        def put(old: Tensor | None, new: Tensor) -> Tensor:
            if len(rows) == texts:
                return new[rows.argsort()]
            if old is None or old.shape[1:] != new.shape[1:]:
                old = new.new_zeros(texts, *new.shape[1:])
            return old.index_copy(0, rows, new)

        cache.latents = put(cache.latents, latents)
        for i, block in enumerate(self._decoder_blocks()):
            new = block.prepare(latents)
            old: tuple[Tensor | None, ...] = cache.prepared[i] or (None,) * len(new)
            cache.prepared[i] = tuple(put(a, b) for a, b in zip(old, new, strict=True))
        if self.unpack is not None:
            cache.unpacked = put(cache.unpacked, self.unpack.prepare(latents))
        if self.context:
            steps = torch.arange(self.capacity, device=rows.device)
            stream_positions = cache.context.stream_positions[rows, None] + steps
            size = cache.layers[0].keys.shape[-1]
            old_angles = cache.angles or (None, None)
            cos, sin = (put(a, b) for a, b in zip(old_angles, rotation(stream_positions, size), strict=True))
            cache.angles = cos, sin
        cache.positions = cache.positions.index_fill(0, rows, 0)
        cache.shared_position = 0 if len(rows) == texts else None
        cache.latent_steps = self.prefix
        return self.prefix

    def step(self, embeddings: Tensor, cache: DecoderCache, rows: Tensor | None = None) -> Tensor:
        """Advance some rows by one position: ``[b, H] -> [b, H]``, extending ``cache``.

        The first ``prefix`` steps of a sentence read its latents, whatever ``embeddings`` holds.

        Args:
            rows: ``[b]`` int64; the others wait. None: all.
        """
        some = slice(None) if rows is None else rows
        positions = cache.positions[some]
        read_latents, cache.latent_steps = cache.latent_steps > 0, max(0, cache.latent_steps - 1)
        if rows is not None:
            cache.shared_position = None
        states = self._step(embeddings, cache, some, positions, self._cache_slot(cache, rows), read_latents)
        if rows is None:
            cache.positions = positions + 1
        else:
            cache.positions = cache.positions.index_copy(0, rows, positions + 1)
        if cache.shared_position is not None:
            cache.shared_position += 1
        return states

    def step_all(self, embeddings: Tensor, cache: DecoderCache, active: Tensor) -> Tensor:
        """Like ``step``, but with constant shapes and no values read by the CPU, so that it can be compiled.

        The caller advances ``cache.positions`` where ``active``.

        Args:
            embeddings: ``[B, H]``; inputs and results of inactive rows are ignored.
            active: ``[B]`` bool, the rows that advance.
        """
        n, filled = self.context, cache.context.filled
        rows = torch.arange(len(embeddings), device=embeddings.device)
        # An inactive row may have no column left: it uses the last one, and writes nothing.
        positions = cache.positions.clamp_max(self.capacity - 1)
        mask = torch.arange(self.capacity, device=rows.device) <= positions[:, None]
        mask = torch.cat([filled, mask], 1)
        angles = _of_each(cache.angles, lambda x: x[rows, positions])
        slot = CacheSlot(rows, n + positions, 0, n + self.capacity, mask[:, None, None], angles, active)
        return self._step(embeddings, cache, slice(None), positions, slot, self.prefix > 0)

    def _step(
        self,
        embeddings: Tensor,
        cache: DecoderCache,
        some: Tensor | slice,
        positions: Tensor,
        slot: CacheSlot,
        read_latents: bool,
    ) -> Tensor:
        if self.unpack is not None and cache.unpacked is not None:
            each = torch.arange(len(cache.unpacked), device=embeddings.device)[some]
            at = (positions - self.prefix).clamp(0, self.capacity - self.prefix - 1)
            embeddings = embeddings + self.unpack(cache.unpacked, each, at)
        if read_latents:
            embeddings = latents_first(embeddings, cache.latents[some], positions)
        hidden_states = embeddings + self.embed_positions(positions)
        for block, layer, prepared in zip(self._decoder_blocks(), cache.layers, cache.prepared, strict=True):
            hidden_states = block.step(hidden_states, layer, slot, tuple(x[some] for x in prepared))
        return self.norm(hidden_states)

    def _cache_slot(self, cache: DecoderCache, some: Tensor | None) -> CacheSlot:
        positions, filled, n = cache.positions, cache.context.filled, self.context
        texts = len(positions)
        if cache.shared_position is not None:
            shared = cache.shared_position
            angles = _of_each(cache.angles, lambda x: x[:, shared])
            end = n + shared + 1
            if texts == 1 or not n:  # the context is padded on the left
                first = n - int(filled.sum()) if n else 0
                return CacheSlot(None, n + shared, first, end, None, angles)
            mask = torch.cat([filled, filled.new_ones(texts, shared + 1)], 1)
            return CacheSlot(None, n + shared, 0, end, mask[:, None, None], angles)
        rows = torch.arange(texts, device=positions.device) if some is None else some
        columns = positions[rows]
        angles = _of_each(cache.angles, lambda x: x[rows, columns])
        end = int(columns.max()) + 1
        mask = torch.arange(end, device=positions.device) <= positions[:, None]
        mask = torch.cat([filled, mask], 1) if n else mask
        return CacheSlot(rows, n + columns, 0, n + end, mask[:, None, None], angles)

    def retire(self, cache: DecoderCache, rows: Tensor, lengths: Tensor) -> None:
        """Turn the sentences of some rows ``[b]`` into the context of the next ones.

        Args:
            cache: has read all tokens of these sentences, the last one too.
            lengths: ``[b]`` tokens of each, without start token and end mark.
        """
        if not self.context:
            return
        used = self.prefix + 1 + lengths
        indices = used[:, None] + torch.arange(self.context, device=used.device)
        context = cache.context
        for layer in cache.layers:
            index = indices[:, None, :, None].expand(-1, self.num_heads, -1, layer.keys.shape[-1])
            for states in (layer.keys, layer.values):
                states[rows, :, : self.context] = states[rows].gather(2, index)
        own = context.filled.new_ones(len(rows), self.capacity)
        context.filled[rows] = torch.cat([context.filled[rows], own], 1).gather(1, indices)
        context.stream_positions[rows] += used

    def join(self, cache: DecoderCache, other: DecoderCache) -> None:
        """Add the rows of another cache, in which no sentence was begun yet, as the last ones."""
        more = len(other.positions)

        def padded(states: Tensor) -> Tensor:
            return torch.cat([states, states.new_zeros(more, *states.shape[1:])])

        for layer, new in zip(cache.layers, other.layers, strict=True):
            layer.keys, layer.values = (
                torch.cat([layer.keys, new.keys]),
                torch.cat([layer.values, new.values]),
            )
        cache.latents = padded(cache.latents)
        cache.prepared = [tuple(map(padded, prepared)) for prepared in cache.prepared]
        cache.unpacked = None if cache.unpacked is None else padded(cache.unpacked)
        cache.angles = None if cache.angles is None else (padded(cache.angles[0]), padded(cache.angles[1]))
        cache.positions = torch.cat([cache.positions, other.positions])
        cache.context = DecoderContext(
            [],
            torch.cat([cache.context.filled, other.context.filled]),
            torch.cat([cache.context.stream_positions, other.context.stream_positions]),
        )
        cache.shared_position = None

    def keep(self, cache: DecoderCache, rows: Tensor) -> None:
        """Drop all other rows."""
        cache.layers = [layer.keep(rows) for layer in cache.layers]
        cache.latents, cache.positions = cache.latents[rows], cache.positions[rows]
        cache.prepared = [tuple(x[rows] for x in prepared) for prepared in cache.prepared]
        cache.unpacked = None if cache.unpacked is None else cache.unpacked[rows]
        cache.context = DecoderContext([], cache.context.filled[rows], cache.context.stream_positions[rows])
        if cache.angles is not None:
            cache.angles = cache.angles[0][rows], cache.angles[1][rows]


def _of_each(
    angles: tuple[Tensor, Tensor] | None, pick: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor] | None:
    """The angles ``[b, d / 2]`` of one position per row, as ``[b, 1, 1, d / 2]``."""
    return None if angles is None else (pick(angles[0])[:, None, None], pick(angles[1])[:, None, None])
