"""The data report, checked against the corpus itself."""

from __future__ import annotations

import pytest

from sentcompress.benchmark.heldout_text import draw_lengths, heldout_lengths, heldout_sentences
from sentcompress.benchmark.measurements.data import measure_data


def test_figures_are_those_of_the_corpus(bench_models):
    corpus = bench_models.corpus
    report = measure_data(corpus, bench_models.recipe, 1)
    lengths = [len(corpus.sentence(i)) for d in corpus.heldout for i in corpus.document_sentences(d)]
    assert heldout_lengths(corpus).tolist() == lengths
    assert report.mean_sentence_tokens == pytest.approx(sum(lengths) / len(lengths))
    assert sum(count for _, count in report.histogram) == len(lengths)
    whole = sum(len(corpus.tokenizer.encode(corpus.document_text(d))) for d in corpus.heldout)
    assert report.cutting_overhead == pytest.approx(sum(lengths) / whole - 1)
    assert all(0 <= share < 1 for share in report.padding.values())
    assert list(
        report.padding
    ) == [  # keys of results.json: older results are compared with newer ones by them
        "SentenceVAE batch",
        "graft batch as a rectangle (only real tokens are computed)",
        "rows of sentences the backbone reads",
    ]
    assert report.heldout_documents == len(corpus.heldout)


def test_lengths_are_drawn_from_heldout_text_by_the_seed(bench_models):
    draw = draw_lengths(bench_models.corpus, 50, seed=1)
    assert draw == draw_lengths(bench_models.corpus, 50, seed=1)
    assert draw != draw_lengths(bench_models.corpus, 50, seed=2)
    assert set(draw) <= set(heldout_lengths(bench_models.corpus).tolist())
    first = bench_models.corpus.document_sentences(int(bench_models.corpus.heldout[0])).start
    assert heldout_sentences(bench_models.corpus, 1) == [bench_models.corpus.sentence(first).tolist()]
