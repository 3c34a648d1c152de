"""Weights in 8 bits: exact whole-number products, rows that do not depend on each other, small errors."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sentcompress.errors import InputError
from sentcompress.modeling.int8 import Int8Linear, Int8Weight, quantize, to_int8
from sentcompress.testing import tiny_sentence_lm


def test_what_rounding_took_stays_within_what_is_said():
    torch.manual_seed(0)
    weight = torch.randn(64, 33)
    rows = torch.randn(5, 33) * torch.tensor([[1e-3], [1.0], [50.0], [0.0], [1.0]])
    int8 = Int8Weight(weight)
    for passes in (1, 2):
        products = int8.multiply(rows, passes)
        error = (products.sums * products.scales - rows @ weight.T).abs()
        norms = rows.norm(dim=1, keepdim=True)
        allowed = norms * int8.error_norms + products.rest * products.scales * int8.norms
        assert (error <= allowed + 1e-5 * norms).all()
        assert (products.sums[3] == 0).all()


def test_a_layer_in_8_bits_is_close_and_does_not_mix_rows():
    torch.manual_seed(0)
    layer = nn.Linear(70, 90)
    states = torch.randn(2, 7, 70)
    states[0, 0] *= 1000  # would set the scale of all others
    quantized = Int8Linear(layer)
    together = quantized(states)
    assert torch.equal(together[1], quantized(states[1]))
    assert torch.equal(together[0, 3], quantized(states[0, 3]))
    error = (together - layer(states)).norm(dim=-1) / layer(states).norm(dim=-1)
    assert error.max() < 0.02
    bound = quantized.int8.error_norms * states[1].norm(dim=-1, keepdim=True)
    assert ((together[1] - layer(states[1])).abs() <= bound * 1.05 + 1e-4).all()


def test_layers_that_are_the_other_way_around_are_found_too():
    module = nn.Sequential(Conv1D(12, 8), nn.GELU(), nn.Linear(12, 4))
    states = torch.randn(3, 8)
    before = module(states)
    to_int8(module)
    assert [type(layer) for layer in module] == [Int8Linear, nn.GELU, Int8Linear]
    assert torch.allclose(module(states), before, atol=0.05)


def test_parts_of_a_model_are_quantized_by_name():
    model = tiny_sentence_lm()
    quantize(model, ["decoder", "decoder"])  # once more does nothing
    assert any(isinstance(m, Int8Linear) for m in model.vae.decoder.modules())
    assert not any(isinstance(m, Int8Linear) for m in model.backbone.modules())
    with pytest.raises(InputError, match="no part is called 'head'"):
        quantize(model, ["head"])
    with pytest.raises(InputError, match="the encoder of this model has no linear layers"):
        quantize(tiny_sentence_lm(vae={"encoder_layers": 0}), ["encoder"])


def test_weights_elsewhere_than_on_the_cpu_are_refused():
    with pytest.raises(InputError, match="8-bit weights work only on the CPU"):
        Int8Weight(torch.empty(4, 4, device="meta"))
