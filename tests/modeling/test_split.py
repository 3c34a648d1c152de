"""Split LLMs: middle blocks once per sentence, in all the ways an LLM is used."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen3Config,
    StaticCache,
)

from sentcompress.errors import InputError
from sentcompress.modeling.device_map import blocks_of
from sentcompress.modeling.pruning import pruned
from sentcompress.modeling.split import split
from sentcompress.modeling.split_proof import check_split, prove_split

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "intermediate_size": 48,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
KINDS = ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"]
CONFIGS = [
    LlamaConfig(**SIZES, num_key_value_heads=2),
    Qwen3Config(**SIZES, **GROUPED),
    Gemma3TextConfig(**SIZES, **GROUPED, sliding_window=6, layer_types=KINDS),
    MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=6),
    OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
    GPT2Config(**SIZES, n_positions=128),
    GPTNeoXConfig(**SIZES),
    PhiConfig(**SIZES),
]
PROMPT, NEW = 30, 12


class Finder:
    """Sentences begin with every fifth token id, and after seven tokens."""

    def begins(self, sentence: list[int], token: int) -> bool:
        return bool(sentence) and (token % 5 == 0 or len(sentence) >= 7)


def made(config: PretrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)  # so that all blocks matter
    return lm


def written(lm, ids, **options):
    return lm.generate(
        ids,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        **{"attention_mask": torch.ones_like(ids)} | options,
    )[:, ids.shape[1] :]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 101, (2, PROMPT), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
class TestEachFamily:
    def test_is_proven(self, config):
        lm = made(config)
        split(lm, Finder(), 2, 2)
        assert [finding.problem for finding in prove_split(lm)] == [""] * 4

    def test_without_its_middle_it_is_the_pruned_llm(self, config, ids):
        lm = made(config)
        expected = pruned(lm, [0, 1, 5, 6])(input_ids=ids).logits
        split(lm, Finder(), 2, 2).has_middle = False
        assert torch.allclose(lm(input_ids=ids).logits, expected, atol=1e-4)

    def test_writes_the_same_with_a_cache_and_without(self, config, ids):
        lm = made(config)
        split(lm, Finder(), 2, 2)
        assert written(lm, ids).equal(written(lm, ids, use_cache=False))

    def test_beams_write_the_same_with_a_cache_and_without(self, config, ids):
        lm = made(config)
        split(lm, Finder(), 2, 2)
        assert written(lm, ids, num_beams=3).equal(written(lm, ids, num_beams=3, use_cache=False))

    def test_writes_the_same_in_a_padded_batch(self, config, ids):
        lm = made(config)
        split(lm, Finder(), 2, 2)
        short = ids[:1, 5:]
        batch = torch.cat([torch.cat([ids.new_zeros(1, 5), short], 1), ids[1:]])
        mask = (torch.arange(PROMPT) >= torch.tensor([[5], [0]])).long()
        assert written(lm, batch, attention_mask=mask)[:1].equal(written(lm, short))


def test_its_sentences_have_the_depth_of_the_whole_llm(ids):
    """With each token a sentence of its own, each state of the last blocks' entries is that of the whole LLM."""
    lm = made(CONFIGS[0])
    whole = {}
    hook = blocks_of(lm)[4].register_forward_hook(lambda *call: whole.update(states=call[2]))
    lm(input_ids=ids, use_cache=False)
    hook.remove()

    class Each:
        def begins(self, sentence, token):
            return bool(sentence)

    split(lm, Each(), 2, 2)
    entries = {}
    last = blocks_of(lm)[5]
    seen = last.self_attn.register_forward_pre_hook(lambda *call: entries.update(call[2]), with_kwargs=True)
    lm(input_ids=ids, use_cache=False)
    seen.remove()
    expected = last.input_layernorm(whole["states"])[:, :-1]  # the last token's sentence is not over
    assert torch.allclose(entries["hidden_states"][:, PROMPT:], expected, atol=1e-4)


def test_gradients_reach_all_blocks(ids):
    lm = made(CONFIGS[0]).train()
    split(lm, Finder(), 2, 2)
    lm(input_ids=ids, use_cache=False).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in blocks_of(lm).parameters())


