"""The backbone during generation: its keys and values, and the state that predicts the next sentence."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from sentcompress.modeling.sentence_lm import PADDING, START, SentenceLM
from sentcompress.recipe.sections import CacheKind

if TYPE_CHECKING:
    from sentcompress.generation.prefix import Prefix

GROWTH_SLOTS = 16
"""Slots added per text when the cache has to grow."""


class BackboneCache:
    """What the backbone has read of a batch of texts: one slot per sentence, and one for the start latent.

    Each text grows independently.

    Args:
        model: in eval mode.
        latents: ``[n, k, H]`` of each text's sentences, without those of ``prefix``.
        use_cache: False runs the backbone over everything again each time. So do backbones whose cache holds more than
            keys and values.
        kind: how to store keys and values (:class:`sentcompress.generation.GenerationSettings`).
        prefix: the beginning that all texts share.

    Attributes:
        lengths: slots used by each text.
        hidden_states: ``[B, k, H]``, the conditioning of each text's next sentence.
        cache_bytes: bytes of the keys and values of the texts at the beginning, padding included.
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
        inputs, valid = batch_texts(model, latents, start=prefix is None and model.config.start_latent)
        self.lengths = valid.sum(1).tolist()
        if prefix is None:
            self.states, cache = run_backbone(model, inputs, valid, use_cache=use_cache)
        else:
            self.states, cache = prefix.run(model, inputs, valid)
            self.lengths = [n + prefix.states.shape[1] for n in self.lengths]
        self.hidden_states = self.states[:, -1]
        self.cache_bytes = 0
        self._store: _KeyValueStore | None = None
        self._inputs: list[Tensor] = []
        if use_cache and holds_only_keys_and_values(cache):
            columns = [n * model.latents for n in self.lengths]
            self._store = _KeyValueStore(cache, columns, model.latents, kind, self.states.device)
            self.cache_bytes = self._store.nbytes
        else:
            width = inputs.shape[1]
            self._inputs = [row[width - n :] for row, n in zip(inputs, self.lengths, strict=True)]

    def conditioning(self, row: int, sentences: int) -> Tensor:
        """The states that predict the last ``sentences`` of a text as it was read: ``[n, k, H]``, else zeros."""
        start = int(self.model.config.start_latent)
        real = self.states[row, self.states.shape[1] - sentences - start : -1]
        padding = real.new_zeros(1 - start, *real.shape[1:])
        return torch.cat([padding, real])[:sentences]

    def read(self, row: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]] | None]:
        """States ``[1, n, k, H]`` of a text as it was read, and keys and values ``[1, heads, columns, d]`` by layer.

        The latter is None if the cache holds more than keys and values.
        """
        states = self.states[row : row + 1, self.states.shape[1] - self.lengths[row] :].clone()
        return states, None if self._store is None else self._store.read(row)

    def append(self, rows: Sequence[int], latents: Tensor) -> None:
        """Append one sentence to some texts: ``[b, k, H]``."""
        index = torch.tensor(rows, device=latents.device)
        for row in rows:
            self.lengths[row] += 1
        if self._store is None:
            for row, latent in zip(rows, latents, strict=True):
                self._inputs[row] = torch.cat([self._inputs[row], latent[None]])
            chosen = [self._inputs[row] for row in rows]
            width = max(map(len, chosen))
            inputs = latents.new_zeros(len(rows), width, *latents.shape[1:])
            for padded, own in zip(inputs, chosen, strict=True):
                padded[width - len(own) :] = own
            lengths = torch.tensor([len(own) for own in chosen], device=latents.device)
            valid = torch.arange(width, device=latents.device) >= width - lengths[:, None]
            states, _ = run_backbone(self.model, inputs, valid, use_cache=False)
        else:
            cache, past = self._store.view(rows)
            ids = torch.where(past, 0, -1)
            states, _ = self.model.backbone_states(
                latents[:, None],
                past.new_ones(len(rows), 1),
                ids.new_zeros(len(rows), 1),
                torch.tensor([self.lengths[row] - 1 for row in rows], device=latents.device)[:, None],
                past_key_values=cache,
                past_passage_ids=ids,
                use_cache=True,
            )
            self._store.extend(rows)
        self.hidden_states = self.hidden_states.index_copy(0, index, states[:, -1])

    def join(self, other: BackboneCache) -> None:
        """Add the texts of another cache of the same kind as the last rows."""
        self.lengths += other.lengths
        self.hidden_states = torch.cat([self.hidden_states, other.hidden_states])
        self.states = self.states[:0]  # the prompts that it began with are read
        if self._store is None or other._store is None:
            self._inputs += other._inputs
        else:
            self._store.join(other._store)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the keys and values now, with room to grow."""
        return 0 if self._store is None else self._store.nbytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of the keys and values of one slot; 0 if they are not kept."""
        return 0 if self._store is None else self._store.nbytes // self._store.slots

    def keep(self, rows: list[int]) -> None:
        """Drop all other texts."""
        index = torch.tensor(rows, device=self.hidden_states.device)
        self.lengths = [self.lengths[row] for row in rows]
        self.hidden_states = self.hidden_states[index]
        if self._store is None:
            self._inputs = [self._inputs[row] for row in rows]
        else:
            self._store.keep(rows)


