"""``vae.init: backbone``: a sentence encoder and decoder that consist of the LLM's own first and last blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from sentcompress.contracts.backbone import Backbone
from sentcompress.modeling.configuration import SentenceVAEConfig
from sentcompress.modeling.layers import Ragged, latents_first
from sentcompress.modeling.pruning import cut_config
from sentcompress.registry import get_registry

MAX_UNUSED_COLUMNS = 64
"""Columns of a decoder's cache that no row sees any more; with more of them, they are dropped."""


def short_backbone(config: SentenceVAEConfig, layers: int, *, last: bool) -> Backbone:
    """The LLM's adapter with only some of its blocks, without token embeddings. The weights are not copied yet.

    Raises:
        ValueError: the LLM has fewer blocks.
    """
    settings = dict(config.backbone["config"])
    whole = AutoConfig.for_model(settings.pop("model_type"), **settings)
    name, options = config.backbone["name"], config.backbone.get("options")
    checked = get_registry().options("backbone", name, options, "backbone.options")
    number = whole.num_hidden_layers
    kept = range(number - layers, number) if last else range(layers)
    cut = cut_config(whole, kept)
    return get_registry().get("backbone", name).from_config(cut, checked)  # type: ignore[attr-defined]


def _causal(lengths: Tensor, longest: int) -> Tensor:
    """``[S, 1, L, L]`` bool. Padding is on the right, so no token sees it."""
    return (
        torch.ones(longest, longest, dtype=torch.bool, device=lengths.device)
        .tril()
        .expand(len(lengths), 1, -1, -1)
    )


class LLMEncoder(nn.Module):
    """The LLM's first blocks, causal within the sentence as they were trained."""

    def __init__(self, config: SentenceVAEConfig) -> None:
        super().__init__()
        self.llm = short_backbone(config, config.encoder_layers, last=False)

    def forward(self, embeddings: Tensor, layout: Ragged) -> Tensor:
        """``[T, H]`` token embeddings to ``[T, H]`` hidden states, for the sentences of ``layout``."""
        return layout.unpad(_run(self.llm, layout.pad(embeddings), layout.lengths))


def _run(llm: Backbone, inputs: Tensor, lengths: Tensor) -> Tensor:
    """``[S, L, H] -> [S, L, H]``, each sentence at positions from 0."""
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand(inputs.shape[:2])
    return llm(inputs, _causal(lengths, inputs.shape[1]), positions)[0]


@dataclass
class LLMDecoderCache:
    """The cache during generation: one row per text; each row's sentence begins in its own column.

    Attributes:
        cache: the blocks' transformers cache; None before the first step.
        filled: columns in it, the same in every row.
        starts: ``[B]`` int64, the column in which each row's sentence begins.
        latents: ``[B, k, H]`` that condition it.
        latent_steps: steps in which some row may still read its latents.
    """

    cache: Any
    filled: int
    starts: Tensor
    latents: Tensor
    latent_steps: int = 0

    @property
    def layers(self) -> list[Any]:
        """Objects with ``keys`` and ``values``, one per block."""
        return [] if self.cache is None else list(self.cache.layers)


