"""``sentcompress graft --backbone X`` for a tiny model of each family: trained, proven causal, loaded, generating."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from sentcompress.cli import main
from sentcompress.modeling.loading import load_sentence_lm
from sentcompress.registry import get_registry

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


def run(*arguments) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 0


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


def write_llm(folder: Path, shape: dict, tokenizer) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**shape, "vocab_size": len(tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "shape"), shapes(), ids=label)
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
