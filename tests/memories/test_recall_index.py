"""The index of `recall`: what it finds, its size, and that a token's row depends on nothing but its own key."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sentcompress.memories.recall import Recall

BITS = {1: 0.78, 2: 0.92, 4: 0.99, 8: 0.999}
"""Least correlation with the exact products, by bits."""


def recall(**options):
    return Recall(Recall.Options(**options))


def keys_and_queries(size, dtype=torch.float32):
    """As in LLMs: one channel far larger than the others, in all keys alike, and long tokens beside short ones."""
    torch.manual_seed(0)
    keys = torch.randn(2, 3, 400, size) * torch.rand(2, 3, 400, 1).add(0.5)
    keys[..., 1] += 4
    return keys.to(dtype), torch.randn(2, 3, 5, size).to(dtype)


def products(queries, keys):
    return queries.float() @ keys.float().transpose(-1, -2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [6, 64, 80, 128])
@pytest.mark.parametrize("bits", BITS)
def test_scores_are_close_to_the_products_of_queries_and_keys(bits, size, dtype):
    keys, queries = keys_and_queries(size, dtype)
    memory = recall(index_bits=bits)
    found, exact = memory.scores(queries, memory.index(keys)), products(queries, keys)
    assert found.dtype == dtype
    assert torch.corrcoef(torch.stack([found.float().flatten(), exact.flatten()]))[0, 1] > BITS[bits]
    assert (found.float() * exact).sum() / exact.square().sum() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("bits", "bytes_"), [(1, 10), (2, 18), (4, 34), (8, 66), (16, 128)])
def test_bytes_of_a_token(bits, bytes_):
    index = recall(index_bits=bits).index(torch.randn(1, 2, 7, 64).bfloat16())
    assert index.shape[:3] == (1, 2, 7)
    assert index.shape[3] * index.element_size() == bytes_


@pytest.mark.parametrize("bits", [*BITS, 16])
def test_a_token_is_indexed_by_its_own_key_alone(bits):
    keys, _ = keys_and_queries(64)
    memory = recall(index_bits=bits)
    parts = [memory.index(keys[:, :, start : start + 100]) for start in range(0, 400, 100)]
    assert torch.equal(torch.cat(parts, 2), memory.index(keys))
    assert torch.equal(recall(index_bits=bits).index(keys), memory.index(keys))


@pytest.mark.parametrize("bits", BITS)
def test_candidates_hold_the_key_that_answers(bits):
    keys, queries = keys_and_queries(64)
    keys[:, :, 123:128] += 0.6 * queries.transpose(0, 1).reshape(3, 2, 5, 64).transpose(0, 1)
    memory = recall(index_bits=bits)
    best = memory.scores(queries, memory.index(keys)).topk(20, -1).indices
    answers = products(queries, keys).argmax(-1, keepdim=True)
    assert (best == answers).any(-1).float().mean() >= 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [6, 64, 256])
@pytest.mark.parametrize("bits", BITS)
def test_a_query_scores_the_same_while_writing_and_in_a_long_prompt(bits, size, dtype):
    keys, _ = keys_and_queries(size, dtype)
    queries = 3 * torch.randn(2, 3, 100, size).to(dtype)
    memory = recall(index_bits=bits)
    index = memory.index(keys)
    alone = torch.cat([memory.scores(query, index) for query in queries.split(1, dim=2)], 2)
    # One query turns into another than among many by its last bits, which may decide how a channel is rounded.
    same = torch.isclose(memory.scores(queries, index), alone, rtol=1e-5, atol=1e-4)
    assert same.float().mean() > 0.97


def test_scores_are_right_on_a_cpu_whose_8_bit_products_overflow():
    """The variable keeps oneDNN from using newer instructions; other CPUs ignore it."""
    code = """
import torch
from sentcompress.memories.recall import Recall, _rotation
memory = Recall(Recall.Options(index_bits=8))
turned = torch.rand(1, 1, 500, 1).add(0.5).expand(-1, -1, -1, 64)  # all sums of products are as large as can be
keys = turned @ _rotation(64, turned.device).T
found, exact = memory.scores(keys[:, :, :3], memory.index(keys)), keys[:, :, :3] @ keys.transpose(-1, -2)
torch.testing.assert_close(found, exact, rtol=0.02, atol=0)
"""
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("queries", [3, 100])
@pytest.mark.parametrize("bits", BITS)
def test_large_queries_do_not_overflow_in_fp16(bits, queries):
    signs = torch.randn(1, 1, 1, 128).sign()
    memory = recall(index_bits=bits)
    turn = torch.linalg.inv(memory._rotated(torch.eye(128)))
    keys, query = (0.1 * signs @ turn).half(), (20 * signs @ turn).half()
    found = memory.scores(query.expand(-1, -1, queries, -1), memory.index(keys))
    torch.testing.assert_close(found, torch.full_like(found, 256), rtol=0.02, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_empty_keys_and_no_tokens(bits):
    memory = recall(index_bits=bits)
    queries = torch.randn(1, 1, 2, 64)
    assert torch.equal(
        memory.scores(queries, memory.index(torch.zeros(1, 1, 3, 64))), torch.zeros(1, 1, 2, 3)
    )
    assert memory.scores(queries, memory.index(torch.zeros(1, 1, 0, 64))).shape == (1, 1, 2, 0)


def test_as_many_candidates_as_are_recalled_at_least():
    assert recall(recall=40, candidates=3).candidates == 40
    assert recall(recall=4, candidates=3).candidates == 4
    for bits in (8, 16):
        assert recall(recall=4, index_bits=bits).candidates == 4
