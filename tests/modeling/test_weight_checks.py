"""A backbone is what its folder says, or it is refused with the names of the tensors; nothing is filled at random."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
)

from sentcompress.errors import InputError, ModelFolderError
from sentcompress.modeling import SentenceVAE, llm_loading
from sentcompress.modeling.llm_loading import (
    check_backbone_weights,
    load_backbone_config,
    load_backbone_tokenizer,
    load_causal_lm,
)
from sentcompress.modeling.saved_models import load_sentence_lm, load_vae
from sentcompress.recipe import BackboneSpec
from sentcompress.testing import tiny_sentence_lm, tiny_vae

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
UP, HEAD = "model.layers.0.mlp.up_proj.weight", "lm_head.weight"
RANDOM = "random weights are used only with backbone.init=random"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """Folders of tiny LLMs, as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("llms")
    torch.manual_seed(0)
    configs = {
        "untied": LlamaConfig(**SMALL),
        "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
        "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
        "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1),
    }
    for name, config in configs.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return {name: folder / name for name in configs}


@pytest.fixture
def llm(saved, tmp_path):
    """``llm(change, name, **config)``: a copy of a folder with changed tensors and fields."""

    def make(change=None, name="untied", **fields) -> BackboneSpec:
        folder = tmp_path / name
        shutil.copytree(saved[name], folder)
        file, config = folder / "model.safetensors", folder / "config.json"
        if change:
            tensors = change(load_file(file))
            save_file({k: v.clone() for k, v in tensors.items()}, file, metadata={"format": "pt"})
        config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
        return BackboneSpec(model=str(folder))

    return make


def refused(spec: BackboneSpec, *parts: str, early: bool = True) -> str:
    """Check that loading is refused, and, if shapes alone show it, the check before a training too."""
    for call in (load_causal_lm, check_backbone_weights) if early else (load_causal_lm,):
        with pytest.raises(InputError) as error:
            call(spec)
        said = str(error.value)
        assert all(part in said for part in parts), said
        assert f"backbone.model: '{spec.model}'" in said
        assert "\n  fix: " in said
    return said


def without(*names: str):
    return lambda tensors: {k: v for k, v in tensors.items() if not any(name in k for name in names)}


def plus(**tensors: torch.Tensor):
    return lambda old: {**old, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}


# ---- missing


def test_a_missing_layer_is_named(llm):
    said = refused(
        llm(without("layers.1.")), "9 tensors are missing", "model.layers.1.input_layernorm.weight"
    )
    assert "and 5 more" in said
    assert RANDOM in said


def test_a_missing_untied_head_is_named(llm):
    refused(llm(without(HEAD)), f"1 tensor is missing: {HEAD}", "tie_word_embeddings")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_a_prefix_before_every_name_is_explained(llm, prefix):
    spec = llm(lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    refused(spec, "21 tensors are missing", f"{prefix}{HEAD}", f"names begin with '{prefix}'")


def test_a_decoder_saved_alone_is_the_llm_only_with_a_tied_head(saved, tmp_path):
    for name in ("tied", "untied"):
        LlamaForCausalLM.from_pretrained(saved[name]).model.save_pretrained(tmp_path / name)
    tied = load_causal_lm(BackboneSpec(model=str(tmp_path / "tied")))
    assert torch.equal(
        tied.lm_head.weight, load_causal_lm(BackboneSpec(model=str(saved["tied"]))).lm_head.weight
    )
    refused(BackboneSpec(model=str(tmp_path / "untied")), HEAD)


def test_a_tied_pair_may_be_saved_under_either_name_but_not_under_none(llm):
    table = "model.embed_tokens.weight"
    both = llm(without(table), "tied")
    refused(both, "2 tensors are missing", HEAD, table)
    shutil.rmtree(both.model)
    head = load_causal_lm(llm(lambda t: {HEAD if k == table else k: v for k, v in t.items()}, "tied"))
    assert head.lm_head.weight is head.model.embed_tokens.weight


# ---- surplus


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {**tensors, **{k.replace("layers.1", "layers.2"): v for k, v in tensors.items()}},
        plus(model__layers__0__self_attn__q_proj__bias=torch.ones(16)),
        plus(lm_head__bias=torch.ones(50)),
        plus(model__embed_positions__weight=torch.ones(32, 16)),
    ],
    ids=["layer", "bias", "head bias", "positions"],
)
def test_surplus_parts_of_the_llm_are_refused(llm, change):
    refused(llm(change), "surplus, so another model was saved")


