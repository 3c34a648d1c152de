"""What of the backbone learns, and that adapters are folded into a plain model."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sentcompress.errors import InputError, RecipeError
from sentcompress.modeling import SentenceLM
from sentcompress.modeling.device_map import blocks_of
from sentcompress.recipe import BaselineSettings, GraftSettings, build_recipe
from sentcompress.registry import get_registry
from sentcompress.testing import tiny_opt, tiny_passages, tiny_sentence_lm
from sentcompress.training.tuning import apply_tune, merged_state, unreached_weights


def tuned(**settings):
    model = tiny_sentence_lm()
    apply_tune(model.backbone, model.backbone.blocks, GraftSettings(**settings), "graft")
    return model


@pytest.mark.parametrize(
    ("settings", "learns"),
    [
        ({"tune": "full"}, lambda _: True),
        ({"tune": "frozen"}, lambda _: False),
        ({"tune": "last-n", "last_n": 1}, lambda name: ".layers.2." in name),
        ({"tune": "lora"}, lambda name: ".lora_" in name),
    ],
    ids=lambda value: value["tune"] if isinstance(value, dict) else "",
)
def test_only_the_chosen_weights_train(settings, learns):
    model = tuned(**settings)
    backbone = {name: p for name, p in model.named_parameters() if name.startswith("backbone.")}
    assert {name for name, p in backbone.items() if p.requires_grad} == set(filter(learns, backbone))
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.startswith("backbone."))


def test_adapters_are_merged_and_the_folder_is_an_ordinary_model(tmp_path):
    model = tuned(tune="lora", lora={"rank": 4})
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:  # they begin at zero, which would prove nothing
            torch.nn.init.normal_(parameter, std=0.1)
    model.eval()
    model.save_pretrained(tmp_path, state_dict=merged_state(model))
    plain = SentenceLM.from_pretrained(tmp_path).eval()
    assert not any("lora" in name for name in plain.state_dict())
    batch = tiny_passages()
    torch.testing.assert_close(plain(**batch).loss, model(**batch).loss, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain(**batch).loss, tiny_sentence_lm()(**batch).loss, atol=1e-3)


@pytest.mark.parametrize(
    "settings", [{"tune": "last-n", "last_n": 1}, {"tune": "lora"}], ids=lambda s: s["tune"]
)
def test_the_baseline_is_tuned_the_same_way_and_saved_as_an_ordinary_model(tmp_path, settings):
    lm = tiny_opt()
    apply_tune(lm, blocks_of(lm), BaselineSettings(**settings), "baseline")
    learns = [name for name, p in lm.named_parameters() if p.requires_grad]
    assert learns
    assert all(".layers.2." in name or ".lora_" in name for name in learns)
    for name, parameter in lm.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    lm.save_pretrained(tmp_path, state_dict=merged_state(lm))
    ids = torch.arange(5)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(ids).logits, lm(ids).logits, atol=1e-4, rtol=1e-4)


def test_wrong_settings_are_refused():
    with pytest.raises(InputError, match=r"graft.last_n: 9.*3 blocks"):
        tuned(tune="last-n", last_n=9)
    with pytest.raises(InputError, match=r"no linear layer 'q_prj'. Did you mean 'q_proj'"):
        tuned(tune="lora", lora={"target_modules": ["fc1", "q_prj"]})
    with pytest.raises(RecipeError, match=r"frozen trains nothing of the LLM; remove backbone_learning_rate"):
        build_recipe({"name": "x"}, ["graft.tune=frozen", "graft.backbone_learning_rate=1e-4"], "test")


# ---- mixtures of experts

MIXTURES = {
    # Experts as [experts, out, in], as [experts, in, out] with biases, as [experts, in, out], and in a list of layers.
    "mixtral": ({}, "mlp.gate.weight"),
    "gpt_oss": ({"head_dim": 8, "layer_types": ["full_attention"] * 2}, "mlp.router.weight"),
    "granitemoe": ({}, "block_sparse_moe.router.weight"),
    "phimoe": ({}, "mlp.router.weight"),
    "jetmoe": ({"kv_channels": 8}, ""),
}


def mixture(model_type: str):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 500,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "pad_token_id": 1,
    }
    config = AutoConfig.for_model(model_type, **sizes, **MIXTURES[model_type][0])
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def with_random_adapters(model, blocks, settings):
    apply_tune(model, blocks, settings, "graft")
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_adapters_reach_the_experts_and_are_merged(model_type):
    """Of a backbone adapter, which is not a model of transformers but has the configuration of one."""
    backbone = get_registry().get("backbone", "auto").from_causal_lm(mixture(model_type)).eval()
    with_random_adapters(backbone, backbone.blocks, GraftSettings(tune="lora", lora={"rank": 4}))
    frozen = MIXTURES[model_type][1]
    assert unreached_weights(backbone.blocks).partition("frozen: ")[2] == frozen
    plain = get_registry().get("backbone", "auto").from_causal_lm(mixture(model_type)).eval()
    inputs, causal = torch.randn(2, 5, 32), torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    given = (inputs, causal, torch.arange(5).expand(2, -1))
    before = plain(*given)[0]
    adapted = backbone(*given)[0]
    adapted.square().sum().backward()
    adapters = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    assert any("expert" in name or "moe" in name or ".mlp." in name for name in adapters)
    assert all(".lora_" in name and p.grad is not None for name, p in adapters.items())
    plain.load_state_dict(merged_state(backbone))
    torch.testing.assert_close(plain(*given)[0], adapted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, adapted, atol=1e-2)


def test_a_mixture_as_baseline_is_saved_as_an_ordinary_model(tmp_path):
    lm = mixture("mixtral")
    with_random_adapters(lm, blocks_of(lm), BaselineSettings(tune="lora", lora={"rank": 4}))
    lm.save_pretrained(tmp_path, state_dict=merged_state(lm))
    ids = torch.arange(5)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(ids).logits, lm(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"dropout": 0.1}, r"dropout: 0.1.*experts.*mlp.experts.gate_up_proj.*\n.*target_modules"),
        ({"target_modules": ["w1"]}, r"no linear layer 'w1'.*\n.*down_proj, gate_up_proj, k_proj"),
    ],
)
def test_what_a_mixture_cannot_have_is_refused(lora, words):
    lm = mixture("mixtral")
    with pytest.raises(InputError, match=words):
        apply_tune(lm, blocks_of(lm), BaselineSettings(tune="lora", lora=lora), "baseline")


def test_the_note_says_which_layers_were_not_chosen():
    lm = mixture("mixtral")
    chosen = {"target_modules": ["q_proj", "experts.down_proj"]}
    apply_tune(lm, blocks_of(lm), BaselineSettings(tune="lora", lora=chosen), "baseline")
    note = unreached_weights(blocks_of(lm))
    assert "mlp.experts.gate_up_proj, mlp.gate.weight, self_attn.k_proj.weight" in note
    assert unreached_weights(tuned(tune="lora").backbone.blocks) == ""
    assert unreached_weights(tuned(tune="last-n").backbone.blocks) == ""
