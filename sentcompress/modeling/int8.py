"""Weights in 8 bits on a CPU: a quarter of the bytes to read a token, and integer kernels.

torch's kernel rounds activations by the smallest and largest value of the whole batch, so a row's result would depend
on the rows beside it. Here every row is brought to whole numbers by a scale of its own first, and two constant columns
hold the kernel's range in place: its products of whole numbers are then exact, whatever stands in the batch.
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
"""The kernel multiplies 7 by 8 bits: more would overflow its sums of two on processors without VNNI."""
STEPS = 2 * ACTIVATION_LEVELS
"""What one pass leaves over fits into this many times finer steps of the next."""
PADDING = (-63.0, 64.0, 0.0, 0.0)
"""Columns that make the kernel's scale 1 and its zero point 63; four, as it reads them in fours."""
ENGINE = "fbgemm"
ROWS_AT_A_TIME = 4096
"""Rows of a weight rounded together, so that they stay in the processor's cache."""


@dataclass
class Rounded:
    """Rows of activations as whole numbers.

    Attributes:
        whole: ``[passes, N, H]`` whole numbers between -63 and 63.
        scales: ``[passes, N, 1]``.
        rest: ``[N, H]``, what they leave out of the activations.
    """

    whole: Tensor
    scales: Tensor
    rest: Tensor