def test_fewer_layers_in_the_configuration_than_in_the_files(llm):
    refused(llm(num_hidden_layers=1), "9 tensors are surplus", "model.layers.1.")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gpt2", plus(transformer__h__0__attn__masked_bias=torch.tensor(-1e4))),
        ("gpt2", plus(transformer__h__0__attn__bias=torch.ones(1, 1, 32, 32, dtype=torch.bool))),
        ("untied", plus(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))),
        ("untied", plus(mtp__layers__0__weight=torch.ones(4), model__mtp__norm__weight=torch.ones(4))),
        ("untied", plus(v_head__summary__weight=torch.ones(1, 16))),
        ("tied", plus(score__weight=torch.ones(2, 16))),
    ],
    ids=["masked_bias", "attention mask", "inv_freq", "mtp", "value head", "classifier"],
)
def test_what_the_llm_does_without_is_left_out_and_named(llm, name, change):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_causal_lm(llm(change, name))
    said = [str(one.message) for one in caught if "left out" in str(one.message)]
    expected = [
        key for key in change({}) if not re.search(r"inv_freq|attn\.bias", key)
    ]  # transformers knows these
    assert all(key in said[0] for key in expected)


def test_layers_that_draft_later_tokens_may_stand_behind_the_last(llm):
    layer = plus(model__layers__2__eh_proj__weight=torch.ones(2, 2))
    with pytest.warns(UserWarning, match=r"left out.*layers\.2\.eh_proj"):
        load_causal_lm(llm(layer, num_nextn_predict_layers=1))


def test_a_head_that_the_configuration_calls_tied_must_be_so(llm):
    spec = llm(tie_word_embeddings=True)
    refused(spec, "both, with different values", HEAD, "tie_word_embeddings: false", early=False)
    file = Path(spec.model) / "model.safetensors"
    same = plus(lm_head__weight=load_file(file)["model.embed_tokens.weight"].clone())
    save_file(same(load_file(file)), file, metadata={"format": "pt"})
    model = load_causal_lm(spec)
    assert model.lm_head.weight is model.model.embed_tokens.weight


# ---- shapes and values


def test_misshapen_tensors_are_named_with_both_shapes(llm):
    refused(llm(intermediate_size=32), "6 tensors are misshapen", f"{UP} is [24, 16], the model has [32, 16]")


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(float("nan"), torch.float32), (float("inf"), torch.bfloat16), (1e300, torch.float64)],
)
def test_nan_and_infinite_values_are_counted(llm, value, dtype):
    def spoil(tensors):
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        tensors[UP].view(-1)[:3] = value
        tensors["model.norm.weight"][:1] = -value
        return tensors

    refused(
        llm(spoil),
        "2 tensors are damaged by NaN",
        f"{UP} (3 of 384)",
        "model.norm.weight (1 of 16)",
        early=False,
    )


@pytest.mark.parametrize(
    "change",
    [
        without("layers.0.block_sparse_moe.experts.3.w1", "layers.0.mlp.experts.3.w1"),
        without("layers.0.block_sparse_moe.experts.3.", "layers.0.mlp.experts.3."),
        lambda tensors: {
            k: v[:5] if "layers.0" in k and "experts.3.w1" in k else v for k, v in tensors.items()
        },
    ],
    ids=["a part of an expert", "an expert", "misshapen"],
)
def test_experts_that_are_merged_while_they_load(llm, change):
    refused(llm(change, "mixtral"), "model.layers.0.mlp.experts.gate_up_proj")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_encoded_weights_without_their_code_are_refused(llm, dtype):
    refused(llm(lambda tensors: {**tensors, UP: tensors[UP].to(dtype)}), UP, "no quantization_config")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors", "unheard-of"])
