"""Texts as the sentence decoder reads them: sentences, each with the latents that condition it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from sentcompress.modeling.decoder import DecoderContext, SentenceDecoder
from sentcompress.modeling.layers import Ragged
from sentcompress.modeling.vae import SentenceVAE

CONTEXT_BATCH_SIZE = 64
"""Texts whose last sentences are read together; bounds memory for large batches."""


@dataclass
class ConditionedText:
    """Sentences of one text, and the latents that conditioned (or would have conditioned) each of them.

    Attributes:
        sentences: tokens of each, end marks left out.
        latents: ``[n, k, H]``; zeros for a sentence that nothing predicted.
    """

    sentences: list[list[int]]
    latents: Tensor

    def followed_by(self, tokens: Sequence[int], latents: Tensor) -> ConditionedText:
        """The text with one more sentence, conditioned on ``latents [k, H]``."""
        return ConditionedText([*self.sentences, list(tokens)], torch.cat([self.latents, latents[None]]))

    def within_reach(self, decoder: SentenceDecoder) -> ConditionedText:
        """The last sentences, those that the next one depends on."""
        first = len(self.sentences) - decoder.sentences_read([len(ids) for ids in self.sentences])
        return ConditionedText(self.sentences[first:], self.latents[first:])


def decoder_inputs(vae: SentenceVAE, texts: Sequence[ConditionedText]) -> tuple[Tensor, Ragged, Tensor]:
    """The decoder's arguments for the sentences of all texts: embeddings, layout, latents."""
    latents = torch.cat([text.latents for text in texts])
    sentences = [ids for text in texts for ids in text.sentences]
    streams = [number for number, text in enumerate(texts) for _ in text.sentences]
    layout = Ragged(
        torch.tensor([1 + len(ids) for ids in sentences], device=latents.device),
        torch.tensor(streams, device=latents.device),
    )
    bos = vae.config.bos_token_id
    tokens = torch.tensor([token for ids in sentences for token in (bos, *ids)], device=latents.device)
    return vae.embed_targets(tokens), layout, latents


def read_context(vae: SentenceVAE, texts: Sequence[ConditionedText]) -> DecoderContext:
    """What the decoder keeps of texts. Equal ones are read once; batches bound the memory."""
    decoder = cast(SentenceDecoder, vae.decoder)
    distinct: list[ConditionedText] = []
    by_tokens: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    indices = [0] * len(texts)
    # Texts without sentences come first: a batch of them alone could not be read.
    for row in sorted(range(len(texts)), key=lambda row: len(texts[row].sentences)):
        text = texts[row]
        equal = by_tokens.setdefault(tuple(map(tuple, text.sentences)), [])
        index = next((n for n in equal if torch.equal(distinct[n].latents, text.latents)), None)
        if index is None:
            index = len(distinct)
            equal.append(index)
            distinct.append(text)
        indices[row] = index
    parts = []
    for begin in range(0, len(distinct), CONTEXT_BATCH_SIZE):
        batch = distinct[begin : begin + CONTEXT_BATCH_SIZE]
        embeddings, layout, latents = decoder_inputs(vae, batch)
        parts.append(decoder.read(embeddings, layout, latents, len(batch)))
    return DecoderContext.joined(parts, torch.tensor(indices, device=vae.device))


def last_hidden_states(vae: SentenceVAE, texts: Sequence[ConditionedText]) -> Tensor:
    """The decoder's last hidden state of each text's last sentence, computed without a cache: ``[b, H]``."""
    embeddings, layout, latents = decoder_inputs(vae, texts)
    hidden_states = vae.decoder(embeddings, layout, latents)
    ends = torch.tensor([len(text.sentences) for text in texts], device=latents.device).cumsum(0) - 1
    return hidden_states[layout.lengths.cumsum(0)[ends] - 1]
