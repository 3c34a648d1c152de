"""Data and reconstruction reports, checked against the corpus itself."""

from __future__ import annotations

import pytest

from sentcompress.benchmark.heldout_text import draw_lengths, heldout_lengths, heldout_sentences
from sentcompress.benchmark.measurements.data import measure_data
from sentcompress.benchmark.reconstruction import measure_reconstruction, spaced_sentences
from sentcompress.recipe import ComponentSpec
from sentcompress.testing import tiny_vae


def test_figures_are_those_of_the_corpus(parts):
    corpus = parts.corpus
    report = measure_data(corpus, parts.recipe, 1)
    lengths = [len(corpus.sentence(i)) for d in corpus.heldout for i in corpus.document_sentences(d)]
    assert heldout_lengths(corpus).tolist() == lengths
    assert report.mean_sentence_tokens == pytest.approx(sum(lengths) / len(lengths))
    assert sum(count for _, count in report.histogram) == len(lengths)
    whole = sum(
        len(corpus.backend.encode(corpus.document_text(d), add_special_tokens=False).ids)
        for d in corpus.heldout
    )
    assert report.cutting_overhead == pytest.approx(sum(lengths) / whole - 1)
    assert all(0 <= share < 1 for share in report.padding.values())
    assert len(report.padding) == 3
    assert report.heldout_documents == len(corpus.heldout)


def test_lengths_are_drawn_from_heldout_text_by_the_seed(parts):
    draw = draw_lengths(parts.corpus, 50, seed=1)
    assert draw == draw_lengths(parts.corpus, 50, seed=1)
    assert draw != draw_lengths(parts.corpus, 50, seed=2)
    assert set(draw) <= set(heldout_lengths(parts.corpus).tolist())
    first = parts.corpus.document_sentences(int(parts.corpus.heldout[0])).start
    assert heldout_sentences(parts.corpus, 1) == [parts.corpus.sentence(first).tolist()]


def test_reconstruction_of_an_untrained_model_is_bad_but_counted(parts, tokenizer):
    sentences = spaced_sentences(parts.corpus, 20)
    assert len(sentences) == 20
    report = measure_reconstruction(
        tiny_vae(len(tokenizer)),
        tokenizer,
        sentences,
        system="x",
        extra_metrics=[ComponentSpec(name="token-accuracy")],
    )
    assert report.tokens == sum(map(len, sentences))
    assert report.exact_sentences <= 0.2
    assert report.token_accuracy == report.extra["token-accuracy.tokens"]
    assert report.teacher_forced_perplexity > 10
    assert report.examples[0][0] == tokenizer.decode(sentences[0])
