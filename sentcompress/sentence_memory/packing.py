"""Keys and values in 8 bits: codes and their scale side by side in one tensor, which is moved about like any other.

Symmetric around 0, with an fp16 scale for each token and head. The largest error is half a 127th of the largest number
of a token's key (or value) in one head. Packing what was unpacked gives the same codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_BYTES = 2
"""Bytes of a scale behind the codes."""


def pack(full: Tensor) -> Tensor:
    """Round to 8 bits.

    Args:
        full: ``[..., D]``, floating point.

    Returns:
        int8 ``[..., D + 2]``.
    """
    full = full.detach().float()
    # The rounded scale is used, so its rounding adds no error; a zero scale would divide 0 by 0.
    scale = (full.abs().amax(-1, keepdim=True) / 127).clamp(2**-24, 65504).half()
    codes = (full / scale).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat([codes, scale.view(torch.int8)], -1)


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that :func:`pack` rounded.

    Args:
        packed: int8 ``[..., D + 2]``.

    Returns:
        ``[..., D]`` of this dtype.
    """
    scale = packed[..., -SCALE_BYTES:].contiguous().view(torch.float16)
    # In float, since an fp16 product of a large scale would overflow and bf16 has 8 bits itself.
    return (packed[..., :-SCALE_BYTES] * scale.float()).to(dtype)


def rounded(full: Tensor) -> Tensor:
    """What is left of ``[..., D]`` after packing, with the same dtype."""
    return unpack(pack(full), full.dtype)
