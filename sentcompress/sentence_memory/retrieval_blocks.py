"""Which blocks of an LLM look far back: only those gain from recalling."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from sentcompress.contracts.causal_lm import position_limit
from sentcompress.errors import InputError
from sentcompress.sentence_memory.attachment import attending
from sentcompress.sentence_memory.attention import KeepsNothing
from sentcompress.sentence_memory.visibility import attend

REPEATED, _TEXTS = 256, 3
"""Random tokens that are repeated, and how many such texts are read."""
OFTEN, THRESHOLD = 0.1, 0.4
"""A head looks back if, for this share of the tokens, it gives at least this much of its attention to an earlier place
of the same token and to what followed there. Recalling in more blocks made text worse (docs/research-log.md)."""
_found: weakref.WeakKeyDictionary[PreTrainedModel, list[float]] = weakref.WeakKeyDictionary()


class _Probe(KeepsNothing):
    """Full attention of one block that notes how much of it goes back to the same token and to what followed it."""

    looked_back = 0.0

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float = 1.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **options: Any,
    ) -> Tensor:
        batch, _, length, size = query.shape
        rows = query.view(batch, key.shape[1], -1, length, size)
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        if sliding_window is not None:
            mask = mask.triu(1 - sliding_window)
        scores = (rows.float() @ key.float()[:, :, None].transpose(-1, -2)) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        half = length // 2
        repeats = weights[..., half:, :half]
        same, following = (repeats.diagonal(offset, -2, -1)[..., : half - 1] for offset in (0, 1))
        strongest = (same + following).flatten(1, 2).transpose(0, 1).flatten(1)  # [heads, all positions]
        self.looked_back = float(strongest.quantile(1 - OFTEN, dim=1).max())
        out = attend(rows, key, value, mask[None, None], scaling, softcap, **options)
        return out.reshape(*query.shape[:3], -1)


def looked_back(model: PreTrainedModel, blocks: int) -> list[float]:
    """For each block what its best head gives to an earlier place of a token and what followed, one time in ten.

    Random tokens are read twice in a row. The heads that then look back are those that find and copy what was said far
    away (induction heads, arXiv 2209.11895; retrieval heads, 2404.15574). Random tokens show them without any text, as
    in 2407.15891. Measured once for each LLM.
    """
    if model not in _found:
        size = len(model.get_input_embeddings().weight)
        repeated = min(REPEATED, position_limit(model.config) // 2)
        generator = torch.Generator().manual_seed(0)
        half = torch.randint(0, size, (_TEXTS, repeated), generator=generator).to(model.device)
        probes = [_Probe() for _ in range(blocks)]
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), attending(model):
                model.base_model(
                    input_ids=torch.cat([half, half], 1), past_key_values=Cache(layers=probes), use_cache=True
                )
        finally:
            model.train(training)
        _found[model] = [probe.looked_back for probe in probes]
    return _found[model]


def recalling_blocks(model: PreTrainedModel, wanted: str | Sequence[int]) -> list[int]:
    """The numbers of the blocks that recall.

    Args:
        wanted: ``auto`` (those that look back, or all where none does), ``all``, or their numbers from 0.

    Raises:
        InputError: something else, or a block that the LLM does not have.
    """
    blocks = model.config.get_text_config(decoder=True).num_hidden_layers
    if wanted == "all":
        return list(range(blocks))
    if wanted == "auto":
        shares = looked_back(model, blocks)
        return [n for n, share in enumerate(shares) if share >= THRESHOLD] or list(range(blocks))
    numbers = list(wanted) if isinstance(wanted, Sequence) and not isinstance(wanted, str) else []
    if not numbers or not all(type(n) is int and 0 <= n < blocks for n in numbers):
        raise InputError(
            f"recall_blocks: {wanted!r} are not blocks of this LLM",
            fix=f"use 'auto', 'all', or a list of numbers from 0 to {blocks - 1}, such as [0, {blocks - 1}]",
        )
    return sorted(set(numbers))
