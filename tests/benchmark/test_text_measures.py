"""Measures of text whose answers can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from sentcompress.benchmark import text_measures as measures
from sentcompress.benchmark.measurements.quality import DocumentScore, QualityScore
from sentcompress.benchmark.text_measures import interval, measure_texts, score_texts
from sentcompress.text.lossless_tokenizer import lossless


def test_words_are_in_lower_case_and_without_marks():
    assert measures.words("The Union's well-being -- IT, too; 1,000.") == [
        "the",
        "union's",
        "well-being",
        "it",
        "too",
        "1",
        "000",
    ]


def test_distinct_n_grams_are_counted_over_all_samples_and_inside_each():
    samples = [["a", "b", "a", "b"], ["b", "a"], ["c"]]
    assert measures.distinct(samples, 1).value == pytest.approx(3 / 7)
    assert measures.distinct(samples, 2).value == pytest.approx(2 / 4)  # no pair across samples
    assert measures.distinct(samples, 3).value == 1
    # "c" is the third sample's alone; the other two share theirs.
    assert measures.distinct(samples, 1).lost.tolist() == [0, 0, 1]


def test_repetition_counts_what_the_same_sample_had_before():
    assert measures.repetition([list("abcdabcd")], 4).value == pytest.approx(1 / 5)
    assert measures.repetition([list("abcdefgh"), list("abcdefgh")], 4).value == 0
    assert measures.repetition([list("aaaaaaaa"), list("abcdefgh")], 4).value == pytest.approx(4 / 10)


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ([7] * 32, True),
        ([7] * 31, False),
        ([*range(100), *[1, 2, 3] * 11], True),
        ([*range(100), *[1, 2, 3] * 10], False),  # 30 tokens
        ([*range(100), *[1, 2, 3] * 11, 9], False),  # it got out of it
        ([*range(20), *range(20)], True),  # one cycle of 20, twice
        ([*range(20), *range(19)], False),  # not twice
        (list(range(64)), False),
        ([], False),
    ],
)
def test_loops(sample, expected):
    assert measures.ends_in_loop(sample) is expected


@pytest.mark.parametrize("make", [lambda s: measures.distinct(s, 2), lambda s: measures.repetition(s, 2)])
def test_values_of_prompts_have_the_measure_as_their_mean(make):
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, 8, size).tolist() for size in (20, 31, 12, 40, 25)]
    measure = make(samples)
    assert measure.by_prompt.mean() == pytest.approx(measure.value)
    # What leaving one out gives is what measuring without it gives.
    without = make(samples[1:])
    left = (measure.total - measure.lost[0]) / (measure.sizes.sum() - measure.sizes[0])
    assert left == pytest.approx(without.value)


def test_a_mean_s_values_are_the_samples_own():
    measure = measures.sum_over([3, 5, 10], [1, 1, 1])
    assert measure.by_prompt.tolist() == pytest.approx([3, 5, 10])


def test_the_interval_holds_the_measure_and_narrows_with_more_prompts():
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 50, 60).tolist() for _ in range(64)]
    few, many = (measures.distinct(texts[:n], 2) for n in (8, 64))
    one, other = (interval(m.by_prompt, m.value, 0) for m in (few, many))
    for found in (one, other):
        assert found.low < found.value < found.high
    assert other.high - other.low < one.high - one.low
    assert interval(many.by_prompt, many.value, 0) == other


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(2).normal(0, 1, 100)
    measure = measures.sum_over(values, np.ones(100))
    found = interval(measure.by_prompt, measure.value, 0)
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.05)


def test_one_prompt_has_no_interval(tokenizer):
    measured = measure_texts(["The people of this nation."], lossless(tokenizer))
    score = score_texts("x", ["The people of this nation."], measured, measured, 0)
    assert score.measures["words"].value == 5
    assert score.measures["words"].low is None
    assert score.differences["words"].high is None


def judged(texts: list[str], bits: list[float]) -> QualityScore:
    rows = [
        DocumentScore(
            document=n,
            source="",
            bytes=len(text),
            covered_bytes=len(text),
            nats=b * np.log(2),
            targets=1,
            baseline_tokens=1,
        )
        for n, (text, b) in enumerate(zip(texts, bits, strict=True))
    ]
    return QualityScore(
        system="x",
        bits_per_byte=0,
        perplexity=1,
        nats=0,
        bytes=1,
        targets=1,
        baseline_tokens=1,
        context="",
        documents=rows,
    )


def test_all_measures_of_texts_made_by_hand(tokenizer):
    texts = ["The law is the law. So it is.", "Peace!"]
    found = measure_texts(texts, lossless(tokenizer), judged(texts, [29.0, 6.0]))
    values = {name: measure.value for name, measure in found.items()}
    assert values["words"] == 4.5
    assert values["sentence_words"] == 3  # 9 words, 3 sentences
    assert values["distinct_1"] == pytest.approx(6 / 9)
    assert values["distinct_2"] == pytest.approx(6 / 7)
    assert values["loops"] == 0
    assert values["judge_bits_per_byte"] == pytest.approx(35 / 35)


def test_texts_without_words_leave_measures_out_instead_of_dividing_by_zero(tokenizer):
    found = measure_texts(["", "..."], lossless(tokenizer))
    assert found["words"].value == 0
    assert not {"distinct_1", "sentence_words"} & set(found)


def test_differences_are_taken_prompt_by_prompt(tokenizer):
    counter = lossless(tokenizer)
    long = ["Peace and order. " * n for n in (1, 20, 3, 40)]
    longer = [text + "So be it. " for text in long]
    mine, theirs = measure_texts(longer, counter), measure_texts(long, counter)
    words = score_texts("x", longer, mine, theirs, 0).differences["words"]
    # The prompts differ much, the pairs do not at all.
    assert (words.value, words.low, words.high) == pytest.approx((3, 3, 3))
    assert score_texts("x", longer, mine, None, 0).differences == {}
