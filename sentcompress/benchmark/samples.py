"""What the sentence model writes after the beginnings of held-out documents, to be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sentcompress.benchmark.records import Sample
from sentcompress.generation import GenerationSettings, SentenceGenerator
from sentcompress.modeling.sentence_lm import SentenceLM

SENTENCES = 3
"""Of each document, that are read before."""


def write_samples(
    model: SentenceLM, tokenizer: Any, texts: Sequence[Sequence[str]], seed: int
) -> list[Sample]:
    """Continue documents, each given as its sentences."""
    if not texts:
        return []
    settings = GenerationSettings(max_new_tokens=60, do_sample=True, temperature=0.7, top_p=0.9, seed=seed)
    prompts = ["".join(sentences[:SENTENCES]) for sentences in texts]
    return [
        Sample(
            system="sentence model, temperature 0.7, top-p 0.9",
            prompt=generation.prompt,
            text=generation.text,
            finish_reason=generation.finish_reason,
        )
        for generation in SentenceGenerator(model, tokenizer).generate(prompts, settings)
    ]
