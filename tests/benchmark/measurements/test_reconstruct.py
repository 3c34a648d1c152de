"""Reconstruction reports, checked against the corpus itself."""

from __future__ import annotations

from sentcompress.benchmark.reconstruction import measure_reconstruction, spaced_sentences
from sentcompress.recipe import ComponentSpec
from sentcompress.testing import tiny_vae


def test_reconstruction_of_an_untrained_model_is_bad_but_counted(bench_models, tokenizer):
    sentences = spaced_sentences(bench_models.corpus, 20)
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
