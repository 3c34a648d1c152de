"""Encode sentences, write them again from the latents alone, and show what survived."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sentcompress.contracts import Reconstruction
from sentcompress.generation.output_head import make_head
from sentcompress.generation.sentence_writer import RowPlan, Sampler, SentenceWriter
from sentcompress.generation.settings import GenerationSettings
from sentcompress.modeling.vae import SentenceVAE


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
    device = next(vae.parameters()).device
    vae.eval()
    sampler, head = Sampler(GenerationSettings(), device), make_head(vae.output_weight, "auto")
    results: list[Reconstruction] = []
    for begin in range(0, len(sentences), batch_size):
        block = [list(map(int, ids)) for ids in sentences[begin : begin + batch_size]]
        lengths = torch.tensor([len(ids) for ids in block])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        input_ids = torch.zeros(mask.shape, dtype=torch.long)
        input_ids[mask] = torch.tensor([token for ids in block for token in ids])
        latents = vae.encode(input_ids.to(device), mask.to(device))
        plans = [RowPlan(limit=vae.config.max_sentence_tokens) for _ in block]
        written = SentenceWriter(vae, sampler, head=head).write(latents, plans)
        for ids, new in zip(block, (sentence.tokens for sentence in written), strict=True):
            results.append(
                Reconstruction(
                    reference=_decode(tokenizer, ids),
                    hypothesis=_decode(tokenizer, new),
                    reference_ids=tuple(ids),
                    hypothesis_ids=tuple(new),
                )
            )
    return results


def differences(tokenizer: Any, reconstruction: Reconstruction) -> list[Difference]:
    """What survived, token by token."""
    reference, hypothesis = reconstruction.reference_ids, reconstruction.hypothesis_ids
    parts: list[Difference] = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, reference, hypothesis, autojunk=False).get_opcodes():
        if tag == "equal":
            parts.append(Difference("kept", _decode(tokenizer, reference[a:b])))
            continue
        if b > a:
            parts.append(Difference("lost", _decode(tokenizer, reference[a:b])))
        if d > c:
            parts.append(Difference("added", _decode(tokenizer, hypothesis[c:d])))
    return parts


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
