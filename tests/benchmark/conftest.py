"""A whole run folder of tiny untrained models, as the stages leave it, and its text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sentcompress.benchmark.models import ModelFolder, Models
from sentcompress.modeling.grafting import graft, vae_config, wrap_backbone
from sentcompress.modeling.losses import TokenLoss
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.modeling.vae import SentenceVAE
from sentcompress.recipe import Recipe, build_recipe
from sentcompress.registry import get_registry
from sentcompress.testing import tiny_opt

BENCH = {
    "metrics": ["causality", "quality", "text", "reconstruct", "speed", "memory", "data", "segments"],
    "max_documents": 3,
    "max_bytes_per_document": 1500,
    "max_sentences": 24,
    "repeats": 2,
    "prompt_tokens": 12,
    "new_tokens": 12,
    "batch_sizes": [1, 2],
    "samples": 1,
    "shortlist_tokens": 100,
    "text_new_tokens": 40,
    "extra_metrics": [{"name": "exact-match"}],
}


def make_recipe(text_files: Path, model: Path, **changes: object) -> Recipe:
    raw = {
        "name": "tiny <b>run</b>",
        "backbone": {"name": "opt", "model": str(model)},
        "segmenter": {"name": "regex", "options": {"preset": "sentence", "max_tokens": 24}},
        "data": {"name": "text", "options": {"paths": [str(text_files)], "heldout_documents": 4}},
        "graft": {"max_sentences": 12, "passages_per_batch": 2, "shortlist_rank": 8},
        "train_vae": {"sentences_per_batch": 8},
        "bench": BENCH,
        **changes,
    }
    return build_recipe(raw, [], "tests")


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, tokenizer, text_files) -> Path:
    out = tmp_path_factory.mktemp("run")
    backbone_folder = tmp_path_factory.mktemp("backbone")
    lm = tiny_opt(len(tokenizer), bos_token_id=2, eos_token_id=2, pad_token_id=1)
    lm.save_pretrained(backbone_folder)
    tokenizer.save_pretrained(backbone_folder)
    recipe = make_recipe(text_files, backbone_folder)
    segmenter = get_registry().create("segmenter", recipe.segmenter.name, recipe.segmenter.options)
    torch.manual_seed(0)
    vae = SentenceVAE(vae_config(recipe, 32, 4, tokenizer, segmenter)).eval()
    sentence_lm = graft(recipe, vae, wrap_backbone(recipe.backbone, tiny_opt(len(tokenizer))))
    for name, model in (("vae", vae), ("graft", sentence_lm), ("baseline", lm)):
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        (out / name / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
        (out / name / "run.json").write_text(json.dumps({"stage": name, "tokens": 1000}), encoding="utf-8")
        lines = [{"step": step, "loss": 5 - step / 10} for step in range(1, 11)]
        lines.append({"step": 10, "eval": {"bits_per_token": 9.5}})
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 11, "lo'
        (out / name / "metrics.jsonl").write_text(text, encoding="utf-8")
    (out / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
    return out


@pytest.fixture(scope="session")
def bench_models(run_folder) -> Models:
    folder = ModelFolder(run_folder)
    return Models(folder.recipe(), folder)


@pytest.fixture
def teach():
    """``teach(model, sentences)``: train until the model writes a text of these sentences by heart."""
    return _teach


def _teach(model: SentenceLM, sentences: list[list[int]]) -> None:
    index = torch.tensor([[-2, *range(len(sentences))]])
    lengths = torch.tensor([len(ids) for ids in sentences])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    input_ids = torch.ones(mask.shape, dtype=torch.long)
    input_ids[mask] = torch.tensor([token for ids in sentences for token in ids])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(400):
        loss = model(
            input_ids=input_ids,
            attention_mask=mask.long(),
            sentence_index=index,
            passage_ids=torch.zeros_like(index),
            scored=torch.ones(len(sentences), dtype=torch.bool),
            last=torch.arange(len(sentences)) == len(sentences) - 1,
            token_loss=TokenLoss(gamma=0),
        ).loss
        if float(loss.detach()) < 0.05:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"it did not learn: {float(loss)}")


@pytest.fixture(scope="module")
def llm(tokenizer) -> LlamaForCausalLM:
    """A tiny Llama, untrained."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer), **shape, num_key_value_heads=2, max_position_embeddings=1200
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def llm_folder(llm, tokenizer, tmp_path_factory) -> Path:
    """Its folder, as transformers saves it."""
    path = tmp_path_factory.mktemp("llm")
    llm.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
