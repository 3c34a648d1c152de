"""Needles: where they are planted, that they fit, and that one pass finds what greedy decoding writes."""

from __future__ import annotations

import pytest
import torch

from sentcompress.benchmark.needles import (
    KINDS,
    MARGIN,
    EncodedTask,
    answered,
    encode_task,
    generated,
    heldout_texts,
    make_tasks,
)
from sentcompress.errors import InputError
from sentcompress.testing import tiny_opt
from sentcompress.text.lossless_tokenizer import lossless

BOS = 2


@pytest.fixture(scope="module")
def documents(bench_models):
    return heldout_texts(bench_models.corpus)


@pytest.fixture(scope="module")
def exact(tokenizer):
    return lossless(tokenizer)


@pytest.fixture(scope="module")
def tasks(documents, exact):
    return make_tasks(documents, exact, lengths=[700, 1000], tasks=3, seed=1)


def test_tasks_are_what_was_asked_for(tasks):
    found = [(task.kind, task.length) for task in tasks]
    assert found == [(kind, length) for kind in KINDS for length in (700, 1000) for _ in range(3)]
    assert [task.needles[0].depth for task in tasks[:3]] == [0, 0.5, 1]


def test_texts_fit_and_are_full(tasks, exact):
    for task in tasks:
        size = len(encode_task(task, exact, BOS).ids)
        assert task.length - 4 * MARGIN - 60 < size <= task.length  # a sentence has at most 60 words


def test_needles_stand_whole_where_they_were_planted(tasks):
    for task in tasks:
        assert len(task.needles) == (4 if task.kind == "several" else 1)
        for needle in task.needles:
            assert task.text.count(needle.statement) == 1
            assert needle.question + needle.answer in needle.statement
            assert task.text.count(needle.question) == 1
            before, _, after = task.text.partition(needle.statement)
            assert not before or (before[-1].isspace() and before.rstrip()[-1] in ".!?")
            place = len(before) / max(1, len(before) + len(after))
            assert place == pytest.approx(needle.depth, abs=0.15)


def test_the_rest_of_a_text_is_held_out_text(tasks, documents):
    sentences = {" ".join(text.split()) for document in documents for text in document}
    for task in tasks[:6]:
        text = task.text.replace(task.needles[0].statement, "")
        first = " ".join(text.split())[:40]
        assert any(sentence.startswith(first[: len(sentence)]) for sentence in sentences)


def test_tasks_are_the_same_for_the_same_seed(tasks, documents, exact):
    assert make_tasks(documents, exact, lengths=[700, 1000], tasks=3, seed=1) == tasks
    assert make_tasks(documents, exact, lengths=[700], tasks=3, seed=2)[0] != tasks[0]
    alone = make_tasks(documents, exact, lengths=[1000], tasks=3, kinds=["number"], seed=1)
    assert alone == [task for task in tasks if task.kind == "number" and task.length == 1000]


def test_answers_stand_behind_their_questions(tasks, exact):
    for task in tasks:
        encoded = encode_task(task, exact, BOS)
        assert encoded.ids[0] == BOS
        assert exact.decode(encoded.ids[1 : encoded.answers[0].start], begins=True) == task.prompt
        for answer, needle in zip(encoded.answers, task.needles, strict=True):
            assert exact.decode(encoded.ids[answer]) == needle.answer


def test_one_pass_finds_what_greedy_decoding_writes(tokenizer):
    model = tiny_opt(len(tokenizer))
    prompt = [BOS, *range(10, 40)]
    written = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=1)[
        0
    ].tolist()
    answers = [slice(31, 34), slice(35, 37)]
    right = EncodedTask(written, answers)
    assert answered(model, right) == generated(model, right) == [True, True]
    for wrong in (31, 33, 36):
        ids = [token + (n == wrong) for n, token in enumerate(written)]
        task = EncodedTask(ids, answers)
        assert answered(model, task) == generated(model, task)
        assert answered(model, task)[wrong == 36] is False


@pytest.mark.parametrize(("lengths", "message"), [([60], "too few"), ([10**6], "have"), ([], "have")])
def test_lengths_that_cannot_be(documents, exact, lengths, message):
    with pytest.raises(InputError, match=message):
        make_tasks(documents, exact, lengths=lengths, tasks=1)
