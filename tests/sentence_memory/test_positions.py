"""Re-indexed positions: pure functions of the place in the text, and keys rotated by each family's own functions."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sentcompress import SentenceMemory
from sentcompress.errors import InputError
from sentcompress.sentence_memory.positions import (
    effective_position,
    find_rotations,
    moved_position,
    moves_before,
    rotary_limit,
)
from sentcompress.testing import tiny_tokenizer

LIMIT = 64
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LIMIT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {"head_dim": 8}
MIXED = {**HEAD, "layer_types": ["sliding_attention", "full_attention"] * 2}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "rope_theta": 1e4,
    "original_max_position_embeddings": 32,
}
ROTARY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", HEAD),
    "gemma2": ("Gemma2", HEAD),
    "gemma3, two frequencies": ("Gemma3Text", MIXED),
    "phi, half of the channels": ("Phi", {}),
    "gpt-neox, a quarter of them": ("GPTNeoX", {}),
    "cohere, interleaved": ("Cohere", {}),
    "cohere2, blocks without positions": ("Cohere2", MIXED),
    "glm, interleaved half": ("Glm", HEAD),
    "gpt-oss, half cosines and YaRN": ("GptOss", {**HEAD, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "smollm3, a block without positions": ("SmolLM3", {}),
    "gemma4, one tensor at a time": (
        "Gemma4Text",
        {**MIXED, "global_head_dim": 8, "hidden_size_per_layer_input": 8},
    ),
    "falcon": ("Falcon", {}),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "longrope": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt, learned": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt-neo, learned": ("GPTNeo", {"attention_types": [[["global"], 4]], "num_layers": 4}),
    "bloom, ALiBi": ("Bloom", {}),
    "llama4, complex numbers": (
        "Llama4Text",
        {**HEAD, "num_local_experts": 2, "intermediate_size_mlp": 32},
    ),
}


def tiny(name: str, settings: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()


@torch.no_grad()
def keys_at(model: PreTrainedModel, positions: Tensor) -> list[Tensor]:
    """Keys ``[1, heads, T, D]`` of each block for the same tokens, with only distances in common."""
    cache = DynamicCache()
    ids = torch.arange(3, 3 + len(positions))[None]
    model(input_ids=ids, position_ids=positions[None], past_key_values=cache, use_cache=True)
    return [layer.keys for layer in cache.layers]


@pytest.mark.parametrize(("name", "settings"), ROTARY.values(), ids=ROTARY)
def test_rotated_keys_are_those_of_the_other_positions(name: str, settings: dict[str, Any]):
    """Of tokens that attend to each other: distances stay, so what blocks read stays, and only the rotation differs."""
    model = tiny(name, settings)
    limit = rotary_limit(model)
    assert limit == (32 if "original_max_position_embeddings" in settings else LIMIT)
    rotations = find_rotations(model, limit)
    low, high = torch.arange(8), torch.arange(limit - 8, limit)
    before, after = keys_at(model, low), keys_at(model, high)
    delta = (high - low)[None]
    for rotation, start, end in zip(rotations, before, after, strict=True):
        torch.testing.assert_close(rotation.rotate(start, delta), end, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rotation.rotate(end, -delta), start, atol=1e-5, rtol=1e-5)
    assert any((start - end).abs().max() > 0.01 for start, end in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "family",
    ["gemma3, two frequencies", "phi, half of the channels", "cohere2, blocks without positions", "longrope"],
)
@torch.no_grad()
def test_step_by_step_equals_one_pass_beyond_the_limit(family: str):
    name, settings = ROTARY[family]
    tokenizer = tiny_tokenizer()
    model = tiny(name, {**settings, "vocab_size": len(tokenizer), "initializer_range": 0.1})
    options = {
        "recent_sentences": 1,
        "recall": 2,
        "max_sentence_tokens": 4,
        "positions": "reindexed",
        "prove": False,
    }
    whole, steps = (SentenceMemory(model, tokenizer, **options) for _ in range(2))
    ids = 10 + torch.randperm(len(tokenizer) - 10, generator=torch.Generator().manual_seed(0))[None, :100]
    wanted = model(input_ids=ids, past_key_values=whole).logits
    parts = [ids[:, :30], *ids[:, 30:].split(1, 1)]
    found = torch.cat([model(input_ids=part, past_key_values=steps).logits for part in parts], 1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "settings"), OTHERS.values(), ids=OTHERS)
def test_other_positions_are_refused(name: str, settings: dict[str, Any]):
    with pytest.raises(InputError, match=rf"positions of {name[:4]}\w+ cannot be re-indexed: "):
        find_rotations(tiny(name, settings), LIMIT)


def test_half_precision_is_recognized():
    model = tiny("Gemma3Text", MIXED).to(torch.bfloat16)
    rotations = find_rotations(model, LIMIT)
    assert [rotation.layer_type for rotation in rotations] == MIXED["layer_types"]
    keys = torch.randn(2, 2, 5, 8, dtype=torch.bfloat16)
    assert rotations[0].rotate(keys, torch.full((2, 5), -9)).dtype == torch.bfloat16
    assert torch.equal(rotations[0].rotate(keys, torch.zeros(2, 5).long()), keys)


def test_positions_stay_below_the_limit_and_are_true_before_it():
    token = torch.arange(300)
    position = effective_position(token, LIMIT)
    assert torch.equal(position[:LIMIT], token[:LIMIT])
    assert position.max() == LIMIT - 1
    assert position[LIMIT:].min() == LIMIT // 2
    moved = moves_before(token, LIMIT).diff() > 0
    assert (moved.nonzero().flatten() + 1).tolist() == list(range(LIMIT, 300, LIMIT // 2))
    assert (position.diff() == 1)[~moved].all()


def test_moved_positions_keep_recent_distances_and_the_order_in_a_sentence():
    sinks, length = 4, 7
    token = torch.arange(200)
    offset = token % length
    for now in (20, 63, 64, 95, 96, 199):
        moves = moves_before(torch.tensor(now), LIMIT)
        seen = moved_position(token[: now + 1], offset[: now + 1], moves, LIMIT, sinks)
        assert seen[now] == effective_position(torch.tensor(now), LIMIT)
        assert torch.equal(seen[:sinks], token[: min(sinks, now + 1)])
        assert seen.max() == seen[now]
        near = slice(max(sinks, now - 20), now + 1)
        assert torch.equal(seen[near] - seen[now], token[near] - now)
        for start in range(length, now - length, length):
            assert (seen[start : start + length].diff() == 1).all()
