"""``precision: auto`` measures; it does not assume."""

from __future__ import annotations

import pytest
import torch

from sentcompress.errors import InputError
from sentcompress.training import precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("bf16", "chosen", "word"), [(1.0, "bf16", "10.0x faster"), (20.0, "fp32", "2.0x slower")]
)
def test_auto_takes_what_was_faster_and_says_so(monkeypatch, bf16, chosen, word):
    seconds = {torch.float32: 10.0, torch.bfloat16: bf16}
    monkeypatch.setattr(precision, "matmul_seconds", lambda dtype, *_: seconds[dtype])
    result, why = precision.choose_precision("auto", 64, CPU)
    assert result == chosen
    assert word in why


def test_measuring_gives_a_time():
    assert 0 < precision.matmul_seconds(torch.float32, 16, CPU) < 10


def test_what_the_recipe_says_is_not_measured(monkeypatch):
    monkeypatch.setattr(precision, "matmul_seconds", pytest.fail)
    assert precision.choose_precision("bf16", 64, CPU)[0] == "bf16"


def test_fp16_needs_a_gpu():
    with pytest.raises(InputError, match="needs a GPU"):
        precision.choose_precision("fp16", 64, CPU)
