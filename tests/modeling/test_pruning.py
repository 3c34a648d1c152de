"""An LLM with some of its blocks, against the whole one that skips the others."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sentcompress.modeling.device_map import blocks_of
from sentcompress.modeling.pruning import block_similarity, cut_config, ends, least_similar, pruned
from sentcompress.registry import get_registry
from sentcompress.testing import tiny_opt


def families():
    for name in get_registry().names("backbone"):
        for number, shape in enumerate(getattr(get_registry().get("backbone", name), "tiny_configs", ())):
            settings = dict(shape)
            config = AutoConfig.for_model(settings.pop("model_type"), **settings)
            yield pytest.param(config, id=f"{name}-{config.model_type}-{number}")


def skipping(lm, kept, ids):
    """Logits of the whole LLM when the blocks that are not kept return what they got."""

    def skip(_, inputs, keywords, output):
        states = inputs[0] if inputs else keywords["hidden_states"]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    hooks = [
        block.register_forward_hook(skip, with_kwargs=True)
        for number, block in enumerate(blocks_of(lm))
        if number not in kept
    ]
    try:
        return lm(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("config", list(families()))
@torch.no_grad()
def test_a_pruned_llm_is_the_whole_one_without_the_other_blocks(config, tmp_path):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    ids = torch.randint(4, 400, (2, 9))
    number = len(blocks_of(lm))
    assert number >= 2
    for kept in {(0,), (number - 1,), tuple(ends(number, number - 1))}:
        short = pruned(lm, kept)
        expected = skipping(lm, kept, ids)
        torch.testing.assert_close(short(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)
        assert len(blocks_of(short)) == len(kept) == short.config.num_hidden_layers
        short.save_pretrained(tmp_path / str(kept))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(kept)).eval()
        torch.testing.assert_close(again(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_blocks_that_do_nothing_go_first():
    lm = tiny_opt(num_hidden_layers=4).eval()
    for number in (1, 2):
        for name, weight in blocks_of(lm)[number].named_parameters():
            if "out_proj" in name or "fc2" in name:
                weight.zero_()
    batches = [
        {
            "input_ids": torch.randint(4, 400, (2, 12)),
            "attention_mask": torch.tensor([[1] * 12, [1] * 5 + [0] * 7]),
        }
        for _ in range(2)
    ]
    similarity = block_similarity(lm, batches)
    assert similarity.shape == (4,)
    torch.testing.assert_close(similarity[1:3], torch.ones(2, dtype=torch.float64))
    assert least_similar(similarity, 2) == [0, 3]
    short = pruned(lm, least_similar(similarity, 2))
    ids = batches[0]["input_ids"]
    torch.testing.assert_close(short(input_ids=ids).logits, lm(input_ids=ids).logits)


@torch.no_grad()
def test_padding_does_not_count():
    lm = tiny_opt(num_hidden_layers=3).eval()
    ids = torch.randint(4, 400, (1, 6))
    alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padding = torch.full((1, 4), 1)
    padded = {
        "input_ids": torch.cat([ids, padding], 1),
        "attention_mask": torch.cat([torch.ones_like(ids), torch.zeros_like(padding)], 1),
    }
    torch.testing.assert_close(block_similarity(lm, [padded]), block_similarity(lm, [alone]))


def test_ends_and_cut():
    assert ends(30, 4) == [0, 1, 28, 29]
    assert ends(6, 1) == [0]
    assert ends(6, 3) == [0, 1, 5]
    config = AutoConfig.for_model("gemma2", num_hidden_layers=4)
    kinds = config.layer_types
    assert cut_config(config, [0, 3]).layer_types == [kinds[0], kinds[3]]
    with pytest.raises(ValueError, match="5 blocks were asked for, the LLM has 4"):
        cut_config(config, range(5))
