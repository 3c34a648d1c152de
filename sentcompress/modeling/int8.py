"""8-bit weights on a CPU: a quarter of the bytes to read per token, and integer kernels.

torch's kernel rounds activations by the smallest and largest value of the whole batch, so a row's result would depend
on the other rows. Here each row is first scaled and rounded to integers by itself, and constant padding columns fix the
kernel's range. Its integer products are then exact, whatever the batch contains.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sentcompress.errors import InputError

if TYPE_CHECKING:
    from sentcompress.modeling.sentence_lm import SentenceLM

WEIGHT_LEVELS = 127
ACTIVATION_LEVELS = 63
"""Activations have 7 bits: with 8, sums of two products would overflow on processors without VNNI."""
RESIDUAL_FACTOR = 2 * ACTIVATION_LEVELS
"""How much finer the second pass rounds the error of the first."""
PADDING = (-63.0, 64.0, 0.0, 0.0)
"""Columns that make the kernel's scale 1 and its zero point 63; four, because it reads four at a time."""
ENGINE = "fbgemm"
MIN_SCALE = 1e-30
"""Scale of rows of zeros."""
ROWS_PER_BLOCK = 4096
"""Rows of a weight rounded together, so that they stay in the processor's cache."""


@dataclass
class Products:
    """The product of an 8-bit weight and some rows.

    Attributes:
        sums: ``[N, out]``, to be multiplied by ``scales``.
        scales: ``[N, 1]``, by which the rows were divided before they were rounded to integers.
        rest: ``[N, 1]``, upper bound of the Euclidean norm of each row's rounding error, in units of its scale.
    """

    sums: Tensor
    scales: Tensor
    rest: Tensor


class Int8Weight:
    """An 8-bit matrix ``[out, in]`` with one scale per row, packed for the CPU's kernel.

    Args:
        weight: fp32, on the CPU.

    Raises:
        InputError: torch has no such kernel here, or it is not exact.
    """

    def __init__(self, weight: Tensor) -> None:
        if weight.device.type != "cpu":
            raise InputError(
                f"8-bit weights work only on the CPU, but these are on {weight.device.type}",
                fix="leave quantization out, or run on the CPU",
            )
        self.out_features, self.in_features = weight.shape
        whole, scales, errors, norms = [], [], [], []
        for block in weight.detach().split(ROWS_PER_BLOCK):
            rows = block.float()
            scale = (rows.abs().amax(1) / WEIGHT_LEVELS).clamp_min(MIN_SCALE)
            near = (rows / scale[:, None]).round_()
            whole.append(near.to(torch.int8))
            scales.append(scale)
            near.mul_(scale[:, None])
            norms.append(torch.linalg.vector_norm(near, dim=1))
            errors.append(torch.linalg.vector_norm(rows - near, dim=1))
        self.scales = torch.cat(scales)
        self.error_norms = torch.cat(errors)
        """``[out]``: Euclidean norm of each row's rounding error."""
        self.norms = torch.cat(norms)
        """``[out]``: Euclidean norm of each rounded row."""
        self.packed = _pack(torch.cat(whole), self.scales)
        self.padding = torch.tensor([PADDING])
        self._prove(torch.cat([part[:256] for part in whole])[:256])

    @property
    def nbytes(self) -> int:
        """Bytes read per call."""
        return self.out_features * (self.in_features + len(PADDING))

    @torch.no_grad()
    def multiply(self, rows: Tensor, passes: int = 2) -> Products:
        """``rows [N, in]`` times the weight.

        Args:
            passes: 1 rounds activations to 7 bits; 2 also multiplies the rounding error, for about 14 bits.
        """
        count, width = rows.shape
        scales = torch.linalg.vector_norm(rows, float("inf"), dim=1, keepdim=True)
        scales = scales.clamp_min_(MIN_SCALE).div_(ACTIVATION_LEVELS)
        left = rows / scales
        padded = rows.new_empty(passes * count, width + len(PADDING))
        padded[:, width:] = self.padding
        whole = padded[:count, :width]
        left.sub_(torch.round(left, out=whole))
        if passes == 2:
            torch.round(left.mul_(RESIDUAL_FACTOR), out=padded[count:, :width])
        with _engine():
            sums = torch.ops.quantized.linear_dynamic(padded, self.packed, True)
        if passes == 1:
            return Products(sums, scales, torch.linalg.vector_norm(left, dim=1, keepdim=True))
        sums = torch.add(sums[:count], sums[count:], alpha=1 / RESIDUAL_FACTOR)
        return Products(sums, scales, scales.new_full(scales.shape, width**0.5 / (2 * RESIDUAL_FACTOR)))

    def _prove(self, whole: Tensor) -> None:
        """Kernels differ between processors: check that this one's integer products are exact."""
        rows = torch.randint(
            -ACTIVATION_LEVELS,
            ACTIVATION_LEVELS + 1,
            (2, self.in_features),
            generator=torch.Generator().manual_seed(0),
        ).float()
        rows[0] = ACTIVATION_LEVELS * torch.where(whole[0] < 0, -1.0, 1.0)  # the largest possible sum
        rows[1, 0] = ACTIVATION_LEVELS  # the scale of both rows is 1
        expected = rows.double() @ whole.double().T
        found = self.multiply(rows, 1).sums[:, : len(whole)].double() / self.scales[: len(whole)].double()
        if not torch.allclose(found, expected, rtol=1e-6, atol=0.01):
            raise InputError(
                "the 8-bit kernels of this processor are not exact", fix="leave quantization out"
            )


