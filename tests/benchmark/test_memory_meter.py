"""Memory: cache bytes equal what the shapes say, and the meter counts what is alive."""

from __future__ import annotations

import pytest
import torch

from sentcompress.benchmark.memory_meter import MemoryMeter, cache_tensors, measure_memory, weight_bytes
from sentcompress.errors import RunError
from sentcompress.estimate.shapes import random_sentences
from sentcompress.testing import tiny_opt, tiny_sentence_lm

PER_POSITION = 2 * 3 * 32 * 4  # keys and values, 3 layers of 32, fp32


def measure(model, **settings):
    arguments = {
        "sentences": random_sentences([5] * 40, 500, seed=0),
        "sentence_lengths": [4, 6],
        "new_tokens": 60,
        "bos_token_id": 2,
    }
    return measure_memory(model, tiny_opt(), **{**arguments, **settings})


@pytest.mark.parametrize("latents", [1, 2])
def test_cache_bytes_are_those_of_the_shapes(latents):
    vae = {} if latents == 1 else {"fusion": {"name": "attention", "options": {}}, "latents": 2}
    tokens, sentences = measure(tiny_sentence_lm(vae=vae))
    assert tokens.cache_bytes_per_token == PER_POSITION
    assert sentences.cache_bytes_per_position == PER_POSITION
    assert sentences.cache_bytes_per_token == pytest.approx(PER_POSITION * latents / 5)
    assert tokens.position_limit_tokens == 128
    assert sentences.position_limit_tokens == 128 // latents * 5
    assert tokens.longest_context_tokens == 2**30 // PER_POSITION
    assert sentences.longest_context_tokens > 2 * tokens.longest_context_tokens
    # A start and 24 tokens.
    assert sentences.transient_bytes == 2 * 4 * 32 * (24 + 1)


def test_slopes_show_the_cache_growing():
    tokens, sentences = measure(tiny_sentence_lm(), new_tokens=100)
    assert len(tokens.series) > 50
    # A growing cache is copied when it grows, so its peak is above its size, never below it.
    assert tokens.peak_slope_bytes_per_token > 0.8 * PER_POSITION
    assert sentences.peak_slope_bytes_per_token < tokens.peak_slope_bytes_per_token
    assert tokens.weight_bytes == weight_bytes(tiny_opt())


def test_the_meter_counts_what_is_alive():
    weights = torch.ones(1000)
    with MemoryMeter() as meter:
        a = torch.zeros(100, 100)
        assert meter.live == 40_000
        view = a.t()
        a.add_(1)
        weights.mul_(2)
        assert meter.live == 40_000
        b = a @ a
        assert meter.live == meter.peak == 80_000
        del a, view
        assert meter.live == 40_000
        assert meter.lap() == 80_000
        assert meter.lap() == 40_000
        del b
    assert meter.live == 0


def test_a_cache_that_cannot_be_counted_is_an_error():
    class Empty:
        layers = ()

    with pytest.raises(RunError, match="Empty"):
        cache_tensors(Empty())