def test_the_cache_of_the_middle_holds_sentences_only(ids):
    lm = made(CONFIGS[0])
    split(lm, Finder(), 2, 2)
    cache = lm(input_ids=ids[:1], use_cache=True).past_key_values
    state = cache.layers[-1]
    finished = state.ranks.shape[1]
    assert 4 < finished < PROMPT / 2
    assert {block: key.shape[2] for block, (key, _) in state.entries.items()} == dict.fromkeys(
        range(2, 7), finished
    )
    assert {block: key.shape[2] for block, (key, _) in state.tokens.items()} == {5: PROMPT, 6: PROMPT}


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [(0, 2, "0 first and 2 last of 7"), (2, 0, "at least 1 each"), (4, 3, "at most 6 together")],
)
def test_no_middle_is_refused(first, last, message):
    with pytest.raises(InputError) as refused:
        split(made(CONFIGS[0]), Finder(), first, last)
    assert message in refused.value.message + refused.value.fix


def test_first_blocks_without_a_kind_of_attention_are_refused():
    with pytest.raises(
        InputError, match="the first 1 blocks have none of the kind full_attention"
    ) as refused:
        split(made(CONFIGS[2]), Finder(), 1, 2)
    assert refused.value.fix == "choose at least 2 first blocks"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "finds sentences in its tokens"),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 1, 3, 3)},
            "masks",
        ),
        (
            {
                "input_ids": torch.ones(1, 3, dtype=torch.long),
                "past_key_values": StaticCache(CONFIGS[0], max_cache_len=8),
            },
            "got StaticCache",
        ),
    ],
)
def test_what_it_cannot_take_is_refused(arguments, message):
    lm = made(CONFIGS[0])
    split(lm, Finder(), 2, 2)
    with pytest.raises(InputError, match=message):
        lm(**arguments)


def test_a_cache_of_the_whole_llm_is_refused(ids):
    lm = made(CONFIGS[0])
    cache = lm(input_ids=ids, use_cache=True).past_key_values
    split(lm, Finder(), 2, 2)
    with pytest.raises(InputError, match="filled by an LLM that is not split"):
        lm(input_ids=ids[:, :1], past_key_values=cache)


def test_tokens_after_padding_on_the_right_are_refused(ids):
    lm = made(CONFIGS[0])
    split(lm, Finder(), 2, 2)
    mask = torch.ones_like(ids)
    mask[0, 20:23] = 0
    with pytest.raises(InputError, match="tokens follow padding on the right"):
        lm(input_ids=ids, attention_mask=mask)
    mask[0, 20:] = 0
    cache = lm(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values  # nothing follows yet
    longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    with pytest.raises(InputError, match="padding on the right"):
        lm(input_ids=ids[:, :1], attention_mask=longer, past_key_values=cache)


def test_positions_may_be_given_for_the_prompt_only(ids):
    lm = made(CONFIGS[0])
    split(lm, Finder(), 2, 2)
    positions = torch.arange(PROMPT - 1).expand(2, -1)
    cache = lm(input_ids=ids[:, :-1], position_ids=positions, use_cache=True).past_key_values
    last = lm(input_ids=ids[:, -1:], past_key_values=cache).logits
    assert torch.allclose(last, lm(input_ids=ids).logits[:, -1:], atol=1e-4)


def test_a_copy_is_independent(ids):
    lm = made(CONFIGS[0])
    split(lm, Finder(), 2, 2)
    before = lm(input_ids=ids).logits
    copied = copy.deepcopy(lm)
    assert copied(input_ids=ids).logits.equal(before)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert lm(input_ids=ids).logits.equal(before)
    assert not copied(input_ids=ids).logits.any()


def test_it_is_split_once():
    lm = made(CONFIGS[0])
    split(lm, Finder(), 2, 2)
    with pytest.raises(InputError, match="split already"):
        split(lm, Finder(), 1, 1)


def test_assisted_decoding_is_refused(ids):
    lm = made(CONFIGS[0])
    split(lm, Finder(), 2, 2)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        written(lm, ids[:1], prompt_lookup_num_tokens=3)


def test_an_llm_that_sees_later_tokens_is_refused():
    lm = made(CONFIGS[0])
    split(lm, Finder(), 2, 2)
    lm.model.layers[0].register_forward_hook(lambda *call: call[2] + call[2].mean(1, keepdim=True))
    with pytest.raises(InputError, match="a token changes the logits of tokens before it"):
        check_split(lm)