class Int8Linear(nn.Module):
    """Replaces a linear layer: weights in 8 bits, activations in about 14, exact sums."""

    def __init__(self, linear: nn.Linear | Conv1D) -> None:
        super().__init__()
        # GPT-2's layers store their weights transposed.
        self.int8 = Int8Weight(linear.weight.T if isinstance(linear, Conv1D) else linear.weight)
        self.bias = linear.bias

    def forward(self, states: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        products = self.int8.multiply(states.reshape(-1, self.int8.in_features).float())
        if self.bias is None:
            result = products.sums.mul_(products.scales)
        else:
            result = torch.addcmul(self.bias.float(), products.sums, products.scales)
        return result.view(*states.shape[:-1], self.int8.out_features).to(states.dtype)


@torch.no_grad()
def to_int8(module: nn.Module) -> nn.Module:
    """Replace every linear layer inside ``module`` by an 8-bit one, in place; for generation, not for training."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear | Conv1D):
                setattr(parent, name, Int8Linear(child))
    return module


def quantize(model: SentenceLM, parts: Iterable[str]) -> SentenceLM:
    """Round the weights of ``encoder``, ``backbone`` or ``decoder`` to 8 bits, in place.

    Embeddings, norms and the output head stay as they are (``shortlist-exact`` makes the output head cheap and exact).

    Raises:
        InputError: a part is unknown or has no linear layers, or the model is not on a CPU with exact 8-bit kernels.
    """
    modules: dict[str, nn.Module] = {
        "encoder": model.vae.encoder,
        "backbone": model.backbone,
        "decoder": model.vae.decoder,
    }
    for part in parts:
        if part not in modules:
            raise InputError(f"no part is called '{part}'", fix=f"use {', '.join(modules)}")
        if not any(isinstance(layer, Int8Linear) for layer in to_int8(modules[part]).modules()):
            raise InputError(
                f"the {part} of this model has no linear layers to quantize", fix=f"leave out '{part}'"
            )
    return model


@contextmanager
def _engine() -> Iterator[None]:
    """Select fbgemm's kernels, which torch does by a global setting."""
    before = torch.backends.quantized.engine
    if before == ENGINE:
        yield
        return
    torch.backends.quantized.engine = ENGINE
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def _pack(whole: Tensor, scales: Tensor) -> Any:
    if ENGINE not in torch.backends.quantized.supported_engines:
        raise InputError(
            f"this build of torch has no 8-bit kernels of {ENGINE}", fix="leave quantization out"
        )
    padded = torch.cat([whole, whole.new_zeros(len(whole), len(PADDING))], 1)
    rows = len(whole)
    with warnings.catch_warnings(), _engine():
        # torch deprecates quantized tensors, but the kernel for ordinary ones is six times slower.
        warnings.simplefilter("ignore", UserWarning)
        tensor = torch._make_per_channel_quantized_tensor(
            padded, scales.double(), torch.zeros(rows, dtype=torch.long), 0
        )
        return torch.ops.quantized.linear_prepack(tensor, None)