def test_quantized_checkpoints_are_refused_by_their_configuration(llm, method):
    spec = llm(quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(InputError, match=rf"are quantized \({method}\)"):
        load_backbone_config(spec, weights=False)
    with pytest.raises(InputError, match=rf"are quantized \({method}\)"):
        load_causal_lm(spec)
    assert load_causal_lm(spec.model_copy(update={"init": "random"})).dtype == torch.float32


@pytest.mark.parametrize("field", ["torch_dtype", "dtype"])
def test_half_precision_is_read_as_fp32(llm, field):
    model = load_causal_lm(llm(lambda t: {k: v.half() for k, v in t.items()}, **{field: "float16"}))
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


# ---- files


def into_shards(folder: Path) -> dict[str, str]:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        index |= dict.fromkeys(part, f"model-0000{number}-of-00002.safetensors")
        save_file({name: tensors[name] for name in part}, folder / index[part[0]], metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return index


def test_shards(llm):
    spec = llm()
    before, folder = load_causal_lm(spec).state_dict(), Path(spec.model)
    index = into_shards(folder)
    after = load_causal_lm(spec).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    second = folder / "model-00002-of-00002.safetensors"
    second.rename(folder / "kept")
    refused(spec, "1 of the 2 files", second.name)
    (folder / "kept").rename(second)
    file = folder / "model.safetensors.index.json"
    file.write_text(
        json.dumps({"metadata": {}, "weight_map": {k: v for k, v in index.items() if "00001" in v}})
    )
    refused(spec, "12 tensors are missing")
    for text in ("[1", "[]", '{"weight_map": 3}', '{"weight_map": {}}', "{}"):
        file.write_text(text)
        refused(spec, file.name)
    file.unlink()
    refused(spec, "no model.safetensors", second.name)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_torn_file_is_named_with_its_size(llm, keep):
    spec = llm()
    file = Path(spec.model) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(spec, f"model.safetensors ({file.stat().st_size:,} bytes) is cut short or damaged")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ((), "the folder holds no weights"),
        (("pytorch_model.bin",), "pickles"),
        (("model.Q8_0.gguf",), "give the file itself: model.Q8_0.gguf"),
        (("adapter_config.json", "adapter_model.safetensors"), "LoRA adapter"),
        (("shard-00001-model-00001-of-00002.safetensors",), "checkpoint of several processes"),
    ],
)
def test_other_files_than_weights_are_explained(llm, files, says):
    spec = llm()
    (Path(spec.model) / "model.safetensors").unlink()
    for file in files:
        (Path(spec.model) / file).write_bytes(b"{}")
    refused(spec, says)


def test_an_adapter_beside_a_model_would_change_it(llm):
    spec = llm()
    (Path(spec.model) / "adapter_config.json").write_text("{}")
    refused(spec, "LoRA adapter")
    (Path(spec.model) / "config.json").unlink()
    with pytest.raises(ModelFolderError, match="LoRA adapter"):
        load_causal_lm(spec)


@pytest.mark.parametrize(
    "text",
    [
        '{"a":',
        "[1]",
        "null",
        '"llama"',
        "",
        "{}",
        '{"model_type": 3}',
        '{"model_type": ["llama"]}',
        '{"model_type": "no-such-type"}',
        '{"model_type": "llama", "hidden_size": "32"}',
        '{"model_type": "llava", "text_config": 3}',
        '{"model_type": "gemma3", "text_config": [1]}',
    ],
)
def test_a_configuration_that_cannot_be_used(llm, text):
    spec = llm()
    (Path(spec.model) / "config.json").write_text(text)
    refused(spec, "cannot be loaded")


# ---- multimodal models


VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def multimodal(model_type: str, text: str, vision: str, **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        text_config={"model_type": text, **SMALL},
        vision_config={"model_type": vision, **VISION},
        **fields,
    )
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize(
    ("model_type", "text", "vision", "fields"),
    [
        ("llava", "llama", "clip_vision_model", {"image_token_index": 49}),
        ("mistral3", "mistral", "pixtral", {"image_token_index": 49}),
        ("gemma3", "gemma3_text", "siglip_vision_model", {"image_token_index": 49, "mm_tokens_per_image": 4}),
        ("idefics3", "llama", "idefics3_vision", {"image_token_id": 49}),
    ],
)
def test_the_text_part_of_a_multimodal_model_is_served(tmp_path, model_type, text, vision, fields):
    whole = multimodal(model_type, text, vision, **fields)
    whole.save_pretrained(tmp_path / "whole")
    spec = BackboneSpec(model=str(tmp_path / "whole"))
    assert load_backbone_config(spec).hidden_size == 16
    left_out = "left out, since the LLM does not use them"
    with pytest.warns(UserWarning, match=left_out):
        check_backbone_weights(spec)
    with pytest.warns(UserWarning, match=left_out):
        model = load_causal_lm(spec)
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(input_ids=ids).logits)
    # What is trained from it is saved and loaded as an ordinary LLM.
    model.save_pretrained(tmp_path / "text")
    again = load_causal_lm(BackboneSpec(model=str(tmp_path / "text")))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_a_multimodal_model_with_missing_text_layers_is_refused(tmp_path):
    whole = multimodal("llava", "llama", "clip_vision_model", image_token_index=49)
    whole.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(without(".layers.1.mlp.")(load_file(file)), file, metadata={"format": "pt"})
    refused(BackboneSpec(model=str(tmp_path)), "3 tensors are missing", "layers.1.mlp", "text-only LLM")


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama", "clip"])
def test_a_multimodal_model_without_a_causal_lm_of_its_own_is_refused(tmp_path, model_type):
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"multimodal model \(type '{model_type}'\).*no causal LM") as error:
        load_backbone_config(BackboneSpec(model=str(tmp_path)))
    assert "text-only LLM" in str(error.value)


