"""How a memory takes part in an LLM's attention, through the attention interface of transformers.

A cache gets the keys and values of a block (``update``) and right after it the attention function gets the queries. The
function below hands them to the cache that was updated last in its thread.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from sentcompress.errors import InputError, RunError
from sentcompress.sentence_memory.policy import Policy
from sentcompress.sentence_memory.visibility import Layout, Masks, attend_in_one_pass

IMPLEMENTATION = "sentence_memory"
"""Name of the attention function in transformers."""
_updated = threading.local()


class Attends(Protocol):
    """A cache of one block that computes the block's attention itself."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Attention of new tokens ``[B, heads, Q, D]``; ``key`` and ``value`` are theirs, ``[B, kv heads, Q, D]``."""


def expect_queries(layer: Attends) -> None:
    """Called by the cache of a block in its ``update``: the attention that follows is its own."""
    _updated.layer = layer


class _NoGradient(torch.autograd.Function):
    """Refuses training, which would silently leave out what flows through keys and values."""

    @staticmethod
    def forward(_: Any, __: Tensor, out: Tensor) -> Tensor:
        return out

    @staticmethod
    def backward(_: Any, __: Tensor) -> None:
        raise InputError(
            "gradients do not flow through a sentence memory", fix="train with: sentcompress train-memory"
        )


def without_gradient(query: Tensor, out: Tensor) -> Tensor:
    """Attention ``out`` that was computed without a gradient; a backward pass through it raises InputError."""
    refused: Tensor = _NoGradient.apply(query, out)
    return refused


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - memories make their own masks
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function: signature and result of transformers, ``[B, Q, heads, D]``."""
    layer, _updated.layer = getattr(_updated, "layer", None), None
    if layer is None:
        raise RunError(
            f"{type(module).__name__} attends without updating the memory",
            fix="use the LLM with a memory in one thread at a time, or without a memory",
        )
    out = layer.attend(
        query,
        key,
        value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        dropout=dropout,
        softcap=softcap,
        sinks=s_aux,
    )
    return out.transpose(1, 2).contiguous(), None


def _no_mask(**_: Any) -> None:
    """Memories make their own masks."""


AttentionInterface.register(IMPLEMENTATION, torch.compiler.disable(_attention))
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)


_configs: weakref.WeakKeyDictionary[PreTrainedModel, list[Any]] = weakref.WeakKeyDictionary()


def attention_configs(model: PreTrainedModel) -> list[Any]:
    """The configurations that the modules of an LLM read, each once."""
    if model not in _configs:  # looking for them takes longer than a small LLM's step
        found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
        _configs[model] = list(found.values())
    return _configs[model]


@contextmanager
def memory_attention(model: PreTrainedModel) -> Iterator[None]:
    """For a block in which the LLM's attention is that of its memory."""
    configs = attention_configs(model)
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = IMPLEMENTATION
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


class KeepsNothing(CacheLayerMixin):
    """A cache of one block that computes attention (:class:`Attends`) and keeps nothing for later calls."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        raise NotImplementedError

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        expect_queries(self)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1


class OnePassLayer(KeepsNothing):
    """A block's part of :class:`OnePassMemory`."""

    def __init__(self, layout: Layout, policy: Policy, masks: Masks) -> None:
        super().__init__()
        self.layout, self.policy, self.masks = layout, policy, masks

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return attend_in_one_pass(query, key, value, self.layout, self.policy, masks=self.masks, **options)


class OnePassMemory(Cache):
    """Gives whole texts to an LLM with a memory in effect, and keeps nothing: for training, where gradients flow.

    Use it within :func:`memory_attention`, with ``position_ids`` where texts are packed::

        with memory_attention(model):
            model(input_ids=ids, position_ids=..., past_key_values=OnePassMemory(layout, policy, blocks, [17, 18]))

    Args:
        layout: of the tokens, ``[B, T]``.
        blocks: number of the LLM's blocks.
        recall_blocks: the numbers of those that recall.
    """

    def __init__(
        self, layout: Layout, policy: Policy, blocks: int, recall_blocks: Sequence[int] = ()
    ) -> None:
        masks: Masks = {}  # the same in all blocks
        policies = [policy if n in recall_blocks else policy.without_recall for n in range(blocks)]
        super().__init__(layers=[OnePassLayer(layout, own, masks) for own in policies])
