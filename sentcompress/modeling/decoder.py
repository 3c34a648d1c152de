"""SentenceDecoder: writes a sentence's tokens from its latents (paper section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from sentcompress.modeling.configuration import SentenceVAEConfig
from sentcompress.modeling.layers import (
    DecoderBlock,
    LayerCache,
    Place,
    Ragged,
    Unpack,
    latents_first,
    rotation,
)


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

    @classmethod
    def joined(cls, parts: Sequence[DecoderContext], rows: Tensor) -> DecoderContext:
        """Rows ``[B]`` of several contexts one after another; a row may be taken more than once."""
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
    """Everything cached while sentences are written: a row a text, each at a position of its own.

    Attributes:
        layers: keys and values of each block.
        latents: ``[B, k, H]``, what each row's sentence is told.
        prepared: what each block computed from them.
        slots: ``[B, positions, size]``, what they give each position; None without ``unpack_size``.
        positions: ``[B]`` int64, positions filled in each row's sentence.
        before: the texts before their sentences; its ``layers`` are empty, they lie in the first columns of ours.
        angles: cosine and sine ``[B, positions, d / 2]`` of the sentence's positions; None without context.
        even: the position of all rows where it is the same, known without looking.
        reading: steps in which some row may still read its latents.
    """

    layers: list[LayerCache]
    latents: Tensor
    prepared: list[tuple[Tensor, ...]]
    positions: Tensor
    before: DecoderContext
    slots: Tensor | None = None
    angles: tuple[Tensor, Tensor] | None = None
    even: int | None = None
    reading: int = 0


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

    def allocate(self, texts: int, like: Tensor, context: DecoderContext | None = None) -> DecoderCache:
        """A cache for so many texts, no sentence begun.

        Args:
            like: any tensor of the dtype and on the device of the latents.
            context: what stands before the first sentences; None where nothing does.
        """
        width = self.norm.normalized_shape[0]
        shape = (texts, self.num_heads, self.context + self.capacity, width // self.num_heads)
        positions = torch.zeros(texts, dtype=torch.long, device=like.device)
        if context is None:
            filled = torch.zeros(texts, self.context, dtype=torch.bool, device=like.device)
            context = DecoderContext([], filled, positions.clone())
        layers = [LayerCache(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.blocks]
        for layer, before in zip(layers, context.layers, strict=False):
            layer.keys[:, :, : self.context] = before.keys
            layer.values[:, :, : self.context] = before.values
        return DecoderCache(
            layers=layers,
            latents=like.new_zeros(texts, 0, width),
            prepared=[() for _ in self.blocks],
            positions=positions,
            before=replace(context, layers=[]),
        )

    def restart(self, cache: DecoderCache, rows: Tensor, latents: Tensor) -> int:
        """Begin a new sentence in some rows ``[b]`` from ``latents [b, k, H]``.

        Returns:
            steps in which these rows read latents before they write.
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
            cache.slots = put(cache.slots, self.unpack.prepare(latents))
        if self.context:
            steps = torch.arange(self.capacity, device=rows.device)
            places = cache.before.stream_positions[rows, None] + steps
            size = cache.layers[0].keys.shape[-1]
            old_angles = cache.angles or (None, None)
            cos, sin = (put(a, b) for a, b in zip(old_angles, rotation(places, size), strict=True))
            cache.angles = cos, sin
        cache.positions = cache.positions.index_fill(0, rows, 0)
        cache.even = 0 if len(rows) == texts else None
        cache.reading = self.prefix
        return self.prefix

    def step(self, embeddings: Tensor, cache: DecoderCache, rows: Tensor | None = None) -> Tensor:
        """One more position in some rows: ``[b, H] -> [b, H]``, extending ``cache``.

        The first ``prefix`` steps of a sentence read its latents, whatever ``embeddings`` holds.

        Args:
            rows: ``[b]`` int64; the others wait. None: all.
        """
        some = slice(None) if rows is None else rows
        positions = cache.positions[some]
        reading, cache.reading = cache.reading > 0, max(0, cache.reading - 1)
        if rows is not None:
            cache.even = None
        states = self._step(embeddings, cache, some, positions, self._place(cache, rows), reading)
        if rows is None:
            cache.positions = positions + 1
        else:
            cache.positions = cache.positions.index_copy(0, rows, positions + 1)
        if cache.even is not None:
            cache.even += 1
        return states

    def step_all(self, embeddings: Tensor, cache: DecoderCache, going: Tensor) -> Tensor:
        """As ``step``, in shapes that are always the same and with nothing read by the CPU, so that it can be compiled.

        The caller advances ``cache.positions`` where ``going``.

        Args:
            embeddings: ``[B, H]``; what rows that wait are given does not matter, nor what comes back for them.
            going: ``[B]`` bool, the rows that go on.
        """
        n, filled = self.context, cache.before.filled
        rows = torch.arange(len(embeddings), device=embeddings.device)
        # A row that waits may have no column left: it is looked up in its last one, and nothing is written there.
        positions = cache.positions.clamp_max(self.capacity - 1)
        mask = torch.arange(self.capacity, device=rows.device) <= positions[:, None]
        mask = torch.cat([filled, mask], 1)
        angles = _of_each(cache.angles, lambda x: x[rows, positions])
        place = Place(rows, n + positions, 0, n + self.capacity, mask[:, None, None], angles, going)
        return self._step(embeddings, cache, slice(None), positions, place, self.prefix > 0)

    def _step(
        self,
        embeddings: Tensor,
        cache: DecoderCache,
        some: Tensor | slice,
        positions: Tensor,
        place: Place,
        reading: bool,
    ) -> Tensor:
        if self.unpack is not None and cache.slots is not None:
            each = torch.arange(len(cache.slots), device=embeddings.device)[some]
            at = (positions - self.prefix).clamp(0, self.capacity - self.prefix - 1)
            embeddings = embeddings + self.unpack(cache.slots, each, at)
        if reading:
            embeddings = latents_first(embeddings, cache.latents[some], positions)
        hidden_states = embeddings + self.embed_positions(positions)
        for block, layer, prepared in zip(self._decoder_blocks(), cache.layers, cache.prepared, strict=True):
            told = tuple(x[some] for x in prepared)
            hidden_states = block.step(hidden_states, layer, place, told)
        return self.norm(hidden_states)

    def _place(self, cache: DecoderCache, some: Tensor | None) -> Place:
        positions, filled, n = cache.positions, cache.before.filled, self.context
        texts = len(positions)
        if cache.even is not None:
            even = cache.even
            angles = _of_each(cache.angles, lambda x: x[:, even])
            end = n + cache.even + 1
            if texts == 1 or not n:  # what is filled of the context stands on its right
                first = n - int(filled.sum()) if n else 0
                return Place(None, n + cache.even, first, end, None, angles)
            mask = torch.cat([filled, filled.new_ones(texts, cache.even + 1)], 1)
            return Place(None, n + cache.even, 0, end, mask[:, None, None], angles)
        rows = torch.arange(texts, device=positions.device) if some is None else some
        columns = positions[rows]
        angles = _of_each(cache.angles, lambda x: x[rows, columns])
        end = int(columns.max()) + 1
        mask = torch.arange(end, device=positions.device) <= positions[:, None]
        mask = torch.cat([filled, mask], 1) if n else mask
        return Place(rows, n + columns, 0, n + end, mask[:, None, None], angles)

    def retire(self, cache: DecoderCache, rows: Tensor, lengths: Tensor) -> None:
        """Let the sentences of some rows ``[b]`` become what stands before their next ones.

        Args:
            cache: in which all tokens of these sentences have been read, the last one too.
            lengths: ``[b]`` tokens of each, start token and end mark not counted.
        """
        if not self.context:
            return
        used = self.prefix + 1 + lengths
        places = used[:, None] + torch.arange(self.context, device=used.device)
        before = cache.before
        for layer in cache.layers:
            index = places[:, None, :, None].expand(-1, self.num_heads, -1, layer.keys.shape[-1])
            for states in (layer.keys, layer.values):
                states[rows, :, : self.context] = states[rows].gather(2, index)
        own = before.filled.new_ones(len(rows), self.capacity)
        before.filled[rows] = torch.cat([before.filled[rows], own], 1).gather(1, places)
        before.stream_positions[rows] += used

    def keep(self, cache: DecoderCache, rows: Tensor) -> None:
        """Drop all other rows."""
        cache.layers = [layer.keep(rows) for layer in cache.layers]
        cache.latents, cache.positions = cache.latents[rows], cache.positions[rows]
        cache.prepared = [tuple(x[rows] for x in prepared) for prepared in cache.prepared]
        cache.slots = None if cache.slots is None else cache.slots[rows]
        cache.before = DecoderContext([], cache.before.filled[rows], cache.before.stream_positions[rows])
        if cache.angles is not None:
            cache.angles = cache.angles[0][rows], cache.angles[1][rows]


def _of_each(
    angles: tuple[Tensor, Tensor] | None, pick: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor] | None:
    """The angles ``[b, d / 2]`` of one position a row, as ``[b, 1, 1, d / 2]``."""
    return None if angles is None else (pick(angles[0])[:, None, None], pick(angles[1])[:, None, None])
