"""What training takes, predicted: arithmetic that can be checked by hand, and what autograd really keeps."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

from sentcompress.benchmark.devices import device
from sentcompress.benchmark.estimate import shapes
from sentcompress.benchmark.random_models import random_models
from sentcompress.cli.app import app
from sentcompress.errors import InputError
from sentcompress.modeling.losses import TokenLoss
from sentcompress.recipe import load_recipe
from sentcompress.training.footprint import count_kept, footprints, sizes, spread_lengths
from sentcompress.training.memory import recompute_activations
from sentcompress.training.scaling import parse_devices, tables, ways

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["backbone.config={}", "graft.max_sentences=24", "graft.passages_per_batch=1"]


def batch(sentences: int, tokens: float, longest: int) -> dict[str, torch.Tensor]:
    lengths = spread_lengths(sentences, tokens, longest)
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {
        "input_ids": torch.ones_like(mask),
        "attention_mask": mask,
        "sentence_index": torch.arange(sentences)[None],
        "passage_ids": torch.zeros(1, sentences, dtype=torch.long),
        "scored": torch.ones(sentences, dtype=torch.bool),
        "last": torch.zeros(sentences, dtype=torch.bool),
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_a_whole_model_keeps(checkpointing):
    recipe = load_recipe("strong", SMALL)
    model, _ = random_models(recipe)
    model.train()
    if checkpointing:
        recompute_activations(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    _, kept = count_kept(lambda: model(**batch(24, 15.0, 48), token_loss=TokenLoss(gamma=0.0)).loss, weights)
    found = sizes(shapes(recipe)[0], recipe, "graft", 15.0, bf16=False)
    predicted = found.recomputed if checkpointing else found.activations
    assert predicted == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("mean", [1.0, 6.0, 15.4, 30.0, 48.0])
def test_made_up_lengths_are_as_long_as_is_said(mean):
    lengths = spread_lengths(32, mean, 48)
    assert lengths.min() >= 1
    assert lengths.max() <= 48
    assert lengths.float().mean() == pytest.approx(mean, rel=0.06)


def test_counting_leaves_nothing_behind():
    x = torch.zeros(2**22, requires_grad=True)
    process = psutil.Process()
    before = process.memory_info().rss
    for _ in range(20):
        _, kept = count_kept(lambda: x.exp().sum(), set())  # what exp keeps is its own result
        assert kept == 4 * 2**22
    assert process.memory_info().rss - before < 8 * 4 * 2**22


def test_parts_follow_from_shapes():
    recipe = load_recipe("strong", [*SMALL, "graft.ema=0.99"])
    found = sizes(shapes(recipe)[0], recipe, "graft", 15.0, bf16=False)
    one, checkpointing = footprints(found, recipe.graft, 1)
    assert one.weights == one.gradients == 4 * found.weights
    assert one.optimizer == 12 * found.weights
    assert checkpointing.activations < one.activations
    ddp, _, fsdp, _ = footprints(found, recipe.graft, 4)
    assert ddp.gradients == 2 * one.gradients
    assert fsdp.optimizer == one.optimizer / 4
    assert found.root + 6 * found.unit == found.weights  # opt-tiny has six blocks
    assert fsdp.weights == 4 * (found.weights / 4 + found.root + 2 * found.unit)


def test_what_does_not_learn_takes_no_moments():
    recipe = load_recipe(
        "strong", [*SMALL, "graft.tune=lora", "vae.freeze=embeddings", "vae.init=embeddings"]
    )
    found = sizes(shapes(recipe)[0], recipe, "graft", 15.0, bf16=False)
    assert found.learned < 0.5 * found.weights
    assert found.head == 0


def test_a_large_model_needs_to_be_spread():
    recipe = load_recipe("strong", ["backbone.model=opt-6.7b", "backbone.config={}"])
    _, found = ways(recipe, "graft", device("a100"), 8, 15.0)
    assert {way.footprint.name: way.fits for way in found}["ddp"] is False
    assert {way.footprint.name: way.fits for way in found}["fsdp"] is True
    plain = tables(recipe, 8, device("a100"), 15.0, price=2.0)[-1]
    assert "What is needed: fsdp" in plain.notes[0]
    assert plain.columns[-1] == "cost"


def test_more_devices_take_less_time_and_exchanges_take_some():
    recipe = load_recipe("paper/sllm-125m-h1", ["graft.passages_per_batch=64"])
    hours = {}
    for number in (1, 2, 4):
        _, found = ways(recipe, "graft", device("4090"), number, 15.0)
        hours[number] = found[0].hours
    assert hours[4] < hours[2] < hours[1]
    assert hours[4] > hours[1] / 4


@pytest.mark.parametrize("text", ["4", "x", "0xa100", "4xb200", "-1xa100", "9999999xa100", "٤xa100"])
def test_devices_that_are_none_are_refused(text):
    with pytest.raises(InputError, match="not a number of devices") as refused:
        parse_devices(text)
    assert "a100-40" in refused.value.fix


def test_processes_that_share_a_machine_are_not_estimated():
    with pytest.raises(InputError, match="share its memory"):
        parse_devices("2xcpu")


@pytest.mark.parametrize(
    "option",
    [["--price", "inf"], ["--price", "nan"], ["--sentence-tokens", "1e300"], ["--sentence-tokens", "0"]],
)
def test_numbers_that_mean_nothing_are_refused(option):
    done = CliRunner().invoke(app, ["estimate", "strong", "--devices", "4xA100", *option])
    assert done.exit_code == 2
    assert option[0] in done.output


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", "0"),
        ("num_hidden_layers", "0"),
        ("num_hidden_layers", "200000"),
        ("hidden_size", "abc"),
    ],
)
def test_a_shape_that_cannot_be_is_named(field, value):
    shape = ["backbone.init=random", f"backbone.config={{{field}: {value}}}"]
    with pytest.raises(InputError, match=f"backbone.config.{field}: .* is no number from 1 to"):
        ways(load_recipe("strong", shape), "graft", device("a100"), 4, 15.0)


def test_the_command_prints_every_way():
    done = CliRunner().invoke(app, ["estimate", "strong", "--devices", "2xA100", "--price", "2"])
    assert done.exit_code == 0, done.output
    assert len(re.findall(r"^fsdp", done.output, re.M)) == 2
    assert "Training graft of strong on 2 x a100" in done.output
    assert "Training vae" not in done.output  # it takes no step


def test_the_table_of_the_published_set_up_is_current():
    command = [sys.executable, str(ROOT / "tools" / "scaling_table.py"), "4xA100", "sllm-125m-h1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row = done.stdout.splitlines()[-1]
    assert row in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
