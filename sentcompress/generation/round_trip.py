"""Encodes sentences, decodes them from the latents alone, and shows what survived."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sentcompress.contracts import Reconstruction
from sentcompress.generation.output_head import make_head
from sentcompress.generation.sentence_writer import SentencePlan, SentenceWriter
from sentcompress.modeling.vae import SentenceVAE, pad_sentences
from sentcompress.text.lossless_tokenizer import lossless


@dataclass(frozen=True)
class Difference:
    """A stretch of a sentence: ``kind`` is ``kept``, ``lost`` (only in the original) or ``added``."""

    kind: str
    text: str


@torch.no_grad()
def reconstruct(
    vae: SentenceVAE, tokenizer: Any, sentences: Sequence[Sequence[int]], batch_size: int = 64
) -> list[Reconstruction]:
    """Free-running greedy reconstruction of tokenized sentences (no special tokens), in their order."""
    device, text = next(vae.parameters()).device, lossless(tokenizer)
    vae.eval()
    head = make_head(vae.output_weight, "auto")
    results: list[Reconstruction] = []
    for begin in range(0, len(sentences), batch_size):
        batch = [list(map(int, ids)) for ids in sentences[begin : begin + batch_size]]
        latents = vae.encode(*pad_sentences(batch, device))
        plans = [SentencePlan(max_tokens=vae.config.max_sentence_tokens) for _ in batch]
        written = SentenceWriter(vae, head=head).write(latents, plans)
        for ids, new in zip(batch, (sentence.tokens for sentence in written), strict=True):
            results.append(
                Reconstruction(
                    reference=text.decode(ids),
                    hypothesis=text.decode(new),
                    reference_ids=tuple(ids),
                    hypothesis_ids=tuple(new),
                )
            )
    return results


def differences(tokenizer: Any, reconstruction: Reconstruction) -> list[Difference]:
    """What survived, as stretches of equal, lost and added tokens."""
    text = lossless(tokenizer)
    reference, hypothesis = reconstruction.reference_ids, reconstruction.hypothesis_ids
    parts: list[Difference] = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, reference, hypothesis, autojunk=False).get_opcodes():
        if tag == "equal":
            parts.append(Difference("kept", text.decode(reference[a:b])))
            continue
        if b > a:
            parts.append(Difference("lost", text.decode(reference[a:b])))
        if d > c:
            parts.append(Difference("added", text.decode(hypothesis[c:d])))
    return parts
