"""Each of the paper's 17 recipes, run for a few steps on a shrunken copy: its parts and settings, tiny shapes."""

import json

import pytest

from sentcompress.pipeline import run_recipe
from sentcompress.recipe import load_recipe, shipped_recipes
from sentcompress.testing import OPT_TWINS, tiny_opt

PAPER = [name for name in shipped_recipes() if name.startswith("paper/")]


def test_there_are_nine_and_eight():
    assert sum(name.startswith("paper/vae-") for name in PAPER) == 9
    assert sum(name.startswith("paper/sllm-") for name in PAPER) == 8


@pytest.mark.parametrize("name", PAPER)
def test_runs_shrunken(name, tmp_path, tokenizer, text_files):
    twin = next((shape for shape in OPT_TWINS if f"-{shape}-" in name), "125m")
    if "1024" in name:
        twin = "350m"
    tiny_opt(len(tokenizer), **OPT_TWINS[twin]).save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    data = {"name": "text", "options": {"paths": [str(text_files)], "heldout_documents": 2}}
    recipe = load_recipe(
        name,
        [
            f"backbone.model={tmp_path / 'backbone'}",
            f"data={json.dumps(data)}",
            "vae.num_heads=4",
            "train_vae.steps=2",
            "train_vae.sentences_per_batch=4",
            "train_vae.eval_batches=1",
            "train_vae.precision=fp32",
            "graft.steps=2",
            "graft.max_sentences=8",
            "graft.eval_batches=1",
            "graft.precision=fp32",
        ],
    )
    stages = ["vae", "graft"] if "sllm" in name else ["vae"]
    figures = run_recipe(recipe, tmp_path / "out", stages=stages)
    assert figures["vae"]["perplexity"] > 1
    config = json.loads((tmp_path / "out" / stages[-1] / "config.json").read_text())
    shape = config.get("vae", config)
    blocks = int(name.rsplit("-h", 1)[1])
    assert (shape["encoder_layers"], shape["decoder_layers"]) == (blocks, blocks)
    assert shape["conditioning"] == "cross-attention"
    assert shape["latents"] == 1
