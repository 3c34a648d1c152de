"""The caches of several texts as one, so that an LLM writes them in one call; texts join and leave between calls."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sentcompress.sentence_memory.sentence_cache import SentenceMemory

WITHOUT_POSITIONS = {"bloom", "mpt"}
"""LLMs that take no positions and have none: their attention knows distances (ALiBi)."""


class OneRow:
    """The cache of one text, whatever it is made of; others cannot join.

    Attributes:
        cache: ``past_key_values`` for the LLM.

    Args:
        lengths: tokens of each text.
    """

    def __init__(self, cache: Any, lengths: Sequence[int]) -> None:
        self.cache = cache

    def takes(self, cache: Any) -> bool:
        """Whether the texts of this cache can join."""
        return False

    def join(self, cache: Any, lengths: Sequence[int]) -> None:
        """Add the texts of a cache, which is not used any more, as the last rows."""
        raise NotImplementedError

    def select(self, rows: Sequence[int]) -> None:
        """Only keep some texts, at least one."""

    def inputs(self) -> dict[str, Any]:
        """Arguments of a call with one new token for each text."""
        return {"past_key_values": self.cache}

    def wrote(self, cache: Any) -> None:
        """Such a call has returned this cache."""
        self.cache = cache

    def nbytes(self) -> tuple[int, int, int]:
        """As :func:`cache_bytes`."""
        return cache_bytes(self.cache)

    def text_bytes(self, row: int) -> tuple[int, int, int]:
        """As :func:`cache_bytes`, of one text, without padding and room to grow."""
        return cache_bytes(self.cache)

    def recalled(self) -> int:
        """Sentences that the last token of each text recalled, all together."""
        return 0

    def recall_shares(self, rows: Sequence[int]) -> Sequence[Mapping[tuple[int, int], float]]:
        """The sentences that the last token of each of these texts recalled, as tokens, with the share of the heads."""
        return [{} for _ in rows]


class MemoryRows(OneRow):
    """Texts with a sentence memory."""

    cache: SentenceMemory

    def takes(self, cache: Any) -> bool:
        return True

    def join(self, cache: SentenceMemory, lengths: Sequence[int]) -> None:
        self.cache.join(cache)

    def select(self, rows: Sequence[int]) -> None:
        self.cache.batch_select_indices(torch.tensor(rows))

    def text_bytes(self, row: int) -> tuple[int, int, int]:
        return self.cache.text_bytes(row)

    def recalled(self) -> int:
        return self.cache.recalled_number()

    def recall_shares(self, rows: Sequence[int]) -> Sequence[Mapping[tuple[int, int], float]]:
        return self.cache.recall_shares(rows)


class PaddedRows(OneRow):
    """Texts with the LLM's own cache of keys and values, padded on the left to the longest of them."""

    def __init__(self, cache: Any, lengths: Sequence[int]) -> None:
        super().__init__(cache, lengths)
        self._lengths = [*lengths]

    def takes(self, cache: Any) -> bool:
        return is_padded(cache)

    def join(self, cache: Any, lengths: Sequence[int]) -> None:
        for layer, new in zip(self.cache.layers, cache.layers, strict=True):
            if layer.is_initialized:
                number = max(layer.keys.shape[2], new.keys.shape[2])
                for name in ("keys", "values"):
                    parts = (_last_columns(getattr(each, name), number) for each in (layer, new))
                    setattr(layer, name, torch.cat([*parts]))
        self._lengths += lengths
        self._count()

    def select(self, rows: Sequence[int]) -> None:
        self._lengths = [self._lengths[row] for row in rows]
        for layer in self.cache.layers:
            if layer.is_initialized:
                number = min(layer.keys.shape[2], max(self._lengths))
                for name in ("keys", "values"):
                    setattr(layer, name, _last_columns(getattr(layer, name), number)[[*rows]])
        self._count()

    def _count(self) -> None:
        for layer in self.cache.layers:
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = max(self._lengths)

    def inputs(self) -> dict[str, Any]:
        longest = max(self._lengths)
        before = torch.arange(
            longest - 1, -2, -1
        )  # tokens of the text between a column and the new token, at least
        mask = (before < torch.tensor(self._lengths)[:, None]).long()
        return {"past_key_values": self.cache, "attention_mask": mask.to(_tensors(self.cache)[0].device)}

    def wrote(self, cache: Any) -> None:
        super().wrote(cache)
        self._lengths = [length + 1 for length in self._lengths]

    def text_bytes(self, row: int) -> tuple[int, int, int]:
        held = sum(
            part[0, :, 0].nbytes * min(part.shape[2], self._lengths[row]) for part in _tensors(self.cache)
        )
        return held, 0, held


def side_by_side(model: PreTrainedModel) -> bool:
    """Whether an LLM can write texts of different lengths in one call, each as it would alone."""
    config = model.config.get_text_config(decoder=True)
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "longrope":
        return False  # the longest text of a call decides how the keys of all of them are rotated
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    return takes_positions or config.model_type in WITHOUT_POSITIONS


def rows_of(cache: Any, lengths: Sequence[int]) -> OneRow:
    """The beginning of a batch: the cache of its first texts, and their tokens."""
    if isinstance(cache, SentenceMemory):
        return MemoryRows(cache, lengths)
    return (PaddedRows if is_padded(cache) else OneRow)(cache, lengths)


def is_padded(cache: Any) -> bool:
    """Whether a cache only has keys and values, which another text's can stand beside."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return bool(cache.layers) and all(type(layer) in kinds for layer in cache.layers)


def cache_bytes(cache: Any) -> tuple[int, int, int]:
    """Bytes of a cache on the device and in slow storage, and what the LLM's own would hold of the same tokens."""
    if isinstance(cache, SentenceMemory):
        return cache.device_bytes(), cache.storage_bytes(), cache.full_bytes()
    held = sum(tensor.nbytes for tensor in _tensors(cache))
    return held, 0, held


def _tensors(cache: Any) -> list[Tensor]:
    states = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return [tensor for tensor in states if isinstance(tensor, Tensor)]


def _last_columns(states: Tensor, number: int) -> Tensor:
    """The last columns of keys or values ``[B, kv heads, T, D]``, with zeros before them if there are fewer."""
    return functional.pad(states, (0, 0, number - states.shape[2], 0))
