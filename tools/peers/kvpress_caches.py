"""kvpress's policies, and caches that they compress.

Needs kvpress; ``tools/peers/kvpress_rows.py`` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from kvpress import (
    AdaKVPress,
    BasePress,
    ChunkKVPress,
    CompactorPress,
    DecodingPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVzipPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from kvpress.utils import extract_keys_and_values
from transformers import DynamicCache

WINDOW = 32
"""Queries that SnapKV scores with. kvpress's default is 64, but each block read must be longer than this."""

Layers = list[tuple[torch.Tensor, torch.Tensor, Any]]
"""For each block its keys and values, each (batch, heads, tokens, head size), and the pairs that are masked or None."""


@dataclass(frozen=True)
class Policy:
    """How kvpress does it.

    Attributes:
        after_reading: makes the press that compresses a whole context.
        while_writing: makes the press that DecodingPress calls afterwards. None: it cannot.
        throughout: ``while_writing`` is the policy itself, so a context can be read with it block by block.
        own_pass: it reads the context again, so it cannot share a prefill.
    """

    after_reading: Callable[[], Any]
    while_writing: Callable[[], Any] | None
    throughout: bool = True
    own_pass: bool = False


class OrderedStreamingLLM(StreamingLLMPress):
    """StreamingLLM that can be called again.

    The shipped press scores with zeros and ones, and torch.topk returns equal scores in any order. So its second call
    takes any tokens for the sinks, and drops the wrong ones.
    """

    def compress(
        self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dropped = keys.shape[2] - int(keys.shape[2] * (1 - self.compression_ratio))
        keep = [*range(self.n_sink), *range(self.n_sink + dropped, keys.shape[2])]
        return keys[:, :, keep], values[:, :, keep]


def policies() -> dict[str, Policy]:
    """The policies by name. Settings are kvpress's own, as its evaluation registry has them, but for WINDOW."""

    snapkv = partial(SnapKVPress, window_size=WINDOW)

    def adaptive() -> AdaKVPress:
        return AdaKVPress(snapkv())

    return {
        "streaming_llm": Policy(StreamingLLMPress, StreamingLLMPress),
        "streaming_llm_ordered": Policy(OrderedStreamingLLM, OrderedStreamingLLM),
        "snapkv": Policy(snapkv, snapkv),
        "expected_attention": Policy(ExpectedAttentionPress, ExpectedAttentionPress),
        "keydiff": Policy(KeyDiffPress, KeyDiffPress),
        "chunkkv": Policy(lambda: ChunkKVPress(snapkv()), snapkv, throughout=False),
        "tova": Policy(TOVAPress, TOVAPress),
        "knorm": Policy(KnormPress, KnormPress),
        "adakv_snapkv": Policy(adaptive, adaptive),
        # Not while writing: what AdaKV masks has fake keys, which ExpectedAttention would score highest.
        "adakv_expected_attention": Policy(
            lambda: AdaKVPress(ExpectedAttentionPress(epsilon=1e-2)), None, throughout=False
        ),
        "compactor": Policy(CompactorPress, None, throughout=False),
        "kvzip_plus": Policy(
            lambda: KVzipPress(kvzip_plus_normalization=True), None, throughout=False, own_pass=True
        ),
    }


def ratio(tokens: int, kept: int) -> float:
    """The compression ratio at which int(tokens * (1 - ratio)) is ``kept``."""
    return max(0.0, 1 - (kept + 0.25) / tokens)


class _Together(BasePress):
    """Lets many presses compress the keys and values of one prefill, each for itself; the cache stays whole."""

    def __init__(self, presses: dict[Hashable, Any]) -> None:
        self.presses = presses
        self.layers: dict[Hashable, Layers] = {key: [] for key in presses}

    def post_init_from_model(self, model: Any) -> None:
        for press in self.presses.values():
            press.post_init_from_model(model)

    def forward_hook(self, module: Any, input: Any, kwargs: Any, output: Any) -> Any:
        keys, values = extract_keys_and_values(kwargs["past_key_values"], module.layer_idx)
        for key, press in self.presses.items():
            module.masked_key_indices = None
            kept = press.compress(module, kwargs["hidden_states"], keys, values, output[1], kwargs)
            # AdaKV returns what it was given, and its attention writes into masked keys.
            self.layers[key].append((kept[0].clone(), kept[1].clone(), module.masked_key_indices))
        module.masked_key_indices = None
        return output


def compress_together(
    model: Any, ids: torch.Tensor, presses: dict[Hashable, Callable[[], Any]], kept: dict[Hashable, int]
) -> tuple[Layers, dict[Hashable, Layers]]:
    """The whole cache of ``ids``, and the ``kept`` tokens that each press leaves of it."""
    made = {key: press() for key, press in presses.items()}
    for key, press in made.items():
        press.compression_ratio = ratio(len(ids), kept[key])
    together, cache = _Together(made), DynamicCache()
    with together(model):
        model.model(input_ids=ids[None], past_key_values=cache)
    return [(layer.keys, layer.values, None) for layer in cache.layers], together.layers


def compress_apart(model: Any, ids: torch.Tensor, press: Any, kept: int) -> Layers:
    """What a press leaves that needs passes of its own."""
    press.compression_ratio = ratio(len(ids), kept)
    for block in model.model.layers:
        block.self_attn.masked_key_indices = None
    cache = DynamicCache()
    with press(model):
        model.model(input_ids=ids[None], past_key_values=cache)
    attention = [block.self_attn for block in model.model.layers]
    return [
        (layer.keys, layer.values, own.masked_key_indices)
        for layer, own in zip(cache.layers, attention, strict=True)
    ]


def block_lengths(tokens: int, size: int) -> list[int]:
    """Lengths of blocks of ``size`` tokens. The first takes the remainder, so that no block is shorter than that."""
    return [tokens] if tokens < 2 * size else [size + tokens % size, *[size] * (tokens // size - 1)]


class Reading:
    """A cache under one policy, and what the model makes of it.

    Args:
        press: compresses to ``target`` tokens after each block that is read. None: nothing does.
        layers: what the cache begins with. None: it is empty.
        position: tokens read so far.

    ``most`` is the most tokens that it held, those being read included.
    """

    def __init__(
        self, model: Any, press: Any = None, target: int = 0, layers: Layers | None = None, position: int = 0
    ) -> None:
        self.model, self.position, self.most, self.cache = model, position, 0.0, DynamicCache()
        self.press = press and DecodingPress(press, 1, target, hidden_states_buffer_size=4096)
        for index, block in enumerate(model.model.layers):
            block.self_attn.masked_key_indices = layers and layers[index][2]
            if layers:
                self.cache.update(*layers[index][:2], index)

    def held(self) -> float:
        """Tokens that can be attended to, mean over blocks and heads. Masked pairs stay, but do not count."""
        counts = []
        for layer, block in zip(self.cache.layers, self.model.model.layers, strict=False):
            _, heads, tokens, _ = layer.keys.shape
            masked = block.self_attn.masked_key_indices
            counts.append(tokens - (len(masked[0]) if masked else 0) / heads)
        return sum(counts) / len(counts) if counts else 0.0

    def read(self, ids: torch.Tensor, size: int, logits: bool = True) -> torch.Tensor:
        """Read ``ids`` in blocks of ``size``, and return the logits, tokens by vocabulary, or hidden states."""
        found = []
        with self.press(self.model) if self.press else nullcontext():
            for part in ids.split(block_lengths(len(ids), size)):
                self.most = max(self.most, self.held() + len(part))
                positions = torch.arange(self.position, self.position + len(part))[None]
                model = self.model if logits else self.model.model
                out = model(part[None], past_key_values=self.cache, position_ids=positions)
                found.append(out.logits[0].float() if logits else out.last_hidden_state[0])
                self.position += len(part)
        return torch.cat(found)
