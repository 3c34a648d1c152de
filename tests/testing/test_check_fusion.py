"""check_fusion passes what is right and catches each way to be wrong, in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sentcompress.contracts import Fusion
from sentcompress.registry import get_registry
from sentcompress.testing import CheckFailed, check_fusion, check_plugin


class Right(Fusion):
    """Every wrong one differs in one thing."""

    def __init__(self, hidden_size: int, options: Any | None = None) -> None:
        super().__init__(hidden_size, options)
        self.norm = nn.LayerNorm(hidden_size)

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        return states.masked_fill(~mask[:, :, None], 0.0).sum(1)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Any:
        return self.norm(self.pool(hidden_states, mask))[:, None]


class Flat(Right):
    def forward(self, hidden_states: Tensor, mask: Tensor) -> Any:
        return self.norm(self.pool(hidden_states, mask))


class Promises(Right):
    latents = 2


class Words(Right):
    latents = "two"


class Pair(Right):
    def forward(self, hidden_states: Tensor, mask: Tensor) -> Any:
        return super().forward(hidden_states, mask), mask


class PaddedSum(Right):
    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        return states.sum(1)


class Length(Right):
    """Zeros at padding do no harm, but their number does."""

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        return super().pool(states, mask) + states.shape[1]

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Any:
        return self.pool(hidden_states, mask)[:, None] * self.norm.weight


class Batch(Right):
    """Batch statistics instead of the sentence's own."""

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Any:
        pooled = self.pool(hidden_states, mask)
        return self.norm(pooled - pooled.mean(0))[:, None]


class Deviation(Right):
    """The deviation over tokens: not a number for a single one."""

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        mean = super().pool(states, mask) / mask.sum(1, keepdim=True)
        apart = (states - mean[:, None]).masked_fill(~mask[:, :, None], 0.0)
        return (apart.square().sum(1) / (mask.sum(1, keepdim=True) - 1)).sqrt()


class Root(Right):
    """Finite, but its slope at nought is not."""

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        apart = states - states[:, :1]
        return super().pool(states, mask) + super().pool(apart, mask).abs().sqrt()


class Detached(Right):
    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        return super().pool(states, mask).detach()


class Constant(Right):
    def forward(self, hidden_states: Tensor, mask: Tensor) -> Any:
        return super().forward(hidden_states, mask).detach()


class Ignores(Right):
    def __init__(self, hidden_size: int, options: Any | None = None) -> None:
        super().__init__(hidden_size, options)
        self.score = nn.Linear(hidden_size, 1)


class FirstOnly(Right):
    """Sentences of one token leave nothing of it."""

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        return super().pool(states[:, 1:], mask[:, 1:]) + torch.arange(states.shape[2])


class Float(Right):
    def forward(self, hidden_states: Tensor, mask: Tensor) -> Any:
        return super().forward(hidden_states, mask).float()


class FloatInside(Right):
    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        return super().pool(states.float(), mask)


class InPlace(Right):
    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        return states.mul_(2).masked_fill(~mask[:, :, None], 0.0).sum(1)


class Random(Right):
    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        return super().pool(states, mask) + torch.randn(len(states), 1) * torch.arange(states.shape[2])


class Buffer(Right):
    def __init__(self, hidden_size: int, options: Any | None = None) -> None:
        super().__init__(hidden_size, options)
        self.register_buffer("table", torch.ones(hidden_size), persistent=False)


class Attribute(Right):
    def __init__(self, hidden_size: int, options: Any | None = None) -> None:
        super().__init__(hidden_size, options)
        self.table = torch.ones(hidden_size)


class Hidden(Right):
    """Draws what it multiplies by anew for each instance, where no state_dict sees it."""

    def __init__(self, hidden_size: int, options: Any | None = None) -> None:
        super().__init__(hidden_size, options)
        self.factors = [float(torch.rand((), device="cpu")) for _ in range(hidden_size)]

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        return super().pool(states, mask) * torch.tensor(self.factors, dtype=states.dtype)


class Signature(Right):
    def __init__(self, width: int) -> None:
        super().__init__(width)


WRONG: dict[type, str] = {
    Flat: r"returns the shape \[6, 32\] for hidden states \[6, 12, 32\] float32; .* = \[6, 1, 32\] is expected",
    Promises: r"returns the shape \[6, 1, 32\] .*\[6, 2, 32\] is expected, where k is the property latents \(2\)",
    Words: r"has latents 'two'; the property must be the number",
    Pair: r"returns tuple for hidden states",
    PaddedSum: r"lets padding change the result \(with values around 10000\): those of a sentence of 7 token",
    Length: r"lets padding change the result \(with 5 more columns\): those of a sentence of 7 token.* by 5;",
    Batch: r"returns different latents for a sentence in a batch than alone: .* may depend only on the",
    Deviation: r"returns NaN for a sentence of 1 token\(s\) among hidden states .*; latents must be finite",
    Root: r"gives 'hidden_states' the gradient NaN; gradients must be finite",
    Detached: r"lets no gradient reach hidden_states; training needs them",
    Constant: r"returns latents without gradients",
    Ignores: r"lets no gradient reach its parameter 'score.weight'; .* or requires_grad=False",
    FirstOnly: r"lets no gradient reach the tokens of a sentence of 1 token\(s\)",
    Float: r"returns float32 for bfloat16 hidden states; the result must have the dtype",
    FloatInside: r"forward with hidden states .* bfloat16 raised RuntimeError: .* \(test_check_fusion.py:\d+\)",
    InPlace: r"changes its input hidden_states; it must work on copies",
    Random: r"returns different latents the second time: those of a sentence of 7 token\(s\) differ by",
    Buffer: r"keeps the tensor\(s\) table out of its state_dict; a saved model is loaded into a fusion built on",
    Attribute: r"keeps the tensor\(s\) table out of its state_dict",
    Hidden: r"returns latents that differ by \S+ after saving and loading",
    Signature: r"its class raised TypeError: .*unexpected keyword argument 'hidden_size'$",
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda cls: cls.__name__)
def test_a_wrong_fusion_is_caught_in_one_sentence(wrong: type[Fusion]) -> None:
    with pytest.raises(CheckFailed, match=WRONG[wrong]) as caught:
        check_fusion(wrong)
    said = str(caught.value)
    assert said.startswith(f"fusion {wrong.__module__}.{wrong.__qualname__}")
    assert "\n" not in said
    assert len(said) < 500


@pytest.mark.parametrize("name", get_registry().names("fusion"))
def test_every_fusion_that_is_installed_passes(name: str) -> None:
    check_plugin("fusion", name)


def test_options_width_and_the_random_numbers_of_the_caller() -> None:
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    check_fusion(Right, hidden_size=5)
    check_plugin("fusion", "attention", {"latents": 3}, hidden_size=8)
    assert torch.equal(torch.randn(4), expected)
    with pytest.raises(
        CheckFailed, match=r"refuses the options of this check: options.latents: .* \(got 0\)"
    ):
        check_plugin("fusion", "attention", {"latents": 0})
