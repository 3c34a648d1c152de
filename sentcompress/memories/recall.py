"""Older sentences in slow storage, recalled for each token that needs them."""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from sentcompress.contracts import Memory
from sentcompress.contracts import Options as BaseOptions


class Recall(Memory):
    """Store older sentences; for each token, recall those whose keys answer its query best.

    The index has a few bits for each channel of a key and a scale: at 8 bits, 66 bytes for a key of 64 channels, which
    takes 128 in bf16; at 2 bits, 18. Queries are rounded to 8 bits, except with 16 bits. Keys and queries are rotated
    first, always the same way, so that no channel is larger than the others (as in arXiv 2405.12497 and 2504.19874).
    Below 8 bits, the sentences that the index puts first are compared by their exact keys, which takes longer.
    """

    class Options(BaseOptions):
        recall: int = Field(default=16, ge=1)
        """Sentences that each token recalls, in each block and key-value head."""
        candidates: int = Field(default=64, ge=1)
        """Sentences that an index of fewer than 8 bits finds; the best of them by their exact keys are recalled."""
        index_bits: Literal[1, 2, 4, 8, 16] = 2
        """Bits of the index for each channel of a key. Fewer take less of the device and more time; with 1, more
        candidates are needed; with 16, the index is the keys themselves."""

    @property
    def recall(self) -> int:
        return int(self.options.recall)

    @property
    def candidates(self) -> int:
        exact = self.options.index_bits >= 8
        return self.recall if exact else max(self.recall, int(self.options.candidates))

    def index(self, keys: Tensor) -> Tensor:
        """Return int8 ``[B, heads, T, C]``: codes, then two bytes of a bf16 scale. With 16 bits, return the keys."""
        bits = self.options.index_bits
        if bits == 16:
            return keys
        turned = self._rotated(keys)
        energy = turned.square().sum(-1, keepdim=True)
        spread = energy.div(keys.shape[-1]).sqrt().clamp(min=_TINY)
        codes = turned / (spread * _STEP[bits])
        codes = (codes.round() if bits == 8 else codes.floor()).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        # With this scale, products with the levels are as large as products with the key, on average over queries.
        levels = codes if bits == 8 else 2 * codes + 1
        scale = energy / (turned * levels).sum(-1, keepdim=True).clamp(min=_TINY)
        packed = codes.to(torch.int8)
        if bits < 8:
            parts = packed.bitwise_and_(2**bits - 1).unflatten(-1, (8 // bits, -1)).unbind(-2)
            packed = torch.zeros_like(parts[0])
            for place, part in enumerate(parts):
                packed |= part << (bits * place)
        return torch.cat([packed, scale.bfloat16().view(torch.int8)], -1)

    def scores(self, queries: Tensor, index: Tensor) -> Tensor:
        """Return the products of queries and keys as the index knows them, in the dtype of the queries.

        Both ways below give the same numbers, since all sums are whole and small: a token recalls the same whether it
        is written or read in a prompt.
        """
        bits = self.options.index_bits
        if bits == 16:
            return queries @ index.to(queries.dtype).transpose(-1, -2)
        turned = self._rotated(queries)
        step = turned.abs().amax(-1, keepdim=True).clamp(min=_TINY) / 127
        # Whole rows are multiplied, with the two bytes of the scale, since that is faster; a query has zeros there.
        codes = functional.pad((turned / step).round().unflatten(-1, (8 // bits, -1)), (0, 2)).flatten(-2)
        scale = index.view(torch.bfloat16)[..., None, :, -1].to(queries.dtype).contiguous()
        shrink = 256 if queries.dtype == torch.float16 else 1  # fp16 ends at 65,504
        if index.device.type != "cpu" or codes.shape[2] > _FEW or not _exact_in_8_bits():
            levels = _levels(index, bits).to(queries.dtype)
            products = (codes / shrink).to(queries.dtype) @ levels.transpose(-1, -2)
        else:
            # Row by row: a copy of the whole index in another dtype takes most of a step's time in a large batch.
            sums = torch.empty(*index.shape[:3], codes.shape[2], dtype=torch.int32)
            for keys, query, own in zip(index, codes.to(torch.int8), sums, strict=True):
                for head, levels in enumerate(_levels(keys, bits)):
                    torch._int_mm(levels, query[head].t(), out=own[head])
            products = scale.new_empty(*codes.shape[:3], index.shape[2])
            products.copy_(sums.transpose(-1, -2) if shrink == 1 else sums.transpose(-1, -2) / shrink)
        factor = step * (shrink if bits == 8 else shrink / 2 ** (7 - bits))
        return products.mul_(scale).mul_(factor.to(queries.dtype))

    def _rotated(self, vectors: Tensor) -> Tensor:
        """Vectors in fp32, rotated, with zeros up to a whole number of pairs of bytes."""
        size = vectors.shape[-1]
        whole = 16 // self.options.index_bits
        return functional.pad(vectors.float() @ _rotation(size, vectors.device), (0, -size % whole))


def _levels(index: Tensor, bits: int) -> Tensor:
    """The codes of an index ``[..., T, C]`` as bytes; below 8 bits, ``2 n + 1`` times a power of two for code n.

    The bytes of the scale stay in between, and are multiplied by zeros.
    """
    if bits == 8:
        return index
    # A product is quicker than a shift. The bits of a code move to the front; the 1 bit behind them adds one half.
    parts = [index * 2 ** (8 - bits * (place + 1)) for place in range(8 // bits)]
    return torch.cat(parts, -1).bitwise_and_(-(2 ** (8 - bits))).bitwise_or_(2 ** (7 - bits))


@functools.cache
def _exact_in_8_bits() -> bool:
    """Whether this CPU adds products of 8 bits without overflow: those without VNNI add pairs of them in 16 bits."""
    largest = torch.full((64, 64), 127, dtype=torch.int8, device="cpu")
    return all(bool((torch._int_mm(largest, largest[:, :n]) == 64 * 127**2).all()) for n in (1, 64))


_FEW = 64
"""Queries for which a product in 8 bits is faster than one in 16, on a CPU."""
_TINY = 1e-20
_STEP = {1: 1.0, 2: 0.996, 4: 0.335, 8: 0.031}
"""Best distance of evenly spaced levels, in standard deviations of a normal distribution (Max, 1960), by bits."""


@functools.cache
def _rotation(size: int, device: torch.device) -> Tensor:
    """An orthogonal matrix ``[D, D]`` that mixes all channels: random signs, then a cosine transform."""
    place = torch.arange(size, dtype=torch.float64)
    waves = torch.cos((place[:, None] + 0.5) * place[None, :] * (math.pi / size)) * math.sqrt(2 / size)
    waves[:, 0] = math.sqrt(1 / size)
    signs = torch.randint(0, 2, (size, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return (signs * waves).float().to(device)
