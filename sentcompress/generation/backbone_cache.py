"""The backbone's side of generation: its cells so far, and the state that predicts the next sentence."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from sentcompress.modeling.sentence_lm import PADDING, START, SentenceLM
from sentcompress.recipe.choices import CacheKind

SPARE_CELLS = 16
"""Cells there is room for when the cache has to grow."""


@dataclass(frozen=True)
class Prefix:
    """The beginning that many texts share, read once (:meth:`sentcompress.generation.SentenceGenerator.read_prefix`).

    Attributes:
        text: as it stands before the prompts.
        sentences: token ids of each.
        latents: ``[n, k, H]`` of them.
        states: ``[1, n, k, H]`` of the backbone, the start cell's among them.
        cache: its keys and values ``[1, heads, columns, d]``, layer by layer; None where they cannot be kept for
            others, and the text is read each time.
    """

    text: str
    sentences: list[list[int]]
    latents: Tensor
    states: Tensor
    cache: list[tuple[Tensor, Tensor]] | None

    @classmethod
    @torch.no_grad()
    def read(cls, model: SentenceLM, text: str, sentences: list[list[int]], latents: Tensor) -> Prefix:
        """Run the backbone over sentences and keep what comes of it."""
        inputs, valid = _rows(model, [latents], start=model.config.start_latent)
        states, cache = _run(model, inputs, valid, use_cache=True)
        layers = [(layer.keys, layer.values) for layer in cache.layers] if _plain(cache) else None
        return cls(text, sentences, latents, states, layers)

    def common(self, texts: Iterable[list[list[int]]]) -> Prefix:
        """The part of it that all texts, given as sentences, begin with: the next words may change how it is cut."""
        shared = len(self.sentences)
        for sentences in texts:
            pairs = zip(self.sentences[:shared], sentences, strict=False)
            shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        less = len(self.sentences) - shared
        cells = self.states.shape[1] - less
        columns = cells * self.latents.shape[1]
        cache = None
        if self.cache is not None and cells:
            cache = [(keys[:, :, :columns], values[:, :, :columns]) for keys, values in self.cache]
        return Prefix(
            self.text, self.sentences[:shared], self.latents[:shared], self.states[:, :cells], cache
        )


class Cells:
    """The cells (start and sentences) of a batch of texts; each text grows by itself.

    Args:
        model: in eval mode.
        latents: ``[n, k, H]`` of each text's sentences, those of ``prefix`` left out.
        use_cache: False runs the backbone over everything again each time, as is done where its cache is more than keys
            and values.
        kind: how keys and values are kept (:class:`sentcompress.generation.GenerationSettings`).
        prefix: what all the texts begin with.

    Attributes:
        counts: cells of each text.
        hidden_states: ``[B, k, H]``, what the decoder is told for each text's next sentence.
        cache_bytes: bytes of keys and values of the texts as they were read, padding included.
    """

    def __init__(
        self,
        model: SentenceLM,
        latents: list[Tensor],
        *,
        use_cache: bool,
        kind: CacheKind = "full",
        prefix: Prefix | None = None,
    ) -> None:
        self.model = model
        if prefix is not None and (prefix.cache is None or not use_cache):
            latents, prefix = [torch.cat([prefix.latents, x]) for x in latents], None
        inputs, valid = _rows(model, latents, start=prefix is None and model.config.start_latent)
        self.counts = valid.sum(1).tolist()
        if prefix is None:
            self.states, cache = _run(model, inputs, valid, use_cache=use_cache)
        else:
            self.states, cache = self._run_after(prefix, inputs, valid)
            self.counts = [n + prefix.states.shape[1] for n in self.counts]
        self.hidden_states = self.states[:, -1]
        self.cache_bytes = 0
        self._store: _Store | None = None
        self._inputs: list[Tensor] = []
        if use_cache and _plain(cache):
            columns = [n * model.latents for n in self.counts]
            self._store = _Store(cache, columns, model.latents, kind, self.states.device)
            self.cache_bytes = self._store.nbytes
        else:
            width = inputs.shape[1]
            self._inputs = [row[width - n :] for row, n in zip(inputs, self.counts, strict=True)]

    def told(self, row: int, sentences: int) -> Tensor:
        """What predicted the last ``sentences`` of a text as it was read: ``[n, k, H]``, zeros where nothing did."""
        start = int(self.model.config.start_latent)
        real = self.states[row, self.states.shape[1] - sentences - start : -1]
        nothing = real.new_zeros(1 - start, *real.shape[1:])
        return torch.cat([nothing, real])[:sentences]

    def append(self, rows: Sequence[int], latents: Tensor) -> None:
        """One more sentence in some texts: ``[b, k, H]``."""
        index = torch.tensor(rows, device=latents.device)
        for row in rows:
            self.counts[row] += 1
        if self._store is None:
            for row, told in zip(rows, latents, strict=True):
                self._inputs[row] = torch.cat([self._inputs[row], told[None]])
            chosen = [self._inputs[row] for row in rows]
            width = max(map(len, chosen))
            inputs = latents.new_zeros(len(rows), width, *latents.shape[1:])
            for place, told in zip(inputs, chosen, strict=True):
                place[width - len(told) :] = told
            lengths = torch.tensor([len(told) for told in chosen], device=latents.device)
            valid = torch.arange(width, device=latents.device) >= width - lengths[:, None]
            states, _ = _run(self.model, inputs, valid, use_cache=False)
        else:
            cache, past = self._store.lend(rows)
            ids = torch.where(past, 0, -1)
            states, _ = self.model.backbone_states(
                latents[:, None],
                past.new_ones(len(rows), 1),
                ids.new_zeros(len(rows), 1),
                torch.tensor([self.counts[row] - 1 for row in rows], device=latents.device)[:, None],
                past_key_values=cache,
                past_passage_ids=ids,
                use_cache=True,
            )
            self._store.extend(rows)
        self.hidden_states = self.hidden_states.index_copy(0, index, states[:, -1])

    def keep(self, rows: list[int]) -> None:
        """Drop all other texts."""
        index = torch.tensor(rows, device=self.hidden_states.device)
        self.counts = [self.counts[row] for row in rows]
        self.hidden_states = self.hidden_states[index]
        if self._store is None:
            self._inputs = [self._inputs[row] for row in rows]
        else:
            self._store.keep(rows)

    def _run_after(self, prefix: Prefix, inputs: Tensor, valid: Tensor) -> tuple[Tensor, DynamicCache]:
        """The same after a prefix, whose states and cache come first in the results of every row."""
        assert prefix.cache is not None
        rows, width = valid.shape
        past, k = prefix.states.shape[1], self.model.latents
        cache = DynamicCache()
        for number, layer in enumerate(prefix.cache):
            cache.update(*(x.expand(rows, -1, -1, -1) for x in layer), number)
        states = prefix.states.expand(rows, -1, -1, -1)
        if not width:
            return states, cache
        ids = torch.where(valid, 0, -1)
        own, _ = self.model.backbone_states(  # the cache grows in place
            inputs,
            valid,
            ids,
            past + (valid.long().cumsum(1) - 1).clamp_min(0),
            past_key_values=cache,
            past_passage_ids=ids.new_zeros(rows, past),
            use_cache=True,
        )
        # Padding stands between the prefix and what is shorter than the longest: it goes to the left of both.
        padding = width - valid.sum(1, keepdim=True)
        order = torch.arange(past + width, device=valid.device).expand(rows, -1)
        order = torch.where(order < padding, past + order, order - padding * (order < past + padding))
        states = torch.cat([states, own], 1)[torch.arange(rows, device=valid.device)[:, None], order]
        columns = (order[:, :, None] * k + torch.arange(k, device=valid.device)).flatten(1)[:, None, :, None]
        for layer in cache.layers:
            layer.keys, layer.values = (
                x.gather(2, columns.to(x.device).expand(-1, x.shape[1], -1, x.shape[3]))
                for x in (layer.keys, layer.values)
            )
        return states, cache


def _rows(model: SentenceLM, latents: Sequence[Tensor], *, start: bool) -> tuple[Tensor, Tensor]:
    """Texts side by side, padded on the left: inputs ``[B, N, k, H]`` and where they are real ``[B, N]``."""
    device = latents[0].device
    width = max(map(len, latents)) + start
    index = torch.full((len(latents), width), PADDING, device=device)
    offset = 0
    for row, x in enumerate(latents):
        begin = width - len(x)
        index[row, begin:] = torch.arange(offset, offset + len(x), device=device)
        if start:
            index[row, begin - 1] = START
        offset += len(x)
    joined = torch.cat(list(latents))
    if not len(joined):
        joined = joined.new_zeros(1, *joined.shape[1:])
    return model.rows(joined, index), index != PADDING


def _run(model: SentenceLM, inputs: Tensor, valid: Tensor, *, use_cache: bool) -> tuple[Tensor, Any]:
    """The backbone over whole rows ``[R, N, k, H]``, padded on the left."""
    positions = (valid.long().cumsum(1) - 1).clamp_min(0)
    return model.backbone_states(inputs, valid, torch.where(valid, 0, -1), positions, use_cache=use_cache)


def _plain(cache: Any) -> bool:
    """Whether a cache is keys and values and nothing else, so that a text's own can be taken out of it."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


