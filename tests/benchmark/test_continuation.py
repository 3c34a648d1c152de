"""What a continuation is scored: every event once, sums that add up, and the same nats as ``bench quality``."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from sentcompress.benchmark.causality_checks import check_causality
from sentcompress.benchmark.continuation import NOTHING, score_continuation
from sentcompress.benchmark.heldout_text import HeldoutDocument, heldout_documents, windows
from sentcompress.benchmark.scoring import check_document, score_document, score_sentence_model
from sentcompress.errors import InputError
from sentcompress.recipe import BenchSettings, Recipe
from sentcompress.registry import get_registry
from sentcompress.testing import tiny_sentence_lm
from sentcompress.text.lossless_tokenizer import lossless
from sentcompress.text.segmentation import sentences_to_ids

TEXT = (
    "The people have seen a year of peace. Congress met here? Few men read the law with care; order was seen."
)
NO_START = {"name": "tiny", "graft": {"start_latent": False}}


@pytest.fixture(scope="module")
def counter(tokenizer):
    return lossless(tokenizer)


@pytest.fixture(scope="module")
def cut(tokenizer):
    segmenter = get_registry().create("segmenter", "regex", {"preset": "sentence", "max_tokens": 24})
    return lambda text: sentences_to_ids(text, segmenter, tokenizer)


@pytest.fixture
def model(tokenizer):
    model = tiny_sentence_lm(len(tokenizer))
    with torch.no_grad():  # decisions that differ from a coin's
        model.termination.bias.copy_(torch.tensor([0.7, -0.4]))
        model.start.normal_(generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture
def score(model, counter, cut):
    def score(context, continuation, size=20):
        return score_continuation(model, cut(context + continuation), len(context), counter, size)

    return score


@pytest.mark.parametrize("first", [0, 1, 2, 5, 11])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_windows_from_any_position_score_each_once_with_half_a_window_before_it(first, size):
    scored = []
    for window in windows(12, size, first):
        assert window.stop - window.start <= size
        assert window.first_scored - window.start >= min(first, size // 2)
        scored += range(window.first_scored, window.stop)
    assert scored == list(range(first, 12))


def test_a_uniform_model_pays_log2_v_a_token_and_end_mark_and_a_bit_a_decision(tokenizer, counter, cut):
    uniform = tiny_sentence_lm(len(tokenizer))
    torch.nn.init.zeros_(uniform.vae.lm_head.weight)
    sentences = cut(TEXT)
    assert len(sentences) == 3
    whole = score_continuation(uniform, sentences, 0, counter, 20)
    assert whole.tokens == sum(len(ids) for _, ids in sentences)
    assert (whole.end_marks, whole.decisions) == (2, 3), "between sentences, and the decision to begin"
    bits = (whole.tokens + whole.end_marks) * math.log2(len(tokenizer)) + whole.decisions
    assert whole.nats / math.log(2) == pytest.approx(bits, rel=1e-6)


def test_what_a_context_ends_with_decides_which_marks_count(score):
    after_sentence = score("The people have seen a year of peace.", " Congress met here?")
    assert (after_sentence.end_marks, after_sentence.decisions) == (1, 1)
    inside = score("The people have seen", " a year of peace.")
    assert (inside.end_marks, inside.decisions) == (0, 0)
    across = score("The people have seen", " a year of peace. Congress")
    assert (across.end_marks, across.decisions) == (1, 1)
    assert score(TEXT, "") == NOTHING


@pytest.mark.parametrize("size", [20, 2])
def test_consecutive_continuations_add_up(score, size):
    """Everywhere a text can be cut between words, in one window and in several."""
    cuts = [0, *(i for i, character in enumerate(TEXT) if character == " "), len(TEXT)]
    if size == 2:  # the same windows: within the last sentence
        cuts = [i for i in cuts if i > TEXT.index("Few")]
    for a, b in itertools.pairwise(cuts):
        # What is cut off must not change how the rest is cut into sentences.
        first = score(TEXT[:a], TEXT[a:b], size)
        rest = score(TEXT[:b], TEXT[b:], size)
        both = score(TEXT[:a], TEXT[a:], size)
        assert first.nats + rest.nats == pytest.approx(both.nats, rel=1e-5)
        assert first.tokens + rest.tokens == both.tokens
        assert first.end_marks + rest.end_marks == both.end_marks


def test_a_token_across_the_border_belongs_to_the_continuation(score, counter):
    word = next(w for w in ("people", "nation", "Congress") if len(counter.encode(f" {w}")) == 1)
    text = f"The {word} have seen"
    middle = text.index(word) + 2
    split, whole = score(text[:middle], text[middle:]), score("The", text[3:])
    assert split == whole


def test_the_sum_is_what_the_models_forward_says(score, model, cut):
    """From nothing: sentence_nll of each sentence and every decision, less the last end mark."""
    sentences = [ids for _, ids in cut(TEXT)]
    document = HeldoutDocument(
        0, "test", sentences, [text for text, _ in cut(TEXT)], whole=False, first_scored=0
    )
    tally = score_document(model, document, 20)
    last_end = tally.target_nats[-1][1][-1]
    assert score("", TEXT).nats == pytest.approx(tally.nats.sum() - last_end, rel=1e-6)


def test_a_whole_document_is_bench_quality_and_its_first_sentence(bench_models, tokenizer, counter):
    model = tiny_sentence_lm(len(tokenizer))
    report = check_causality(model, attention=["sdpa"])
    for document in heldout_documents(bench_models.corpus, BenchSettings()):
        bench = score_sentence_model(model, [document], counter, causality=report, context_sentences=6)
        whole = HeldoutDocument(
            document.number, document.source, document.sentences, document.texts, whole=True, first_scored=0
        )
        tally = score_document(model, whole, 6)
        checked = check_document(whole, tally, counter)
        assert checked.bytes == checked.covered_bytes == len("".join(document.texts).encode())
        assert np.all(tally.times == 1)
        assert checked.nats - tally.nats[0] == pytest.approx(bench.nats, abs=1e-3)
        first = HeldoutDocument(
            0, "", document.sentences[:1], document.texts[:1], whole=False, first_scored=0
        )
        assert tally.nats[0] == pytest.approx(score_document(model, first, 6).nats[0], abs=1e-3)


def test_a_model_without_a_start_latent_is_given_the_first_sentence_or_refuses(tokenizer, counter, cut):
    model = tiny_sentence_lm(len(tokenizer), Recipe.model_validate(NO_START))
    first = len("The people have seen a year of peace.")
    given = score_continuation(model, cut(TEXT), first, counter, 20)
    assert (given.end_marks, given.decisions) == (1, 2), "the first end mark is given, the decisions are not"
    for border in (0, 8):
        with pytest.raises(InputError, match="no start latent"):
            score_continuation(model, cut(TEXT), border, counter, 20)


def test_greedy_is_said_of_what_greedy_generation_writes(model, tokenizer, cut, score, teach):
    """A model that knows one text by heart, across sentences and decisions to go on."""
    teach(model, [ids for _, ids in cut(TEXT)])
    prompt = TEXT[: TEXT.index(" year")]
    written = model.generate([prompt], tokenizer, max_new_tokens=100)[0]
    assert written.text == TEXT[len(prompt) :]
    assert written.finish_reason == "stop"
    found = score(prompt, written.text)
    assert found.greedy
    assert (found.end_marks, found.decisions) == (2, 2)
    assert not score(prompt, " year of order. Congress met here?").greedy
    with torch.no_grad():
        model.termination.bias.copy_(torch.tensor([-9.0, 9.0]))
    assert not score(prompt, written.text).greedy, "it would stop after the first sentence"
    assert score(prompt, " year of peace.").greedy