# ---- GGUF


@pytest.fixture
def gguf_file(tmp_path, tokenizer):
    """``gguf_file(change)``: a tiny Llama with changed tensors as a GGUF file."""
    gguf = pytest.importorskip("gguf")

    def make(change=lambda tensors: tensors, name="tiny.gguf") -> BackboneSpec:
        config = LlamaConfig(**{**SMALL, "vocab_size": len(tokenizer)})
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        writer.add_block_count(2)
        writer.add_context_length(32)
        writer.add_embedding_length(16)
        writer.add_feed_forward_length(24)
        writer.add_head_count(2)
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get))
        writer.add_token_merges([])
        writer.add_eos_token_id(2)
        for key, tensor in change(LlamaForCausalLM(config).state_dict()).items():
            writer.add_tensor(names.get_name(key, (".weight", ".bias")) or key, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return BackboneSpec(model=str(tmp_path / name))

    return make


def test_a_gguf_file_with_missing_and_damaged_tensors(gguf_file):
    def spoil(tensors):
        tensors["model.norm.weight"][:2] = float("nan")
        return without(UP)(tensors)

    refused(gguf_file(spoil), f"1 tensor is missing: {UP}", "model.norm.weight (2 of 16)", early=False)
    load_causal_lm(gguf_file())


def test_a_torn_gguf_file_and_one_part_of_several(gguf_file, tmp_path):
    file = Path(gguf_file().model)
    (tmp_path / "torn.gguf").write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ModelFolderError, match=r"'torn\.gguf' cannot be loaded"):
        load_causal_lm(BackboneSpec(model=str(tmp_path / "torn.gguf")))
    part = file.rename(tmp_path / "big-00001-of-00003.gguf")
    with pytest.raises(ModelFolderError, match=r"several parts.*\n.*llama-gguf-split --merge"):
        load_backbone_config(BackboneSpec(model=str(part)))


# ---- tokenizers


def test_tokenizer_files_that_are_missing_or_damaged(llm, tokenizer):
    spec = llm()
    with pytest.raises(ModelFolderError, match=r"tokenizer.*\n.*copy tokenizer\.json"):
        load_backbone_tokenizer(spec)
    folder = Path(spec.model)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(ModelFolderError, match="has no vocabulary"):
        load_backbone_tokenizer(spec)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for text in ("{", "[]", "{}"):
            tokenizer.save_pretrained(folder)
            (folder / name).write_text(text)
            with pytest.raises(InputError, match="tokenizer"):
                load_backbone_tokenizer(spec)


# ---- folders of sentcompress


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors, name: tensors.pop(name), "1 tensor is missing"),
        (lambda tensors, _: tensors.update({"surplus": torch.ones(2)}), "1 tensor is surplus"),
        (lambda tensors, name: tensors.update({name: torch.ones(3)}), "1 tensor is misshapen"),
        (lambda tensors, name: tensors[name].view(-1)[:2].fill_(float("nan")), r"NaN.*\(2 of"),
    ],
    ids=["missing", "surplus", "misshapen", "nan"],
)
@pytest.mark.parametrize(
    ("make", "load"),
    [
        (tiny_vae, load_vae),
        (tiny_vae, SentenceVAE.from_pretrained),
        (tiny_sentence_lm, load_sentence_lm),
        (tiny_sentence_lm, AutoModel.from_pretrained),
    ],
    ids=["load_vae", "SentenceVAE", "load_sentence_lm", "AutoModel"],
)
def test_a_damaged_folder_of_sentcompress_is_refused(tmp_path, change, says, make, load):
    (model := make()).save_pretrained(tmp_path)
    load(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    change(tensors, name)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelFolderError, match=rf"(?s){type(model).__name__}.*{says}") as error:
        load(tmp_path)
    assert ("surplus" if "surplus" in says else name) in str(error.value)


def test_weights_are_not_read_for_the_early_check(llm, monkeypatch):
    """It would take as long as loading: values are left to the stage that needs them."""
    spec = llm()
    devices = []
    load = llm_loading.load_weights
    monkeypatch.setattr(
        llm_loading, "load_weights", lambda *a, **k: devices.append((m := load(*a, **k)).device.type) or m
    )
    check_backbone_weights(spec)
    assert devices == ["meta"]