def batch_texts(model: SentenceLM, latents: Sequence[Tensor], *, start: bool) -> tuple[Tensor, Tensor]:
    """Texts in one batch, padded on the left: inputs ``[B, N, k, H]`` and their mask ``[B, N]``."""
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


def run_backbone(model: SentenceLM, inputs: Tensor, valid: Tensor, *, use_cache: bool) -> tuple[Tensor, Any]:
    """Run the backbone over whole texts ``[B, N, k, H]``, padded on the left."""
    positions = (valid.long().cumsum(1) - 1).clamp_min(0)
    return model.backbone_states(inputs, valid, torch.where(valid, 0, -1), positions, use_cache=use_cache)


def holds_only_keys_and_values(cache: Any) -> bool:
    """Whether a cache holds nothing but keys and values, so that those of one text can be taken out."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


class _StoredStates:
    """Keys or values of one layer, ``[B, capacity, heads, d]``, so that the columns of one text are contiguous.

    Args:
        states: ``[B, heads, N, d]``.
        kind: 8-bit states have one scale per head and column; offloaded ones are in the computer's memory.
    """

    def __init__(self, states: Tensor, kind: CacheKind) -> None:
        self.dtype, self.device = states.dtype, states.device
        self.storage_device = torch.device("cpu") if kind.startswith("offloaded") else states.device
        self.int8 = kind.endswith("int8")
        self.tensors = [x.contiguous() for x in self._encoded(states.transpose(1, 2))]

    def _encoded(self, states: Tensor) -> list[Tensor]:
        if not self.int8:
            return [states.to(self.storage_device)]
        scales = (states.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(self.dtype).tiny)
        return [
            (states / scales).round().to(torch.int8).to(self.storage_device),
            scales.to(self.storage_device),
        ]

    def at(self, columns: Tensor) -> Tensor:
        """The states at ``columns [b, L]``, counted over all texts: ``[b, L, heads, d]``."""
        columns = columns.to(self.storage_device)
        found = [tensor.flatten(0, 1)[columns].to(self.device) for tensor in self.tensors]
        return found[0] if len(found) == 1 else found[0].to(self.dtype) * found[1]

    def read(self, row: int, start: int, end: int) -> Tensor:
        """A copy of the states of one text: ``[1, heads, n, d]``."""
        parts = [tensor[row : row + 1, start:end].to(self.device) for tensor in self.tensors]
        full = parts[0] if len(parts) == 1 else parts[0].to(self.dtype) * parts[1]
        return full.transpose(1, 2).clone()

    def put(self, rows: Tensor, columns: Tensor, states: Tensor) -> None:
        """Write ``[b, heads, n, d]`` at columns ``[b, n]`` of texts ``[b, 1]``."""
        new = self._encoded(states.transpose(1, 2))
        rows, columns = rows.to(self.storage_device), columns.to(self.storage_device)
        for tensor, value in zip(self.tensors, new, strict=True):
            tensor[rows, columns] = value

    def grow(self, columns: int) -> None:
        self.tensors = [torch.cat([x, x.new_zeros(len(x), columns, *x.shape[2:])], 1) for x in self.tensors]

    def keep(self, rows: Tensor) -> None:
        self.tensors = [x[rows.to(self.storage_device)] for x in self.tensors]

    def join(self, other: _StoredStates) -> None:
        self.tensors = [torch.cat(pair) for pair in zip(self.tensors, other.tensors, strict=True)]

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors)


class _KeyValueStore:
    """Keys and values of texts that grow independently: the columns of one text are adjacent, wherever they end.

    Args:
        cache: of the texts, padded on the left. It is emptied layer by layer, so that at most one layer is in memory
            twice.
        columns: number of columns of each text.
        step: columns per slot.
        kind: how to store them.
        device: of the backbone's inputs; its layers may be on others.
    """

    def __init__(
        self, cache: Any, columns: list[int], step: int, kind: CacheKind, device: torch.device
    ) -> None:
        self.step = step
        self.columns = columns
        self.capacity = max(columns)
        self.ends = [self.capacity] * len(columns)
        self.device = device
        self.layers: list[tuple[_StoredStates, _StoredStates]] = []
        while cache.layers:
            layer = cache.layers.pop(0)
            self.layers.append((_StoredStates(layer.keys, kind), _StoredStates(layer.values, kind)))

    @property
    def nbytes(self) -> int:
        return sum(states.nbytes for states in itertools.chain.from_iterable(self.layers))

    @property
    def slots(self) -> int:
        """Slots of all texts, used or not."""
        return len(self.columns) * self.capacity // self.step

    def view(self, rows: Sequence[int]) -> tuple[DynamicCache, Tensor]:
        """A transformers cache of some texts, padded on the left, with room for one more slot each.

        Returns:
            the cache, which writes into this store, and the mask ``[b, N]`` of its slots. Call :meth:`extend` after the
            backbone has used it.
        """
        if max(self.ends[row] for row in rows) + self.step > self.capacity:
            self._grow(GROWTH_SLOTS * self.step)
        longest = max(self.columns[row] for row in rows)
        ends = torch.tensor([self.ends[row] for row in rows], device=self.device)[:, None]
        local = ends - longest + torch.arange(longest + self.step, device=self.device)
        index = torch.tensor(rows, device=self.device)[:, None]
        columns = index * self.capacity + local.clamp_min(0)
        cache = DynamicCache()
        cache.layers = [
            _LayerView(keys, values, index, local[:, longest:], columns) for keys, values in self.layers
        ]
        slots = torch.tensor([self.columns[row] for row in rows], device=self.device) // self.step
        index_of_slot = torch.arange(longest // self.step, device=self.device)
        return cache, index_of_slot >= longest // self.step - slots[:, None]

    def read(self, row: int) -> list[tuple[Tensor, Tensor]]:
        """A copy of the keys and values of one text, of each layer: ``[1, heads, columns, d]``."""
        span = self.ends[row] - self.columns[row], self.ends[row]
        return [(keys.read(row, *span), values.read(row, *span)) for keys, values in self.layers]

    def _grow(self, columns: int) -> None:
        """Add columns at the end."""
        for states in itertools.chain.from_iterable(self.layers):
            states.grow(columns)
        self.capacity += columns

    def join(self, other: _KeyValueStore) -> None:
        """Add the texts of another store; the smaller one of the two grows."""
        for store in (self, other):
            if (lacking := max(self.capacity, other.capacity) - store.capacity) > 0:
                store._grow(lacking)
        for own, others in zip(self.layers, other.layers, strict=True):
            for states, more in zip(own, others, strict=True):
                states.join(more)
        self.ends += other.ends
        self.columns += other.columns

    def extend(self, rows: Sequence[int]) -> None:
        """Count the slot that was added to each of these texts."""
        for row in rows:
            self.ends[row] += self.step
            self.columns[row] += self.step

    def keep(self, rows: list[int]) -> None:
        """Drop all other texts."""
        index = torch.tensor(rows, device=self.device)
        for states in itertools.chain.from_iterable(self.layers):
            states.keep(index)
        self.ends, self.columns = [self.ends[row] for row in rows], [self.columns[row] for row in rows]


class _LayerView(DynamicLayer):
    """One layer of some texts, copied from the store only when the backbone reaches the layer. So the view takes no
    more memory than a copy of one layer.

    Args:
        keys, values: of all texts.
        rows: ``[b, 1]``, the texts.
        new: ``[b, step]``, columns of each text where the next slot goes.
        columns: ``[b, past + step]``, all columns, as :meth:`_StoredStates.at` counts them.
    """

    def __init__(
        self, keys: _StoredStates, values: _StoredStates, rows: Tensor, new: Tensor, columns: Tensor
    ) -> None:
        super().__init__()
        self.stored = keys, values
        self.rows, self.new, self.columns = rows, new, columns

    def get_seq_length(self) -> int:
        return self.columns.shape[1] - self.new.shape[1]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = (
            self._joined(stored, states)
            for stored, states in zip(self.stored, (key_states, value_states), strict=True)
        )
        return keys, values

    def _joined(self, stored: _StoredStates, states: Tensor) -> Tensor:
        """Store the states of the new slot, and return all states, the new ones not rounded."""
        stored.put(self.rows, self.new, states)
        whole = stored.at(self.columns).transpose(1, 2)
        whole[:, :, -states.shape[2] :] = states
        return whole
