"""Estimates: arithmetic that can be checked by hand, and the direction of what is known."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from sentcompress.cli.app import app
from sentcompress.errors import InputError
from sentcompress.estimate.decoding import CACHE_PASSES, GENERATE_PASSES, estimate
from sentcompress.estimate.devices import Device, device, measure_cpu
from sentcompress.estimate.plan import count
from sentcompress.estimate.shapes import meta_models
from sentcompress.estimate.training_memory import device_memory, model_sizes, training_bytes
from sentcompress.recipe import load_recipe
from sentcompress.testing import tiny_opt, tiny_sentence_lm

PLAIN = Device("plain", 1e9, 4, 1e9, 1e12, 1e12, block_seconds=0.0, step_seconds=0.0)


def of_tiny(machine=PLAIN, **changes):
    asked = {"batch_size": 1, "prompt_tokens": 10, "new_tokens": 10, "sentence_tokens": 5.0} | changes
    return estimate(tiny_sentence_lm(), tiny_opt(), machine, **asked)


def test_a_step_of_the_backbone_reads_its_weights_and_its_cache():
    model = tiny_opt()
    weights = sum(p.numel() for n, p in model.named_parameters() if p.ndim > 1 and "embed_positions" not in n)
    cache = 2 * model.config.num_hidden_layers * model.config.hidden_size * 4
    logits = 4 * GENERATE_PASSES * model.config.vocab_size
    expected = 4 * weights + 15 * CACHE_PASSES * cache + logits
    assert of_tiny().backbone.seconds_per_token == pytest.approx(expected / 1e9, rel=1e-6)
    assert of_tiny().backbone.cache_bytes_per_token == cache
    assert of_tiny().sentence.cache_bytes_per_token == cache / 5


def test_longer_sentences_cost_less_and_calls_cost_something():
    assert of_tiny(sentence_tokens=10.0).sentence.seconds_per_token < of_tiny().sentence.seconds_per_token
    slow = Device("slow", 1e9, 4, 1e9, 1e12, 1e12, block_seconds=1e-3, step_seconds=0.0)
    assert of_tiny(slow).backbone.seconds_per_token == pytest.approx(
        of_tiny().backbone.seconds_per_token + tiny_opt().config.num_hidden_layers * 1e-3
    )


def test_large_batches_are_limited_by_arithmetic():
    few = Device("few", 1e9, 4, 1e15, 1e6, 1e6, block_seconds=0.0, step_seconds=0.0)
    assert of_tiny(few, batch_size=8).backbone.seconds_per_token == pytest.approx(
        8 * of_tiny(few).backbone.seconds_per_token, rel=1e-3
    )


@pytest.mark.slow
def test_the_cpu_is_measured():
    cpu = measure_cpu()
    assert cpu.measured
    assert cpu.product(1e6, 1) < cpu.product(1e6, 512)
    assert cpu.product(1e6, 3) == pytest.approx(cpu.product(2e6, 3) / 2)
    assert cpu.bandwidth > 1e8
    assert cpu.block_seconds >= 0


def test_a_head_in_8_bits_is_read_faster_where_it_is_large():
    def writing(int8, more):
        model = tiny_sentence_lm(2**22 // 32 + more)
        machine = replace(PLAIN, per_weight={1: 4e-9}, per_int8_weight={1: 1e-9} if int8 else {})
        return estimate(
            model, tiny_opt(), machine, batch_size=1, prompt_tokens=9, new_tokens=1, sentence_tokens=5.0
        ).sentence.seconds_per_token

    assert writing(True, 8) < 0.5 * writing(False, 8)
    assert writing(True, -8) == writing(False, -8)


def test_plan_estimate_and_devices_agree_on_the_bytes_of_training():
    recipe = load_recipe("strong", ["backbone.config={}", "graft.max_sentences=24"])
    model, backbone = meta_models(recipe)
    sizes = model_sizes(model, recipe, "graft", 15.0, bf16=False)
    memory = device_memory(sizes, recipe.graft.model_copy(update={"ema": None}), 1)[0]
    found = estimate(
        model, backbone, PLAIN, batch_size=1, prompt_tokens=1, new_tokens=1, sentence_tokens=15.0
    )
    assert memory.weights + memory.gradients + memory.optimizer == found.sentence.training_bytes
    planned = count(recipe).sentence_lm
    assert training_bytes(planned, planned) == pytest.approx(found.sentence.training_bytes, rel=0.01)


def test_shapes_take_no_memory():
    model, backbone = meta_models(load_recipe("strong", ["backbone.model=opt-1.3b", "backbone.config={}"]))
    assert {p.device for m in (model, backbone) for p in m.parameters()} == {torch.device("meta")}


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (
            "backbone.config={activation_function: bogus}",
            r"backbone\.config={'activation_function': 'bogus'}",
        ),
        ("vae.decoder_layers=200000", r"vae\.decoder_layers: 200,000 blocks"),
        ("vae.feedforward_multiple=1e300", "and this vae"),
    ],
)
def test_a_shape_that_cannot_be_is_named(field, message):
    with pytest.raises(InputError, match=message):
        meta_models(load_recipe("strong", [field]))


def test_a_scale_of_embeddings_changes_no_shape():
    recipe = load_recipe("strong", ["backbone.embed_init_std=0.04"])
    assert meta_models(recipe)[1].get_input_embeddings().weight.is_meta


def test_a_folder_with_more_blocks_than_any_llm_is_refused(tmp_path):
    AutoConfig.for_model("opt", num_hidden_layers=200_000).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"backbone\.model: 200,000 blocks"):
        meta_models(load_recipe("strong", ["backbone.config={}", f"backbone.model={tmp_path}"]))


def test_the_command_prints_ratios_and_says_what_was_not_run():
    result = CliRunner().invoke(app, ["estimate", "strong", "--backbone", "opt-1.3b", "--device", "a100"])
    assert result.exit_code == 0
    assert "output ratio" in result.stdout
    assert "not run here" in result.stdout


def test_opponents_stand_beside_the_sentence_model():
    shallow = tiny_opt(num_hidden_layers=1)
    found = of_tiny(opponents={"x": shallow})
    alone = of_tiny(opponents={"x": tiny_opt()})
    assert alone.opponents["x"] == alone.backbone
    assert found.opponents["x"].cache_bytes_per_token == found.backbone.cache_bytes_per_token / 3
    weights = sum(p.numel() for p in shallow.parameters())
    assert found.opponents["x"].training_bytes == 16 * weights
    result = CliRunner().invoke(app, ["estimate", "strong", "--device", "a100"])
    assert result.exit_code == 0, result.output
    assert "opponent equal-cost, output tokens/s" in result.stdout
    assert "Opponent equal-cost: 1 of 6 blocks" in result.stdout


def test_unknown_devices_are_refused():
    with pytest.raises(InputError, match="no device is called 'tpu'"):
        device("tpu")