class _Columns:
    """Keys or values of one layer, ``[B, capacity, heads, d]``: a text's columns are rows of memory, copied in one go.

    Args:
        states: ``[B, heads, N, d]``.
        kind: in 8 bits they have a scale a head and column; offloaded ones lie in the computer's memory.
    """

    def __init__(self, states: Tensor, kind: CacheKind) -> None:
        self.dtype, self.device = states.dtype, states.device
        self.home = torch.device("cpu") if kind.startswith("offloaded") else states.device
        self.int8 = kind.endswith("int8")
        self.parts = [x.contiguous() for x in self._written(states.transpose(1, 2))]

    def _written(self, states: Tensor) -> list[Tensor]:
        if not self.int8:
            return [states.to(self.home)]
        scales = (states.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(self.dtype).tiny)
        return [(states / scales).round().to(torch.int8).to(self.home), scales.to(self.home)]

    def at(self, places: Tensor) -> Tensor:
        """``[b, L]`` numbers of columns of all texts to ``[b, L, heads, d]``."""
        places = places.to(self.home)
        found = [part.flatten(0, 1)[places].to(self.device) for part in self.parts]
        return found[0] if len(found) == 1 else found[0].to(self.dtype) * found[1]

    def put(self, rows: Tensor, columns: Tensor, states: Tensor) -> None:
        """Write ``[b, heads, n, d]`` at columns ``[b, n]`` of texts ``[b, 1]``."""
        new = self._written(states.transpose(1, 2))
        rows, columns = rows.to(self.home), columns.to(self.home)
        for part, value in zip(self.parts, new, strict=True):
            part[rows, columns] = value

    def grow(self, columns: int) -> None:
        self.parts = [torch.cat([x, x.new_zeros(len(x), columns, *x.shape[2:])], 1) for x in self.parts]

    def keep(self, rows: Tensor) -> None:
        self.parts = [x[rows.to(self.home)] for x in self.parts]

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.parts)


