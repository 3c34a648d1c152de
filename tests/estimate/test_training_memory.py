"""What training takes, predicted: arithmetic that can be checked by hand, and what autograd really keeps."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from sentcompress.cli.app import app
from sentcompress.errors import InputError
from sentcompress.estimate.devices import device
from sentcompress.estimate.equal_cost import meta_opponent
from sentcompress.estimate.shapes import meta_models, random_models
from sentcompress.estimate.training_memory import count_saved, device_memory, model_sizes, uneven_lengths
from sentcompress.estimate.training_time import mode_tables, parse_devices, training_modes
from sentcompress.modeling.losses import TokenLoss
from sentcompress.recipe import load_recipe
from sentcompress.training.jobs.token_level import TokenLM
from sentcompress.training.tuning import recompute_activations

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["backbone.config={}", "graft.max_sentences=24", "graft.passages_per_batch=1"]


def batch(sentences: int, tokens: float, longest: int) -> dict[str, torch.Tensor]:
    lengths = uneven_lengths(sentences, tokens, longest)
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
    _, kept = count_saved(lambda: model(**batch(24, 15.0, 48), token_loss=TokenLoss(gamma=0.0)).loss, weights)
    found = model_sizes(meta_models(recipe)[0], recipe, "graft", 15.0, bf16=False)
    predicted = found.recomputed if checkpointing else found.activations
    assert predicted == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_of_the_baseline_are_what_it_saves(checkpointing, bf16):
    recipe = load_recipe("strong", [*SMALL, "graft.passages_per_batch=3"])
    model = TokenLM(random_models(recipe)[1]).train()
    if checkpointing:
        recompute_activations(model)
    ids = torch.ones(3, 24 * 15 + 1, dtype=torch.long)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        _, kept = count_saved(lambda: model(ids, torch.ones_like(ids), ids)[0].mean(), weights)
    found = model_sizes(TokenLM(meta_models(recipe)[1]), recipe, "baseline", 15.0, bf16=bf16)
    predicted = found.recomputed if checkpointing else found.activations
    assert predicted == pytest.approx(kept, rel=1e-3)
    assert found.weights == sum(p.numel() for p in model.parameters())
    assert found.head == model.lm.get_output_embeddings().weight.numel()


@pytest.mark.parametrize("blocks", [1, 3])
def test_an_opponent_has_memory_and_hours_of_its_own(blocks):
    recipe = load_recipe(
        "strong", [*SMALL, f"opponents={{x: {{blocks: {blocks}, tune: last-n, last_n: 1}}}}"]
    )
    config = meta_opponent(recipe, "x", 15.0)[1].config
    model = TokenLM(AutoModelForCausalLM.from_config(config)).train()
    ids = torch.ones(1, 24 * 15 + 1, dtype=torch.long)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    _, kept = count_saved(lambda: model(ids, torch.ones_like(ids), ids)[0].mean(), weights)
    found, (mode, *_) = training_modes(recipe, "opponent-x", device("a100"), 1, 15.0)
    assert found.activations == pytest.approx(kept, rel=1e-3)
    assert found.weights == sum(p.numel() for p in model.parameters())
    assert found.trainable == sum(p.numel() for p in model.lm.model.decoder.layers[-1].parameters())
    _, (whole, *_) = training_modes(recipe, "baseline", device("a100"), 1, 15.0)
    assert 0 < mode.hours < whole.hours


def test_a_passage_longer_than_the_baseline_has_positions_is_several_rows():
    changes = [*SMALL, "backbone.config={max_position_embeddings: 64}"]
    cut, whole = (
        model_sizes(TokenLM(meta_models(recipe)[1]), recipe, "baseline", 15.0, bf16=False)
        for recipe in (load_recipe("strong", changes), load_recipe("strong", SMALL))
    )
    assert cut.activations == pytest.approx(whole.activations, rel=0.05)  # each row begins with a token more


def test_a_model_of_any_width_is_counted_in_hardly_any_memory():
    resource = pytest.importorskip("resource")
    unit = 1 if sys.platform == "darwin" else 1024
    changes = "{hidden_size: 12288, word_embed_proj_dim: 12288, ffn_dim: 49152, num_attention_heads: 96}"
    recipe = load_recipe("strong", [f"backbone.config={changes}"])
    before = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, _ = training_modes(recipe, "graft", device("h100"), 64, 15.0)
    assert 4 * found.block > 7e9  # bytes of one block
    assert unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 5e8


@pytest.mark.slow
def test_models_are_counted_that_depend_on_what_they_compute(tmp_path):
    mixture = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"vocab_size": 500, "bos_token_id": 499, "eos_token_id": 499}  # beyond the vocabulary that is kept
    AutoConfig.for_model("mixtral", **mixture, **heads, **ids).save_pretrained(tmp_path)
    for backbone in (str(tmp_path), "qwen2.5-0.5b"):  # whose published shape names no marks
        recipe = load_recipe("strong", [*SMALL, f"backbone.model={backbone}"])
        found, _ = training_modes(recipe, "graft", device("h100"), 1, 15.0)
        assert found.recomputed < found.activations


@pytest.mark.parametrize("mean", [1.0, 6.0, 15.4, 30.0, 48.0])
def test_made_up_lengths_are_as_long_as_is_said(mean):
    lengths = uneven_lengths(32, mean, 48)
    assert lengths.min() >= 1
    assert lengths.max() <= 48
    assert lengths.float().mean() == pytest.approx(mean, rel=0.06)


def test_counting_leaves_nothing_behind():
    x = torch.zeros(2**22, requires_grad=True)
    process = psutil.Process()
    before = process.memory_info().rss
    for _ in range(20):
        _, kept = count_saved(lambda: x.exp().sum(), set())  # what exp keeps is its own result
        assert kept == 4 * 2**22
    assert process.memory_info().rss - before < 8 * 4 * 2**22


def test_parts_follow_from_shapes():
    recipe = load_recipe("strong", [*SMALL, "graft.ema=0.99"])
    found = model_sizes(meta_models(recipe)[0], recipe, "graft", 15.0, bf16=False)
    one, checkpointing = device_memory(found, recipe.graft, 1)
    assert one.weights == one.gradients == 4 * found.weights
    assert one.optimizer == 12 * found.weights
    assert checkpointing.activations < one.activations
    ddp, _, fsdp, _ = device_memory(found, recipe.graft, 4)
    assert ddp.gradients == 2 * one.gradients
    assert fsdp.optimizer == one.optimizer / 4
    assert found.root + 6 * found.block == found.weights  # opt-tiny has six blocks
    assert fsdp.weights == 4 * (found.weights / 4 + found.root + 2 * found.block)


def test_what_does_not_learn_takes_no_moments():
    recipe = load_recipe(
        "strong", [*SMALL, "graft.tune=lora", "vae.freeze=embeddings", "vae.init=embeddings"]
    )
    found = model_sizes(meta_models(recipe)[0], recipe, "graft", 15.0, bf16=False)
    assert found.trainable < 0.5 * found.weights
    assert found.head == 0


@pytest.mark.parametrize("stage", ["graft", "baseline"])
def test_last_blocks_that_learn_take_moments_and_the_others_none(stage):
    recipe = load_recipe("strong", [*SMALL, f"{stage}.tune=last-n", f"{stage}.last_n=2"])
    found, _ = training_modes(recipe, stage, device("a100"), 1, 15.0)
    whole, _ = training_modes(load_recipe("strong", SMALL), stage, device("a100"), 1, 15.0)
    assert found.trainable < 0.6 * found.weights
    assert found.activations == whole.activations


@pytest.mark.slow
def test_a_large_model_needs_to_be_spread():
    recipe = load_recipe("strong", ["backbone.model=opt-6.7b", "backbone.config={}"])
    _, found = training_modes(recipe, "graft", device("a100"), 8, 15.0)
    assert {mode.name: mode.fits for mode in found}["ddp"] is False
    assert {mode.name: mode.fits for mode in found}["fsdp"] is True
    table = mode_tables(recipe, 8, device("a100"), 15.0, price=2.0)[0]
    assert "The fastest mode that fits: fsdp" in table.notes[0]
    assert table.columns[-1] == "cost"


@pytest.mark.slow
def test_more_devices_take_less_time_and_exchanges_take_some():
    recipe = load_recipe("paper/sllm-125m-h1", ["graft.passages_per_batch=64"])
    hours = {}
    for number in (1, 2, 4):
        _, found = training_modes(recipe, "graft", device("4090"), number, 15.0)
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
    with pytest.raises(InputError, match=f"backbone.config.{field}: must be a number from 1 to"):
        training_modes(load_recipe("strong", shape), "graft", device("a100"), 4, 15.0)


def test_an_a100_has_40_or_80_gigabytes():
    (number, small), (_, large) = parse_devices("4 x A100-40"), parse_devices("4xA100")
    assert number == 4
    assert small.memory_bytes == large.memory_bytes / 2
    assert small.flops == large.flops


def test_the_command_prints_every_way():
    done = CliRunner().invoke(app, ["estimate", "strong", "--devices", "2xA100", "--price", "2"])
    assert done.exit_code == 0, done.output
    assert len(re.findall(r"^fsdp", done.output, re.M)) == 6  # of graft, baseline and opponent
    assert "Training graft of strong on 2 x a100" in done.output
    assert "Training baseline of strong on 2 x a100" in done.output
    assert "Training opponent-equal-cost of strong on 2 x a100" in done.output
    assert "1 of 6 blocks, ffn_dim" in done.output
    assert "Training vae" not in done.output  # it takes no step


@pytest.mark.slow
def test_the_last_table_is_the_sum_of_the_stages_in_the_fastest_way_that_fits():
    recipe = load_recipe("quickstart")
    together = mode_tables(recipe, 2, device("a100"), 15.0, price=1000.0)[-1]
    assert [row[0] for row in together.rows] == [
        "vae",
        "graft",
        "baseline",
        "opponent-equal-cost",
        "together",
    ]
    hours, device_hours, cost = (
        [float(row[column].replace(",", "")) for row in together.rows] for column in (2, 3, 4)
    )
    assert cost[-1] == pytest.approx(sum(cost[:-1]), abs=0.02)
    assert cost[-1] > 0
    assert device_hours[-1] == pytest.approx(2 * hours[-1], abs=0.02)
    few = load_recipe("quickstart", ["baseline.enabled=false", "opponents={}"])
    without = mode_tables(few, 2, device("a100"), 15.0)[-1]
    assert [row[0] for row in without.rows] == ["vae", "graft", "together"]
    nothing = load_recipe("strong", ["backbone.model=opt-30b", "backbone.config={}", "opponents={}"])
    assert mode_tables(nothing, 1, device("4090"), 15.0)[-1].rows[-1][1] == "without graft, baseline"


def test_a_recipe_from_nothing_is_told_what_devices_are_for():
    done = CliRunner().invoke(app, ["estimate", "opt-tiny", "--devices", "2xA100"])
    assert isinstance(done.exception, InputError)
    assert str(done.exception).startswith("--devices is for training a SentenceVAE, a graft and its baseline")


@pytest.mark.slow
def test_the_tables_of_the_published_set_up_are_current():
    tool = str(ROOT / "tools" / "docs" / "scaling_table.py")
    command = [sys.executable, tool, "4xA100", "sllm-125m-h1", "--price", "1.5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    lines = [line for line in done.stdout.splitlines() if not set(line) <= set("|-")]
    assert len(lines) == 4  # two tables of a heading and a row
    for line in lines:
        assert line in page
