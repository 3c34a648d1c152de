"""The grid of speeds, and what is said where the sentence model loses."""

import pytest

from sentcompress.benchmark.break_even import (
    SWEEP_FILE,
    SpeedSweep,
    SweepPoint,
    sweep_advice,
    sweep_speed,
    sweep_table,
    write_sweep,
)
from sentcompress.errors import InputError
from sentcompress.estimate.shapes import random_sentences
from sentcompress.recipe import BenchSettings
from sentcompress.testing import tiny_opt, tiny_sentence_lm

SENTENCES = random_sentences([3, 6, 1, 8, 5], 500, seed=0)


def measure(**changes):
    asked = {"prompt_tokens": [4, 12], "sentence_tokens": [2, 6]} | changes
    settings = BenchSettings(repeats=2, new_tokens=6, batch_sizes=[1, 2])
    return sweep_speed(
        tiny_sentence_lm(), tiny_opt(), sentences=SENTENCES, settings=settings, bos_token_id=2, **asked
    )


def test_every_point_of_the_grid_is_measured(tmp_path):
    found = measure()
    points = {(c.batch_size, c.prompt_tokens, c.sentence_tokens) for c in found.points}
    assert points == {(b, p, s) for b in (1, 2) for p in (4, 12) for s in (2, 6)}
    assert all(c.lowest <= c.ratio <= c.highest and c.tokens_per_second > 0 for c in found.points)
    assert all((c.lookup_ratio is not None) == (c.batch_size == 1) for c in found.points)
    shown = sweep_table(found)
    assert shown.columns == ["batch", "prompt tokens", "2 per sentence", "6 per sentence"]
    assert len(shown.rows) == 4
    assert SpeedSweep.model_validate_json(write_sweep(found, tmp_path / "new").read_text()) == found
    assert (tmp_path / "new" / SWEEP_FILE).is_file()


def test_sentences_and_prompts_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="over the model's"):
        measure(sentence_tokens=[4, 1000])
    with pytest.raises(InputError, match="positions"):
        measure(prompt_tokens=[4, 500])


def point(batch, sentence, ratio, lookup=None):
    return SweepPoint(
        batch_size=batch,
        prompt_tokens=32,
        sentence_tokens=sentence,
        ratio=ratio,
        lowest=ratio,
        highest=ratio,
        tokens_per_second=1.0,
        lookup_ratio=lookup,
    )


def test_advice_names_the_losing_points_and_what_to_take_there():
    def of(*points):
        return sweep_advice(SpeedSweep(new_tokens=1, repeats=1, points=list(points)))

    assert of(point(1, 8, 3.0, 1.1)) == [
        "Break-even: none in this grid; the sentence model is faster everywhere."
    ]
    small = of(point(1, 2, 0.7, 1.5), point(1, 8, 2.0, 1.5))
    assert "sentences of 2: 0.70x" in small[0]
    assert "speculative" in small[1]
    assert "Prompt lookup is faster" in small[2]
    assert "1.50x against 0.70x" in small[2]
    assert "arithmetic" in of(point(64, 2, 0.9))[1]
