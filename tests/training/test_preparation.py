"""Precision, learning-rate schedule, weight decay and averaged weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sentcompress.errors import InputError
from sentcompress.recipe import GraftSettings, TrainingSettings
from sentcompress.training import preparation
from sentcompress.training.preparation import WeightAverage, build_optimizer


def by_name(model: nn.Module, settings: TrainingSettings, figure: str) -> dict[str, float]:
    """A ``figure`` of each parameter's group in the optimizer."""
    optimizer, names = build_optimizer(model, settings)
    figures = [group[figure] for group in optimizer.param_groups for _ in group["params"]]
    return dict(zip(names, figures, strict=True))


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    expected = {"0.weight": 0.1, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "2.bias": 0.0}
    assert by_name(model, TrainingSettings(weight_decay=0.1), "weight_decay") == expected


def test_only_the_llm_has_its_own_share_of_the_rate():
    model = nn.ModuleDict({"backbone": nn.Linear(3, 4), "vae": nn.Linear(4, 2)})
    expected = {"backbone.weight": 0.25, "backbone.bias": 0.25, "vae.weight": 1.0, "vae.bias": 1.0}
    settings = GraftSettings(learning_rate=4e-3, backbone_learning_rate=1e-3)
    assert by_name(model, settings, "rate_share") == expected


def test_the_average_follows_and_leaves_the_weights_alone():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = WeightAverage(model, decay=0.5)
    with torch.no_grad():
        model.weight.fill_(1.0)
    average.update(0)  # decay 1/10 this early
    assert average.average["weight"].item() == pytest.approx(0.9)
    with torch.no_grad():
        model.weight.fill_(2.0)
    average.update(1000)
    assert average.average["weight"].item() == pytest.approx(1.45)
    with average.in_place():
        assert model.weight.item() == pytest.approx(1.45)
    assert model.weight.item() == 2.0


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("bf16", "chosen", "word"), [(1.0, "bf16", "10.0x faster"), (20.0, "fp32", "2.0x slower")]
)
def test_auto_takes_the_faster_one_and_reports_it(make_recipe, make_job, monkeypatch, bf16, chosen, word):
    monkeypatch.setattr(preparation, "step_seconds", lambda *_: {"fp32": 10.0, "bf16": bf16})
    result, why = preparation.choose_precision(make_job(make_recipe(precision="auto")), CPU)
    assert result == chosen
    assert word in why


def test_measuring_changes_no_weights(make_recipe, make_job):
    job = make_job(make_recipe(precision="auto"))
    before = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    seconds = preparation.step_seconds(job)
    assert seconds.keys() == {"fp32", "bf16"}
    assert all(0 < each < 60 for each in seconds.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in job.model.state_dict().items())
    assert all(parameter.grad is None for parameter in job.model.parameters())


def test_slow_steps_are_measured_once(make_recipe, make_job, monkeypatch):
    job, calls = make_job(make_recipe(precision="auto")), []
    loss = job.loss
    monkeypatch.setattr(
        job, "loss", lambda *given: calls.append(torch.is_autocast_enabled("cpu")) or loss(*given)
    )
    preparation.step_seconds(job)
    assert calls == [False, True] * preparation.MEASURED_ROUNDS
    calls.clear()
    monkeypatch.setattr(preparation, "ENOUGH_SECONDS", 0)
    preparation.step_seconds(job)
    assert calls == [False, True]


def test_a_precision_in_the_recipe_is_not_measured(make_recipe, make_job, monkeypatch):
    monkeypatch.setattr(preparation, "step_seconds", pytest.fail)
    assert preparation.choose_precision(make_job(make_recipe(precision="bf16")), CPU)[0] == "bf16"


def test_fp16_needs_a_gpu(make_recipe, make_job):
    with pytest.raises(InputError, match="needs a GPU"):
        preparation.choose_precision(make_job(make_recipe(precision="fp16")), CPU)


@pytest.mark.parametrize(("supported", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_is_not_measured(make_recipe, make_job, monkeypatch, supported, chosen):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)
    job = make_job(make_recipe(precision="auto"))
    assert preparation.choose_precision(job, torch.device("cuda"))[0] == chosen
