"""Which LLMs take a memory is proven on them, not listed: families nobody wrote a line for, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from sentcompress import SentenceMemory
from sentcompress.errors import InputError
from sentcompress.sentence_memory import block_cache
from sentcompress.sentence_memory.attachment_proof import Words
from sentcompress.sentence_memory.block_cache import BlockCache
from sentcompress.sentence_memory.policy import Policy

NAMED = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi", "opt", "gpt2", "gpt_neox"]
OTHERS = [
    *(
        "gemma",
        "phi3",
        "olmo",
        "olmo2",
        "cohere",
        "cohere2",
        "granite",
        "smollm3",
        "starcoder2",
        "nemotron",
        "glm",
    ),
    *("glm4", "exaone4", "ernie4_5", "arcee", "helium", "seed_oss", "apertus", "bitnet", "persimmon"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss"),
]
REFUSED = {
    "bloom": "attention interface",
    "gptj": "attention interface",
    "mpt": "attention interface",
    "mamba": "attention interface",
    "minimax": "cache of its own",
}


def tiny(model_type: str):
    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": None,
    }
    if model_type == "gpt2":
        sizes |= {"n_inner": 64}
    elif model_type == "opt":
        sizes |= {"ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 1}
    else:
        sizes |= {"intermediate_size": 64, "num_key_value_heads": 2}
    if "head_dim" in CONFIG_MAPPING[model_type]().to_dict():
        sizes["head_dim"] = 8
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("model_type", NAMED)
def test_families_take_a_memory(model_type):
    SentenceMemory(tiny(model_type), Words())


@pytest.mark.parametrize("model_type", OTHERS)
def test_so_do_others(model_type):
    SentenceMemory(tiny(model_type), Words())


@pytest.mark.parametrize("model_type", REFUSED)
def test_the_rest_is_refused_with_a_reason(model_type):
    with pytest.raises(InputError, match=REFUSED[model_type]) as refused:
        SentenceMemory(tiny(model_type), Words())
    page = " ".join((Path(__file__).parents[2] / "docs/memory.md").read_text(encoding="utf-8").split())
    named = str(refused.value.fix).removeprefix("use another LLM: ").removesuffix(" work (docs/memory.md)")
    assert f"as that of {named} does" in page


def test_attention_in_chunks_is_refused():
    model = tiny("llama")
    model.config.attention_chunk_size = 8
    with pytest.raises(InputError, match="chunks"):
        SentenceMemory(model, Words())


def test_an_llm_is_proven_once(monkeypatch):
    model = tiny("llama")
    SentenceMemory(model, Words())
    monkeypatch.setattr(BlockCache, "attend", lambda *_, **__: 1 / 0)
    SentenceMemory(model, Words())


class TestWhatTheProofCatches:
    """A cache that does other than its memory says, as a plugin or a later change might make it."""

    def refused(self, match):
        with pytest.raises(InputError, match=match):
            SentenceMemory(tiny("llama"), Words())

    def test_attention_to_what_was_dropped(self, monkeypatch):
        attend = block_cache.attend_in_one_pass

        def leaky(query, key, value, layout, _, *args, **options):
            whole = Policy.parse("window", {"recent_sentences": 99})
            return attend(query, key, value, layout, whole, *args, **options)

        monkeypatch.setattr(block_cache, "attend_in_one_pass", leaky)
        self.refused("has dropped")

    def test_no_attention_to_what_is_kept(self, monkeypatch):
        attend = block_cache.attend_in_one_pass

        def forgetful(query, key, value, layout, policy, *args, **options):
            if policy.options["sinks"] == 2:
                policy = Policy.parse("window", {"recent_sentences": 0, "sinks": 0})
            return attend(query, key, value, layout, policy, *args, **options)

        monkeypatch.setattr(block_cache, "attend_in_one_pass", forgetful)
        self.refused("does not attend to tokens that its memory keeps")

    def test_single_tokens_that_see_less(self, monkeypatch):
        step = BlockCache._attend_one

        def blind(self, query, key, value, plan, **options):
            plan.seen[..., :2] = False
            return step(self, query, key, value, plan, **options)

        monkeypatch.setattr(BlockCache, "_attend_one", blind)
        self.refused("token by token")

    def test_recalled_keys_in_the_wrong_place(self, monkeypatch):
        monkeypatch.setattr(BlockCache, "_fetch", lambda _, wanted: wanted[..., :0])
        self.refused("recalled")
