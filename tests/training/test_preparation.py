"""Precision, learning-rate schedule, weight decay and averaged weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sentcompress.errors import InputError
from sentcompress.recipe import TrainingSettings
from sentcompress.training import preparation
from sentcompress.training.preparation import WeightAverage, build_optimizer


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    optimizer, names = build_optimizer(model, TrainingSettings(weight_decay=0.1))
    decays = [group["weight_decay"] for group in optimizer.param_groups for _ in group["params"]]
    assert dict(zip(names, decays, strict=True)) == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.bias": 0.0,
    }


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
def test_auto_takes_the_faster_one_and_reports_it(monkeypatch, bf16, chosen, word):
    seconds = {torch.float32: 10.0, torch.bfloat16: bf16}
    monkeypatch.setattr(preparation, "matmul_seconds", lambda dtype, *_: seconds[dtype])
    result, why = preparation.choose_precision("auto", 64, CPU)
    assert result == chosen
    assert word in why


def test_measuring_gives_a_time():
    assert 0 < preparation.matmul_seconds(torch.float32, 16, CPU) < 10


def test_a_precision_in_the_recipe_is_not_measured(monkeypatch):
    monkeypatch.setattr(preparation, "matmul_seconds", pytest.fail)
    assert preparation.choose_precision("bf16", 64, CPU)[0] == "bf16"


def test_fp16_needs_a_gpu():
    with pytest.raises(InputError, match="needs a GPU"):
        preparation.choose_precision("fp16", 64, CPU)
