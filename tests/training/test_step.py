"""The learning rate of a step. What a step does is tested with the loop and the anomalies."""

from __future__ import annotations

from itertools import pairwise

import pytest

from sentcompress.recipe import TrainingSettings
from sentcompress.training.step import learning_rate


def test_the_rate_warms_up_and_falls_to_its_final_share():
    settings = TrainingSettings(steps=100, learning_rate=1.0, warmup_steps=10, final_learning_rate_share=0.2)
    rates = [learning_rate(step, settings) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.6)  # half of the way: the mean of peak and end
    assert rates[100] == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_without_a_warm_up_the_first_step_has_the_peak():
    settings = TrainingSettings(steps=4, learning_rate=0.5, warmup_steps=0)
    assert learning_rate(0, settings) == 0.5


def test_warm_up_is_five_percent_by_default():
    settings = TrainingSettings(steps=200, learning_rate=1.0)
    assert learning_rate(8, settings) < 1.0
    assert learning_rate(9, settings) == 1.0
