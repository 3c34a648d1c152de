"""What a corpus looks like to the models: sentence lengths, padding, the tokens that cutting costs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from sentcompress.benchmark.records import DataReport
from sentcompress.recipe import Recipe
from sentcompress.text.corpus import Corpus
from sentcompress.text.sampling import PassageSampler, SentenceSampler

BATCHES = 20
"""Batches looked at for the share of padding."""


def heldout_lengths(corpus: Corpus) -> np.ndarray:
    """Tokens of every held-out sentence, in the order of the text."""
    ranges = [corpus.document_sentences(number) for number in corpus.heldout.tolist()]
    return np.concatenate([np.asarray(corpus.sentence_lengths[r.start : r.stop]) for r in ranges])


def heldout_text(corpus: Corpus, count: int) -> list[list[int]]:
    """The first ``count`` held-out sentences, one after the other."""
    numbers = [n for document in corpus.heldout.tolist() for n in corpus.document_sentences(document)]
    return [corpus.sentence(number).tolist() for number in numbers[:count]]


def draw_lengths(corpus: Corpus, count: int, seed: int) -> list[int]:
    """Sentence lengths drawn from the held-out text."""
    return np.random.default_rng(seed).choice(heldout_lengths(corpus), count).tolist()


def measure_data(corpus: Corpus, recipe: Recipe, pad_token_id: int) -> DataReport:
    """Summarize a recipe's corpus."""
    lengths = heldout_lengths(corpus)
    texts = [corpus.document_text(number) for number in corpus.heldout.tolist()]
    uncut = sum(len(e.ids) for e in corpus.backend.encode_batch_fast(texts, add_special_tokens=False))
    sentences = SentenceSampler(
        corpus, corpus.train, recipe.train_vae.sentences_per_batch, recipe.seed, pad_token_id
    )
    passages = PassageSampler(
        corpus,
        corpus.train,
        recipe.graft.passages_per_batch,
        recipe.graft.max_sentences,
        recipe.graft.overlap_sentences,
        recipe.seed,
        pad_token_id,
        start=recipe.graft.start_latent,
    )
    return DataReport(
        summary=corpus.summary(),
        heldout_documents=len(corpus.heldout),
        mean_sentence_tokens=float(lengths.mean()),
        histogram=sorted(Counter(lengths.tolist()).items()),
        padding={
            "SentenceVAE batch": _padding(sentences, "attention_mask"),
            "graft batch as a rectangle (only real tokens are computed)": _padding(
                passages, "attention_mask"
            ),
            "rows of sentences the backbone reads": _padding(passages, "passage_ids"),
        },
        cutting_overhead=float(lengths.sum()) / uncut - 1,
    )


def _padding(sampler: Any, field: str) -> float:
    """Share of positions that hold nothing, over the first batches."""
    total = real = 0
    for index in range(min(BATCHES, sampler.batches_per_epoch)):
        values = sampler.batch(index)[field]
        total += values.numel()
        real += int((values > 0).sum() if field == "attention_mask" else (values >= 0).sum())
    return 1 - real / total
