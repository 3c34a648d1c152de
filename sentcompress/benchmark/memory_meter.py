"""Memory: exact cache bytes per token of text, slope of allocated memory, longest context in a budget."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from sentcompress.benchmark.measurement import SENTENCE_MODEL
from sentcompress.benchmark.measurements.memory import MemoryReport
from sentcompress.contracts.causal_lm import CACHE, UNLIMITED_POSITIONS, position_limit
from sentcompress.errors import RunError
from sentcompress.generation import GenerationSettings, SentenceGenerator
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.recipe.sections import CacheKind

UNLIMITED_TEXT = 2048
"""Tokens of text measured where the backbone has no limit, as with ALiBi."""
SLOPE_TOKENS = 512
"""The fewest tokens for a slope: over fewer, the steps in which a cache grows distort it."""
BUDGET_BYTES = 2**30
"""Default bytes of cache for which the longest context is computed."""


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of live tensors, and their peak: exact, and the same on every device.

    Tensors made before (the weights) are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._sizes or key in given:  # a view, or written in place
                continue
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, key)
        return out

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)

    def lap(self) -> int:
        """The peak since the last lap."""
        peak, self.peak = self.peak, self.live
        return peak


def cache_tensors(cache: Any) -> list[Tensor]:
    """The keys and values of a transformers cache."""
    found = [t for layer in cache.layers for t in (layer.keys, layer.values) if isinstance(t, Tensor)]
    if not found:
        raise RunError(f"the cache of type {type(cache).__name__} has no tensors that can be counted")
    return found


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of their elements."""
    return sum(t.numel() * t.element_size() for t in tensors)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters; shared ones count once."""
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())


@torch.no_grad()
def measure_memory(
    model: SentenceLM,
    backbone: PreTrainedModel,
    *,
    sentences: Sequence[Sequence[int]],
    sentence_lengths: Sequence[int],
    new_tokens: int,
    bos_token_id: int,
    budget: int = BUDGET_BYTES,
    cache: CacheKind = "full",
) -> list[MemoryReport]:
    """Measure both models on the same text.

    Args:
        sentences: held-out text (or random tokens); as many tokens are used as the backbone has positions.
        sentence_lengths: forced lengths of the sentences written for the slope.
        new_tokens: tokens generated for the slope, at least :data:`SLOPE_TOKENS` if the backbone has the positions.
        cache: how the sentence model keeps the backbone's keys and values.
    """
    limit = position_limit(backbone.config)
    if limit == UNLIMITED_POSITIONS:
        limit = UNLIMITED_TEXT
    text = _take(sentences, limit - 1, model.backbone.max_positions // model.latents - 1)
    tokens = sum(map(len, text))
    new_tokens = min(max(new_tokens, SLOPE_TOKENS), limit - 2)
    return [
        _backbone_report(backbone.eval(), text, bos_token_id, new_tokens, limit, budget),
        _sentence_report(model.eval(), text, tokens, list(sentence_lengths), new_tokens, budget, cache),
    ]


def _take(sentences: Sequence[Sequence[int]], tokens: int, count: int) -> list[list[int]]:
    """Whole sentences from the beginning: at most ``count``, and of at most ``tokens`` tokens; at least one."""
    chosen: list[list[int]] = []
    total = 0
    for sentence in sentences:
        if chosen and (total + len(sentence) > tokens or len(chosen) == count):
            break
        chosen.append(list(sentence)[:tokens])
        total += len(chosen[-1])
    return chosen


def _backbone_report(
    model: PreTrainedModel, text: list[list[int]], bos: int, new_tokens: int, limit: int, budget: int
) -> MemoryReport:
    device = next(model.parameters()).device
    ids = torch.tensor([[token for sentence in text for token in sentence]], device=device)
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1)[CACHE]
    size = tensor_bytes(cache_tensors(cache))
    per_token = size / ids.shape[1]
    start = torch.tensor([[bos]], device=device)

    def generate(lap: Callable[[int], None]) -> None:
        class Lap(LogitsProcessor):
            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                lap(input_ids.shape[1])
                return scores

        model.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=model.config.pad_token_id,
            logits_processor=LogitsProcessorList([Lap()]),
        )

    series = _series(generate)
    return MemoryReport(
        system="backbone",
        weight_bytes=weight_bytes(model),
        cache_bytes_per_token=per_token,
        cache_bytes_per_position=round(per_token),
        transient_bytes=0,
        peak_slope_bytes_per_token=_slope(series),
        series=series,
        budget_bytes=budget,
        longest_context_tokens=int(budget // per_token),
        position_limit_tokens=limit,
    )


def _sentence_report(
    model: SentenceLM,
    text: list[list[int]],
    tokens: int,
    lengths: list[int],
    new_tokens: int,
    budget: int,
    cache: CacheKind,
) -> MemoryReport:
    generator = SentenceGenerator(model, None)
    generator.head("auto")  # made before anything is counted: it does not grow with the text
    # The start position is the same for every text: it is not counted as part of the text.
    prefilled = generator.prefill([text], cache)
    if not prefilled.cache_bytes:
        raise RunError("the backbone's cache holds more than keys and values, so its bytes cannot be counted")
    per_position = prefilled.cache_bytes // (prefilled.lengths[0] * model.latents)
    per_token = per_position * model.latents * len(text) / tokens
    transient = decoder_cache_bytes(model)
    settings = GenerationSettings(
        max_new_tokens=new_tokens, stop_threshold=1, sentence_lengths=tuple(lengths), cache=cache
    )

    def generate(lap: Callable[[int], None]) -> None:
        done = len(text[0])
        for _, sentence in generator.continue_sentences([text[:1]], settings):
            done += len(sentence)
            lap(done)

    series = _series(generate)
    return MemoryReport(
        system=SENTENCE_MODEL,
        weight_bytes=weight_bytes(model),
        cache_bytes_per_token=per_token,
        cache_bytes_per_position=per_position,
        transient_bytes=transient,
        peak_slope_bytes_per_token=_slope(series),
        series=series,
        budget_bytes=budget,
        longest_context_tokens=int((budget - transient) // per_token),
        position_limit_tokens=int(model.backbone.max_positions // model.latents * tokens / len(text)),
    )


@torch.no_grad()
def decoder_cache_bytes(model: SentenceLM) -> int:
    """Bytes of the decoder's keys and values for one text, after the longest sentence it can write."""
    decoder: Any = model.vae.decoder
    latents = model.termination.weight.new_zeros(1, model.latents, model.vae.config.hidden_size)
    cache = decoder.allocate(1, latents)
    unread = decoder.restart(cache, torch.zeros(1, dtype=torch.long, device=latents.device), latents)
    for _ in range(unread + 1 + model.config.vae_config.max_sentence_tokens):
        decoder.step(latents[:, 0], cache)
    return tensor_bytes([t for layer in cache.layers for t in (layer.keys, layer.values)])


def _series(generate: Callable[[Callable[[int], None]], None]) -> list[tuple[int, int]]:
    """Tokens of text, and peak of allocated bytes since the previous point."""
    points: list[tuple[int, int]] = []
    with _meter() as meter:
        generate(lambda tokens: points.append((tokens, meter.lap())))
    return points


@contextmanager
def _meter() -> Iterator[MemoryMeter]:
    meter = MemoryMeter()
    with meter:
        yield meter


def _slope(series: Sequence[tuple[int, int]]) -> float:
    """Bytes per token, by a straight line through the points without the first ones, which are the prompt's."""
    points = np.array(series[len(series) // 10 :], dtype=np.float64)
    if len(np.unique(points[:, 0])) < 2:
        return 0.0
    return float(np.polyfit(points[:, 0], points[:, 1], 1)[0])
