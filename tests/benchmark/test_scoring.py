"""Scoring: exact on models whose answer is known, refused wherever a byte could be missing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sentcompress.benchmark import scoring
from sentcompress.benchmark.heldout_text import check_bytes, heldout_documents, windows
from sentcompress.benchmark.measurements.causality import CausalityCheck, CausalityReport
from sentcompress.benchmark.scoring import (
    require_same_bytes,
    score_sentence_model,
    score_token_model,
    score_unigram,
)
from sentcompress.errors import CoverageError, DataError
from sentcompress.generation.shortlist_head import make_shortlist_head
from sentcompress.recipe import BenchSettings, build_recipe
from sentcompress.testing import tiny_opt, tiny_sentence_lm
from sentcompress.text.lossless_tokenizer import lossless

CAUSAL = CausalityReport(
    checks=[CausalityCheck(name="x", kind="future", attention="sdpa", max_delta=0, tolerance=0, passed=True)]
)


@pytest.fixture(scope="module")
def corpus(bench_models):
    return bench_models.corpus


@pytest.fixture(scope="module")
def counter(tokenizer):
    return lossless(tokenizer)


@pytest.fixture(scope="module")
def documents(corpus):
    return heldout_documents(corpus, BenchSettings())


@pytest.fixture
def model(tokenizer):
    return tiny_sentence_lm(len(tokenizer))


def score(model, documents, counter, **settings):
    return score_sentence_model(model, documents, counter, causality=CAUSAL, **settings)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 30, 61])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_windows_score_every_position_once_with_half_a_window_of_context(length, size):
    scored = []
    for number, window in enumerate(windows(length, size)):
        assert window.stop - window.start <= size
        scored += range(window.first_scored, window.stop)
        if number:
            assert window.first_scored - window.start >= size // 2
    assert scored == list(range(1, length))


def test_documents_begin_at_the_beginning_and_stop_at_a_sentence(corpus):
    whole = heldout_documents(corpus, BenchSettings())
    for document in whole:
        assert "".join(document.texts) == corpus.document_text(document.number)
        assert document.whole
    cut = heldout_documents(corpus, BenchSettings(max_bytes_per_document=200, max_documents=2))
    assert len(cut) == 2
    long = max(cut, key=lambda d: len(corpus.document_text(d.number)))
    assert not long.whole
    assert corpus.document_text(long.number).startswith("".join(long.texts))


def test_no_document_to_score_is_an_error(corpus):
    class OneSentenceEach:
        heldout = corpus.heldout
        sentence_bytes = corpus.sentence_bytes

        def document_sentences(self, number):
            return range(number, number + 1)

    with pytest.raises(DataError):
        heldout_documents(OneSentenceEach(), BenchSettings())


def test_a_uniform_sentence_model_pays_log2_v_a_target_and_a_bit_a_decision(model, documents, counter):
    torch.nn.init.zeros_(model.vae.lm_head.weight)
    found = score(model, documents, counter)
    size = sum(document.scored_bytes for document in documents)
    tokens = sum(len(ids) + 1 for d in documents for ids in d.sentences[1:])
    decisions = sum(len(d.sentences) for d in documents)
    expected = (tokens * math.log2(len(counter.backend.get_vocab())) + decisions) / size
    assert found.bytes == size
    assert found.targets == tokens
    assert found.bits_per_byte == pytest.approx(expected, rel=1e-6)
    assert found.breakdown["stop decisions"] == pytest.approx(decisions * math.log(2), rel=1e-6)
    ends = sum(len(d.sentences) - 1 for d in documents)
    assert found.breakdown["end marks"] == pytest.approx(ends * math.log(model.config.vae_config.vocab_size))
    assert sum(found.breakdown.values()) == pytest.approx(found.nats, rel=1e-6)


def test_a_uniform_token_model_pays_log2_v_a_token(documents, counter, tokenizer):
    uniform = tiny_opt(len(tokenizer))
    torch.nn.init.zeros_(uniform.get_output_embeddings().weight)
    found = score_token_model(uniform, documents, counter, 2, system="uniform", context_tokens=40)
    tokens = sum(len(counter.encode(document.scored_text)) for document in documents)
    size = sum(document.scored_bytes for document in documents)
    assert found.baseline_tokens == found.targets == tokens
    assert found.bits_per_byte == pytest.approx(tokens * math.log2(len(tokenizer)) / size, rel=1e-6)
    assert found.perplexity == pytest.approx(len(tokenizer), rel=1e-6)


def test_both_kinds_score_the_same_bytes(model, documents, counter, corpus, tokenizer):
    scores = [
        score(model, documents, counter),
        score_token_model(tiny_opt(len(tokenizer)), documents, counter, 2, system="token"),
        score_unigram(corpus, documents, counter, len(tokenizer), 2),
    ]
    require_same_bytes(scores)
    for found in scores:
        assert found.baseline_tokens == scores[0].baseline_tokens
        assert all(row.covered_bytes == row.bytes for row in found.documents)
    scores[1].documents[0].covered_bytes += 1
    with pytest.raises(CoverageError, match="same bytes"):
        require_same_bytes(scores)


def test_windows_change_the_context_only(model, documents, counter):
    """With all context in one window, the score equals one plain forward; smaller windows differ, a little."""
    document = documents[0]
    whole = score(model, [document], counter)
    again = score(model, [document], counter, context_sentences=10_000)
    assert whole.nats == pytest.approx(again.nats)
    narrow = score(model, [max(documents, key=lambda d: len(d.sentences))], counter, context_sentences=4)
    assert narrow.context == "4 sentences"
    assert narrow.documents[0].covered_bytes == narrow.documents[0].bytes


def test_token_windows_equal_a_plain_forward_where_one_window_is_enough(documents, counter, tokenizer):
    lm = tiny_opt(len(tokenizer))
    document = min(documents, key=lambda d: d.scored_bytes)
    ids = torch.tensor([2, *counter.encode(document.context_text), *counter.encode(document.scored_text)])
    scored = len(counter.encode(document.scored_text))
    with torch.no_grad():
        plain = F.cross_entropy(lm(ids[None]).logits[0, :-1], ids[1:], reduction="none")[-scored:].sum()
    found = score_token_model(lm, [document], counter, 2, system="token")
    assert found.nats == pytest.approx(float(plain), rel=1e-5)
    batched = scoring._token_nll(lm, ids.repeat(4), 16)
    assert not batched.isnan().any()


def test_unigram_probabilities_sum_to_one(corpus, documents, counter, tokenizer):
    seen = {}

    def spy(nll, *rest):
        table = nll(torch.arange(-1, len(tokenizer)))
        seen["sum"] = float(torch.exp(-table).sum())
        return original(nll, *rest)

    original = scoring.score_tokens
    scoring.score_tokens = spy
    try:
        found = score_unigram(corpus, documents, counter, len(tokenizer), 2)
    finally:
        scoring.score_tokens = original
    assert seen["sum"] == pytest.approx(1)
    assert found.perplexity < len(tokenizer)


# ---- every check can fail


def test_text_that_the_tokens_do_not_spell_is_refused(model, documents, counter):
    wrong = replace(documents[0], texts=[*documents[0].texts[:-1], "something else"])
    with pytest.raises(CoverageError, match="do not spell"):
        score(model, [wrong], counter)


def test_a_sentence_scored_twice_or_never_is_refused(model, documents, counter, monkeypatch):
    document = max(documents, key=lambda d: len(d.sentences))
    right = scoring.windows
    for broken in (
        lambda *a: right(*a) + right(*a)[-1:],
        lambda n, *a: right(n - 1, *a),
        lambda *a: right(*a)[1:],
    ):
        monkeypatch.setattr(scoring, "windows", broken)
        with pytest.raises(CoverageError):
            score(model, [document], counter, context_sentences=6)
        lm = tiny_opt(model.config.vae_config.vocab_size)
        with pytest.raises(CoverageError):
            score_token_model(lm, [document], counter, 2, system="token", context_tokens=12)


@pytest.mark.parametrize("what", ["targets", "decisions", "ends", "padding", "nan"])
def test_a_model_that_scores_wrongly_is_refused(model, documents, counter, monkeypatch, what):
    plain = type(model).forward

    def forward(self, **inputs):
        if what == "padding":
            inputs["input_ids"] = inputs["input_ids"].clone()
            inputs["input_ids"][-1, 0] = self.config.pad_token_id
        if what == "ends":  # an end mark inside a sentence
            inputs["input_ids"] = inputs["input_ids"].clone()
            inputs["input_ids"][-1, 0] = self.config.eos_token_id
        output = plain(self, **inputs)
        if what == "targets":  # the mask of another sentence, as in the reference implementation
            output.targets = output.targets.roll(1)
        if what == "decisions":
            output.decisions[0] = False
        if what == "nan":
            output.sentence_nll[-1] = float("nan")
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(CoverageError):
        score(model, documents, counter)


def test_bytes_that_do_not_add_up_are_refused():
    check_bytes("x", 3, 3)
    with pytest.raises(CoverageError, match="2 bytes were scored, but the text has 3"):
        check_bytes("x", 2, 3)


def test_a_truncated_document_pays_for_no_stop(model, corpus):
    cut = heldout_documents(corpus, BenchSettings(max_bytes_per_document=200))
    document = next(d for d in cut if not d.whole)
    tally = scoring.score_document(model, document, 50)
    assert tally.decisions.tolist() == [1] * (len(document.sentences) - 1) + [0]
    assert np.all(tally.times[1:] == 1)


def test_a_shortlist_is_scored_as_what_it_writes(tokenizer, documents, counter):
    """All tokens: the full head's figure. Few: a distribution over the whole vocabulary, every byte still proven."""
    recipe = build_recipe({"name": "tiny", "graft": {"shortlist_rank": 8}}, [], "tests")
    model = tiny_sentence_lm(len(tokenizer), recipe)
    plain = score(model, documents, counter)
    whole = score(model, documents, counter, shortlist=make_shortlist_head(model, len(tokenizer)))
    assert whole.nats == pytest.approx(plain.nats, rel=1e-6)
    assert whole.breakdown == pytest.approx(plain.breakdown, rel=1e-5)
    head = make_shortlist_head(model, 20)
    few = score(model, documents, counter, shortlist=head)
    assert few.targets == plain.targets
    assert few.breakdown["stop decisions"] == pytest.approx(plain.breakdown["stop decisions"], rel=1e-6)
    assert few.nats > plain.nats  # untrained, it misses nearly everything
    candidates = head.candidates(torch.randn(1, 1, model.backbone.hidden_size))[0]
    states = torch.randn(1, model.backbone.hidden_size).expand(len(tokenizer), -1)
    assert head.nll(states, candidates, torch.arange(len(tokenizer))).neg().exp().sum() == pytest.approx(1)


def test_without_its_llm_a_model_is_as_good_only_if_the_llm_says_nothing(model, documents, counter):
    whole = score(model, documents, counter).nats
    assert score(model, documents, counter, use_llm=False).nats != pytest.approx(whole, rel=1e-6)
    assert score(model, documents, counter).nats == whole, "the LLM is back"
    modules = model.backbone.named_modules()
    norm = next(each for name, each in modules if name.endswith("final_layer_norm") and "layers" not in name)
    with torch.no_grad():
        norm.weight.zero_()  # its states are the norm's bias, whatever it reads
        norm.bias.normal_()
    silent = score(model, documents, counter).nats
    assert silent != pytest.approx(whole, rel=1e-6)
    assert score(model, documents, counter, use_llm=False).nats == pytest.approx(silent, rel=1e-6)