class _Store:
    """Keys and values of texts that grow by themselves: each text's columns lie together, wherever they end.

    Args:
        cache: after the texts were read, padded on the left. It is emptied layer by layer, so that no more than one
            layer is in memory twice.
        columns: of each text.
        step: columns a cell.
        kind: how they are kept.
        device: of what the backbone reads; its layers may lie on others.
    """

    def __init__(
        self, cache: Any, columns: list[int], step: int, kind: CacheKind, device: torch.device
    ) -> None:
        self.step = step
        self.columns = columns
        self.capacity = max(columns)
        self.ends = [self.capacity] * len(columns)
        self.device = device
        self.layers: list[tuple[_Columns, _Columns]] = []
        while cache.layers:
            layer = cache.layers.pop(0)
            self.layers.append((_Columns(layer.keys, kind), _Columns(layer.values, kind)))

    @property
    def nbytes(self) -> int:
        return sum(columns.nbytes for layer in self.layers for columns in layer)

    def lend(self, rows: Sequence[int]) -> tuple[DynamicCache, Tensor]:
        """A cache of some texts, padded on the left, that takes one more cell of each; which cells hold something.

        Returns:
            the cache, which writes what it is given into this store, and ``[b, N]``. After the backbone has used it,
            call :meth:`extend`.
        """
        if max(self.ends[row] for row in rows) + self.step > self.capacity:
            for columns in itertools.chain.from_iterable(self.layers):
                columns.grow(SPARE_CELLS * self.step)
            self.capacity += SPARE_CELLS * self.step
        longest = max(self.columns[row] for row in rows)
        ends = torch.tensor([self.ends[row] for row in rows], device=self.device)[:, None]
        within = ends - longest + torch.arange(longest + self.step, device=self.device)
        index = torch.tensor(rows, device=self.device)[:, None]
        places = index * self.capacity + within.clamp_min(0)
        cache = DynamicCache()
        cache.layers = [
            _Lent(keys, values, index, within[:, longest:], places) for keys, values in self.layers
        ]
        counts = torch.tensor([self.columns[row] for row in rows], device=self.device) // self.step
        cells = torch.arange(longest // self.step, device=self.device)
        return cache, cells >= longest // self.step - counts[:, None]

    def extend(self, rows: Sequence[int]) -> None:
        """Count the cell that was added to each of these texts."""
        for row in rows:
            self.ends[row] += self.step
            self.columns[row] += self.step

    def keep(self, rows: list[int]) -> None:
        """Drop all other texts."""
        index = torch.tensor(rows, device=self.device)
        for layer in self.layers:
            for columns in layer:
                columns.keep(index)
        self.ends, self.columns = [self.ends[row] for row in rows], [self.columns[row] for row in rows]


class _Lent(DynamicLayer):
    """One layer of some texts, taken out of the store when the backbone comes to it and not before: a copy of one
    layer is all the memory that reading on takes.

    Args:
        keys: of all texts.
        values: likewise.
        rows: ``[b, 1]`` which texts.
        new: ``[b, step]`` columns of each text where the next cell goes.
        places: ``[b, past + step]`` of the whole, as :meth:`_Columns.at` counts them.
    """

    def __init__(self, keys: _Columns, values: _Columns, rows: Tensor, new: Tensor, places: Tensor) -> None:
        super().__init__()
        self.columns = keys, values
        self.rows, self.new, self.places = rows, new, places

    def get_seq_length(self) -> int:
        return self.places.shape[1] - self.new.shape[1]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = (
            self._joined(columns, states)
            for columns, states in zip(self.columns, (key_states, value_states), strict=True)
        )
        return keys, values

    def _joined(self, columns: _Columns, states: Tensor) -> Tensor:
        """Write a cell's states, and return all with them as they were computed: what is rounded is for later."""
        columns.put(self.rows, self.new, states)
        whole = columns.at(self.places).transpose(1, 2)
        whole[:, :, -states.shape[2] :] = states
        return whole