def round_rows(rows: Tensor, passes: int) -> Rounded:
    """Write ``rows [N, H]`` as a sum of ``passes`` rows of whole numbers times a scale, and a rest."""
    scale = (rows.abs().amax(-1, keepdim=True) / ACTIVATION_LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    rest, whole, scales = rows, [], []
    for _ in range(passes):
        whole.append((rest / scale).round_())
        scales.append(scale)
        rest = rest - whole[-1] * scale
        scale = scale / STEPS
    return Rounded(torch.stack(whole), torch.stack(scales), rest)


def combine(sums: Tensor, scales: Tensor) -> Tensor:
    """Add up what the passes ``[passes, N, out]`` found, each by its scale: ``[N, out]``, in the place of the first."""
    result = sums[0].mul_(scales[0])
    for more, scale in zip(sums[1:], scales[1:], strict=True):
        result.addcmul_(more, scale)
    return result


class Int8Weight:
    """A matrix ``[out, in]`` in 8 bits with a scale a row, ready for the CPU's kernel.

    Args:
        weight: fp32, on the CPU.

    Raises:
        InputError: torch has no such kernel here, or it is not exact.
    """

    def __init__(self, weight: Tensor) -> None:
        if weight.device.type != "cpu":
            raise InputError(
                f"8-bit weights are for the CPU, these are on {weight.device.type}",
                fix="leave quantization out, or run on the CPU",
            )
        self.out_features, self.in_features = weight.shape
        whole, scales, errors, norms = [], [], [], []
        for block in weight.detach().split(ROWS_AT_A_TIME):
            rows = block.float()
            scale = (rows.abs().amax(1) / WEIGHT_LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
            near = (rows / scale[:, None]).round_()
            whole.append(near.to(torch.int8))
            scales.append(scale)
            near.mul_(scale[:, None])
            norms.append(torch.linalg.vector_norm(near, dim=1))
            errors.append(torch.linalg.vector_norm(rows - near, dim=1))
        self.scales = torch.cat(scales)
        self.error_norms = torch.cat(errors)
        """``[out]``: Euclidean norm of what rounding took from each row."""
        self.norms = torch.cat(norms)
        """``[out]``: of each row as it is now."""
        self.packed = _pack(torch.cat(whole))
        self.padding = torch.tensor([PADDING])
        self._prove(torch.cat([part[:256] for part in whole])[:256])

    @property
    def nbytes(self) -> int:
        """Bytes that are read at each call."""
        return self.out_features * (self.in_features + 4)

    def products(self, whole: Tensor) -> Tensor:
        """``[N, in]`` whole numbers times the whole numbers of the weight: ``[N, out]``, exact."""
        padded = torch.cat([whole, self.padding.expand(len(whole), -1)], 1)
        with _engine():
            return torch.ops.quantized.linear_dynamic(padded, self.packed, True)

    def linear(self, rows: Tensor, passes: int = 2) -> Tensor:
        """``rows [N, in]`` times the weight: ``[N, out]``; two passes round activations to about 14 bits."""
        rounded = round_rows(rows, passes)
        sums = self.products(rounded.whole.flatten(0, 1)).view(passes, len(rows), -1)
        return combine(sums, rounded.scales).mul_(self.scales)

    def _prove(self, whole: Tensor) -> None:
        """Kernels differ between processors: what this one computes must be exact."""
        rows = torch.randint(
            -ACTIVATION_LEVELS,
            ACTIVATION_LEVELS + 1,
            (2, self.in_features),
            generator=torch.Generator().manual_seed(0),
        ).float()
        rows[0] = ACTIVATION_LEVELS * torch.where(whole[0] < 0, -1.0, 1.0)  # the largest sum there can be
        expected = rows.double() @ whole.double().T
        if not torch.equal(self.products(rows)[:, : len(whole)].double(), expected):
            raise InputError(
                "the 8-bit kernels of this processor are not exact", fix="leave quantization out"
            )


class Int8Linear(nn.Module):
    """Stands in for a linear layer: weight in 8 bits, activations in about 14, sums exact."""

    def __init__(self, linear: nn.Linear | Conv1D) -> None:
        super().__init__()
        # GPT-2's layers keep their weights the other way around.
        self.int8 = Int8Weight(linear.weight.T if isinstance(linear, Conv1D) else linear.weight)
        self.bias = linear.bias

    def forward(self, states: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        result = self.int8.linear(states.reshape(-1, self.int8.in_features).float())
        if self.bias is not None:
            result += self.bias
        return result.view(*states.shape[:-1], self.int8.out_features).to(states.dtype)


@torch.no_grad()
def to_int8(module: nn.Module) -> nn.Module:
    """Replace every linear layer inside ``module`` by one in 8 bits, in place; for writing, not for training."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear | Conv1D):
                setattr(parent, name, Int8Linear(child))
    return module


def quantize(model: SentenceLM, parts: Iterable[str]) -> SentenceLM:
    """Round the weights of ``encoder``, ``backbone`` or ``decoder`` to 8 bits, in place.

    Embeddings, norms and the output head stay as they are (``shortlist-exact`` makes the head cheap and exact).

    Raises:
        InputError: a part is not known, or the model is not on a CPU with exact 8-bit kernels.
    """
    places: dict[str, nn.Module] = {
        "encoder": model.vae.encoder,
        "backbone": model.backbone,
        "decoder": model.vae.decoder,
    }
    for part in parts:
        if part not in places:
            raise InputError(f"no part is called '{part}'", fix=f"use {', '.join(places)}")
        to_int8(places[part])
    return model


@contextmanager
def _engine() -> Iterator[None]:
    """torch picks kernels by a global setting; ours are fbgemm's."""
    before = torch.backends.quantized.engine
    if before == ENGINE:
        yield
        return
    torch.backends.quantized.engine = ENGINE
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def _pack(whole: Tensor) -> Any:
    if ENGINE not in torch.backends.quantized.supported_engines:
        raise InputError(
            f"this build of torch has no 8-bit kernels of {ENGINE}", fix="leave quantization out"
        )
    padded = torch.cat([whole, whole.new_zeros(len(whole), len(PADDING))], 1)
    rows = len(whole)
    with warnings.catch_warnings(), _engine():
        # torch deprecates its quantized tensors; the kernel that takes plain ones is six times slower.
        warnings.simplefilter("ignore", UserWarning)
        tensor = torch._make_per_channel_quantized_tensor(
            padded, torch.ones(rows, dtype=torch.double), torch.zeros(rows, dtype=torch.long), 0
        )
        return torch.ops.quantized.linear_prepack(tensor, None)