class LLMDecoder(nn.Module):
    """The LLM's last blocks, with the latents in front of the tokens."""

    def __init__(self, config: SentenceVAEConfig) -> None:
        super().__init__()
        self.prefix = config.latents
        self.context = 0
        self.llm = short_backbone(config, config.decoder_layers, last=True)
        # Latents leave the fusion with a root mean square of 1, token embeddings have the LLM's own.
        self.latent_gain = nn.Parameter(torch.ones(()))

    def forward(self, embeddings: Tensor, layout: Ragged, latents: Tensor) -> Tensor:
        """Teacher-forced pass: as :meth:`sentcompress.modeling.decoder.SentenceDecoder.forward`."""
        prefix = (latents * self.latent_gain).to(embeddings.dtype)
        inputs = torch.cat([prefix, layout.pad(embeddings)], dim=1)
        hidden_states = _run(self.llm, inputs, layout.lengths + self.prefix)
        return layout.unpad(hidden_states[:, self.prefix :])

    def allocate(self, texts: int, like: Tensor, context: None = None) -> LLMDecoderCache:
        """As :meth:`sentcompress.modeling.decoder.SentenceDecoder.allocate`; sentences have no context."""
        starts = torch.zeros(texts, dtype=torch.long, device=like.device)
        return LLMDecoderCache(None, 0, starts, like.new_zeros(texts, self.prefix, like.shape[-1]))

    def restart(self, cache: LLMDecoderCache, rows: Tensor, latents: Tensor) -> int:
        """Begin a new sentence in some rows ``[b]`` from ``latents [b, k, H]``; as ``SentenceDecoder.restart``."""
        cache.starts = cache.starts.index_fill(0, rows, cache.filled)
        cache.latents = cache.latents.index_copy(0, rows, latents)
        unused = int(cache.starts.min())
        if unused > MAX_UNUSED_COLUMNS or unused == cache.filled:
            self._drop(cache, unused)
        cache.latent_steps = self.prefix
        if len(rows) == len(cache.starts):  # no other row is inside a sentence: read all latents at once
            self._extend(cache.latents * self.latent_gain, cache)
            cache.latent_steps = 0
        return cache.latent_steps

    def step(self, embeddings: Tensor, cache: LLMDecoderCache, rows: Tensor | None = None) -> Tensor:
        """Advance some rows by one position: ``[b, H] -> [b, H]``; as ``SentenceDecoder.step``."""
        if rows is not None:
            waiting = torch.ones_like(cache.starts, dtype=torch.bool).index_fill(0, rows, False)
            cache.starts = cache.starts.masked_fill(waiting, cache.filled)  # they keep no columns in use
            every = embeddings.new_zeros(len(waiting), embeddings.shape[-1])
            embeddings = every.index_copy(0, rows, embeddings)
        positions = cache.filled - cache.starts
        if cache.latent_steps:
            cache.latent_steps -= 1
            embeddings = latents_first(embeddings, cache.latents * self.latent_gain, positions)
        states = self._extend(embeddings[:, None], cache)[:, 0]
        return states if rows is None else states[rows]

    def _extend(self, inputs: Tensor, cache: LLMDecoderCache) -> Tensor:
        """Add n columns, visible from the beginning of each row's sentence: ``[B, n, H] -> [B, n, H]``."""
        new = cache.filled + torch.arange(inputs.shape[1], device=inputs.device)
        columns = torch.arange(cache.filled + inputs.shape[1], device=inputs.device)
        allowed = (columns >= cache.starts[:, None])[:, None] & (columns <= new[:, None])
        states, cache.cache = self.llm(
            inputs,
            allowed[:, None],
            new - cache.starts[:, None],
            past_key_values=cache.cache,
            use_cache=True,
        )
        cache.filled += inputs.shape[1]
        return states

    def retire(self, cache: LLMDecoderCache, rows: Tensor, lengths: Tensor) -> None:
        """Do nothing: these blocks have no context."""

    def join(self, cache: LLMDecoderCache, other: LLMDecoderCache) -> None:
        """Add the rows of another cache, in which no sentence was begun yet, as the last ones."""
        more = len(other.starts)
        cache.starts = torch.cat([cache.starts, other.starts + cache.filled])  # they see no column so far
        cache.latents = torch.cat([cache.latents, other.latents])
        for layer in cache.layers:
            layer.keys, layer.values = (
                torch.cat([x, x.new_zeros(more, *x.shape[1:])]) for x in (layer.keys, layer.values)
            )

    def keep(self, cache: LLMDecoderCache, rows: Tensor) -> None:
        """Drop all other rows."""
        cache.starts, cache.latents = cache.starts[rows], cache.latents[rows]
        if cache.cache is not None:
            cache.cache.batch_select_indices(rows)

    @staticmethod
    def _drop(cache: LLMDecoderCache, columns: int) -> None:
        """Drop columns that no row sees any more."""
        if columns == cache.filled:
            cache.cache = None
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, columns:], layer.values[:, :, columns:]
        cache.filled -= columns
        cache.starts = cache.starts - columns
