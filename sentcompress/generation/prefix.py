"""A beginning that many texts share, such as an instruction or a long document: the backbone reads it once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from sentcompress.generation.backbone_cache import batch_texts, holds_only_keys_and_values, run_backbone
from sentcompress.modeling.sentence_lm import SentenceLM


@dataclass(frozen=True)
class Prefix:
    """A beginning that many texts share, read once (:meth:`sentcompress.generation.SentenceGenerator.read_prefix`).

    Attributes:
        text: the text before the prompts.
        sentences: token ids of each sentence.
        latents: ``[n, k, H]`` of the sentences.
        states: ``[1, n, k, H]`` of the backbone, with that of the start latent.
        cache: its keys and values ``[1, heads, columns, d]`` of each layer; None if they cannot be reused, so
            that the text is read again each time.
    """

    text: str
    sentences: list[list[int]]
    latents: Tensor
    states: Tensor
    cache: list[tuple[Tensor, Tensor]] | None

    @classmethod
    @torch.no_grad()
    def read(cls, model: SentenceLM, text: str, sentences: list[list[int]], latents: Tensor) -> Prefix:
        """Run the backbone over sentences and keep the result."""
        inputs, valid = batch_texts(model, [latents], start=model.config.start_latent)
        states, cache = run_backbone(model, inputs, valid, use_cache=True)
        layers = (
            [(layer.keys, layer.values) for layer in cache.layers]
            if holds_only_keys_and_values(cache)
            else None
        )
        return cls(text, sentences, latents, states, layers)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        layers = [tensor for layer in self.cache or [] for tensor in layer]
        return sum(tensor.nbytes for tensor in [self.latents, self.states, *layers])

    def common(self, texts: Iterable[list[list[int]]]) -> Prefix:
        """The part that all texts, given as sentences, share: the words that follow can change the last split."""
        shared = len(self.sentences)
        for sentences in texts:
            pairs = zip(self.sentences[:shared], sentences, strict=False)
            shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        dropped = len(self.sentences) - shared
        slots = self.states.shape[1] - dropped
        columns = slots * self.latents.shape[1]
        cache = None
        if self.cache is not None and slots:
            cache = [(keys[:, :, :columns], values[:, :, :columns]) for keys, values in self.cache]
        return Prefix(
            self.text, self.sentences[:shared], self.latents[:shared], self.states[:, :slots], cache
        )

    def run(self, model: SentenceLM, inputs: Tensor, valid: Tensor) -> tuple[Tensor, DynamicCache]:
        """Run the backbone over texts that continue the prefix, padded on the left.

        Args:
            model: the one the prefix was read with.
            inputs, valid: ``[B, N, k, H]`` and ``[B, N]``, without the prefix.

        Returns:
            states ``[B, n + N, k, H]`` and cache, those of the prefix included.
        """
        assert self.cache is not None
        rows, width = valid.shape
        past, k = self.states.shape[1], model.latents
        cache = DynamicCache()
        for number, layer in enumerate(self.cache):
            cache.update(*(x.expand(rows, -1, -1, -1) for x in layer), number)
        states = self.states.expand(rows, -1, -1, -1)
        if not width:
            return states, cache
        ids = torch.where(valid, 0, -1)
        own, _ = model.backbone_states(  # the cache grows in place
            inputs,
            valid,
            ids,
            past + (valid.long().cumsum(1) - 1).clamp_min(0),
            past_key_values=cache,
            past_passage_ids=ids.new_zeros(rows, past),
            use_cache=True,
        )
        # Shorter texts have padding between the prefix and their own latents: move it to the left of both.
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
