"""Which blocks recall: found on random tokens, named by hand, and the others store nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sentcompress import SentenceMemory
from sentcompress.errors import InputError
from sentcompress.sentence_memory.attachment_proof import Words
from sentcompress.sentence_memory.retrieval_blocks import THRESHOLD, looked_back

OPTIONS = {"recent_sentences": 1, "recall": 2, "max_sentence_tokens": 5}


def llama(*looking: int, blocks: int = 3) -> LlamaForCausalLM:
    """An LLM some blocks of which attend to earlier places of the same token; the others attend to all alike."""
    torch.manual_seed(0)
    # So slow a rotation that only the first pairs of channels turn.
    config = LlamaConfig(
        vocab_size=4000,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=blocks,
        num_attention_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e30},
    )
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    for number, layer in enumerate(model.model.layers):
        same = 3.0 * torch.eye(32) if number in looking else torch.zeros(32, 32)
        same[[0, 1, 16, 17]] = 0
        layer.self_attn.q_proj.weight.data = same.clone()
        layer.self_attn.k_proj.weight.data = same.clone()
        layer.self_attn.o_proj.weight.data *= 0.1
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(99, (2, 60), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def by_steps(model, memory, ids):
    parts = [ids[:, :20], *ids[:, 20:].split(1, 1)]
    return torch.cat([model(input_ids=part, past_key_values=memory).logits for part in parts], 1)


def test_blocks_that_look_back_are_found():
    model = llama(1)
    memory = SentenceMemory(model, Words(), **OPTIONS)
    assert memory.recall_blocks == [1]
    shares = looked_back(model, 3)
    assert shares[1] > THRESHOLD > 10 * max(shares[0], shares[2])
    assert not model.training


def test_all_recall_where_none_looks_back():
    assert SentenceMemory(llama(), Words(), **OPTIONS).recall_blocks == [0, 1, 2]


def test_a_memory_without_recall_looks_for_none():
    assert SentenceMemory(llama(1), Words(), "window").recall_blocks == []


@pytest.mark.parametrize("storage", ["host", "int8"])
def test_steps_equal_one_pass(ids, storage):
    model = llama(1)
    memory = SentenceMemory(model, Words(), **OPTIONS, storage=storage)
    steps = by_steps(model, memory, ids)
    assert [bool(layer.storage) for layer in memory.layers] == [False, True, False]
    memory.reset()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, past_key_values=memory).logits, steps)


def test_other_blocks_do_not_see_what_is_recalled(ids):
    model = llama(1)
    some = SentenceMemory(model, Words(), **OPTIONS)
    every = SentenceMemory(model, Words(), **OPTIONS, recall_blocks="all")
    none = SentenceMemory(model, Words(), "window", recent_sentences=1, max_sentence_tokens=5)
    own, all_blocks, window = (by_steps(model, memory, ids) for memory in (some, every, none))
    assert not own.allclose(window)
    assert not own.allclose(all_blocks)
    assert 0 < some.storage_bytes() < every.storage_bytes()
    assert some.device_bytes() < every.device_bytes()


def test_a_prefix_keeps_its_blocks(ids):
    model = llama(1)
    memory = SentenceMemory(model, Words(), **OPTIONS, recall_blocks=[0, 2])
    assert memory.recall_blocks == [0, 2]
    with torch.no_grad():
        model(input_ids=ids[:1, :40], past_key_values=memory)
        copy = memory.copy()
        assert copy.recall_blocks == [0, 2]
        more = (model(input_ids=ids[:1, 40:], past_key_values=each).logits for each in (memory, copy))
        torch.testing.assert_close(*more)


@pytest.mark.parametrize("wanted", [7, None, "some", [], [3], [-1], [True], ["0"]])
def test_blocks_that_are_not_there_are_refused(wanted):
    with pytest.raises(InputError, match=r"recall_blocks.*\n?.*from 0 to 2"):
        SentenceMemory(llama(), Words(), **OPTIONS, recall_blocks=wanted)
