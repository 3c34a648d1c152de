"""What becomes of every causal LM type of transformers as a backbone: ``tools/docs/architectures.yaml``.

Each type is built tiny from its own configuration, saved, and then goes the way of a user's model up to a step.
``python tools/docs/architectures.py`` writes the record; ``tests/backbones/test_architectures.py`` tries the types and
compares, and ``generate_docs.py`` makes the table of docs/backbones.md of it.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sentcompress.errors import SentCompressError
from sentcompress.modeling.grafting import graft, wrap_backbone
from sentcompress.modeling.llm_loading import adapter_name, load_backbone_config, load_causal_lm
from sentcompress.recipe import BackboneSpec, Recipe
from sentcompress.testing import tiny_passages, tiny_tokenizer, tiny_vae
from sentcompress.training.inputs import backbone_shape

RECORD = Path(__file__).with_suffix(".yaml")
VOCABULARY = 500
MOST_PARAMETERS = 30_000_000
"""A model with more is not tiny: some size of its configuration is not in ``SIZES``."""
SIZES = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    128: "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length",
    64: "intermediate_size ffn_dim d_ff n_inner ffn_hidden_size dff encoder_ffn_dim decoder_ffn_dim",
    32: "hidden_size d_model n_embd dim embed_dim attention_hidden_size",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size mamba_d_head mamba_head_dim",
    8: "head_dim global_head_dim kv_channels kv_lora_rank q_lora_rank v_head_dim linear_key_head_dim "
    "linear_value_head_dim index_head_dim hidden_size_per_layer_input local_attention",
    4: "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads "
    "sliding_window window_size attention_chunk_size sliding_window_size attention_window_size keep_window_size "
    "index_topk index_block_size block_size num_experts num_local_experts n_routed_experts moe_num_experts rotary_dim "
    "qk_rope_head_dim qk_nope_head_dim state_size ssm_state_size mamba_d_state mamba_d_conv mamba_n_heads "
    "mamba_num_heads linear_num_value_heads",
    3: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers",
    2: "num_key_value_heads num_kv_heads num_global_key_value_heads num_experts_per_tok moe_k moe_topk mamba_expand "
    "linear_num_key_heads index_n_heads bos_token_id eos_token_id zero_expert_num",
    1: "pad_token_id n_group topk_group n_shared_experts moe_num_shared_experts first_k_dense_replace n_groups "
    "mamba_n_groups index_topk_blocks",
}
"""Fields of tiny configurations, by value. Windows are shorter than the random input of the proof."""
OTHERS: dict[str, dict[str, Any]] = {
    "dbrx": {
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64},
    },
    "falcon": {"alibi": False, "new_decoder_architecture": True},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_expand": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "lfm2": {"full_attn_idxs": [1]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "modernbert-decoder": {"sliding_window": 4},
    "zaya": {"num_experts_per_tok": 1},
}
"""Fields that a type needs besides, or in place of these."""
TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> Any:
    """A configuration with small values in those of its fields that are sizes."""
    cls = CONFIG_MAPPING[model_type]
    settings = _sizes(cls)
    for name in getattr(cls, "sub_configs", None) or {}:
        if (part := getattr(cls(), name, None)) is not None:
            settings[name] = {"model_type": part.model_type, **_sizes(type(part))}
    return cls(**{**settings, **OTHERS.get(model_type, {})})


def _sizes(cls: Any) -> dict[str, Any]:
    values = {name: value for value, names in SIZES.items() for name in names.split()}
    known = cls().to_dict()
    found = {name: value for name, value in values.items() if name in known}
    if "kv_lora_rank" in known:  # latent attention has no groups, and calls its rotary part the head
        found |= {"num_key_value_heads": 4, "head_dim": 4}
    if "initializer_range" in known:
        found["initializer_range"] = 0.1
    return found


def build_tiny(model_type: str) -> Any:
    """A tiny model with random weights.

    Raises:
        Exception: of any kind, if this type needs other fields; ValueError if it is not tiny.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    if (number := sum(p.numel() for p in model.parameters())) > MOST_PARAMETERS:
        raise ValueError(f"{number / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()


def verdict(model: Any, tokenizer: Any) -> str:
    """``accepted``, or the reason of the refusal. Anything else that is raised is a bug."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        recipe = Recipe(name="x", backbone=BackboneSpec(model=folder))
        try:
            adapter_name(recipe.backbone)
            load_backbone_config(recipe.backbone)
            backbone_shape(recipe)
            load_causal_lm(recipe.backbone.model_copy(update={"init": "random"}))
            backbone = wrap_backbone(recipe.backbone, load_causal_lm(recipe.backbone))
            vae = tiny_vae(VOCABULARY, hidden_size=backbone.hidden_size)
            grafted = graft(recipe, vae, backbone).train()
        except SentCompressError as error:
            return reason(error)
    loss = grafted(**tiny_passages(VOCABULARY)).loss.sum()
    loss.backward()
    assert torch.isfinite(loss)
    return "accepted"


def reason(error: SentCompressError) -> str:
    """The first reason that a refusal gives, without the names and numbers of this model."""
    lines = [line[4:] for line in error.message.splitlines() if line.startswith("  - ")]
    if not lines:
        ours = r"^backbone\.model: |'/[^']*' |, but the configuration of type.*|: \w*Error.*| of type '[^']*'"
        return re.sub(ours, "", error.message)
    return re.sub(r": \w*(Error|Exception).*", "", lines[0])


def survey() -> dict[str, Any]:
    """The record: reasons by type, and types that cannot be built tiny."""
    tokenizer = tiny_tokenizer(VOCABULARY)
    results: dict[str, str] = {}
    unbuilt: list[str] = []
    for model_type in TYPES:
        try:
            model = build_tiny(model_type)
        except Exception as error:  # of any kind: it needs fields that are not known here
            print(f"{model_type}: not built: {type(error).__name__}: {' '.join(str(error).split())[:150]}")
            unbuilt.append(model_type)
            continue
        results[model_type] = verdict(model, tokenizer)
        print(f"{model_type}: {results[model_type]}", flush=True)
    accepted = [name for name, found in results.items() if found == "accepted"]
    refused = {name: found for name, found in results.items() if found != "accepted"}
    return {
        "transformers": transformers.__version__,
        "accepted": accepted,
        "refused": refused,
        "not built": unbuilt,
    }


if __name__ == "__main__":
    text = yaml.safe_dump(survey(), sort_keys=False, width=118)
    RECORD.write_text(f"# Written by tools/docs/architectures.py.\n{text}", encoding="utf-8")
