"""The output head during generation: which token has the largest logit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from sentcompress.errors import InputError
from sentcompress.modeling.int8 import ROWS_PER_BLOCK
from sentcompress.recipe.sections import HeadKind

MIN_WEIGHTS_FOR_SHORTLIST = 2**22
"""Weights of a head above which reading a quarter of its bytes is worth the work of the proof."""


@dataclass(frozen=True)
class CandidateTokens:
    """The only tokens that one sentence may contain.

    Attributes:
        tokens: ``[n]`` int64, the end mark first.
        weight: ``[n, H]``, their rows of the output head.
    """

    tokens: Tensor
    weight: Tensor


Candidates = Sequence[CandidateTokens | None]
"""For each row what :meth:`OutputHead.candidates` returned for its sentence."""


class OutputHead:
    """Computes every logit.

    Logits that differ by less than the rounding error of fp32 sums would be ordered by how a product was split up. Such
    ties are resolved in fp64, here and in the subclasses, so that every implementation picks the same token.

    Args:
        weight: ``[V, H]``.
    """

    kind: HeadKind = "exact"

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()
        # The error bound of a sum of `width` products in lanes of eight or more (Higham, section 4.2), for two tokens
        # and two implementations.
        self.rounding = 4 * (weight.shape[1] / 8 + 16) * torch.finfo(torch.float32).eps / 2
        self.picked = 0
        """Tokens picked so far."""
        self.fallbacks = 0
        """How many of them needed every logit because the shortlist could not be proved."""

    @cached_property
    def largest(self) -> float:
        """The largest norm of a weight row."""
        return float(max(rows.float().norm(dim=1).max() for rows in self.weight.split(ROWS_PER_BLOCK)))

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read per token."""
        return self.weight.numel() * self.weight.element_size()

    @property
    def bytes_per_sentence(self) -> int:
        """Bytes read once per sentence, in addition."""
        return 0

    def candidates(self, latents: Tensor) -> Candidates:
        """Tokens that sentences conditioned on ``latents [b, k, H]`` may contain; None allows all."""
        return [None] * len(latents)

    def logits(self, hidden_states: Tensor, candidates: Candidates) -> Tensor:
        """``[B, H] -> [B, V]`` in fp32; minus infinity at tokens that are not candidates."""
        return F.linear(hidden_states, self.weight).float()

    def argmax(self, hidden_states: Tensor, candidates: Candidates, banned: Tensor, token: int) -> Tensor:
        """The most likely token of each row: ``[B, H] -> [B]``.

        Args:
            candidates: of each row's sentence.
            banned: ``[B]`` bool, rows in which ``token`` must not be picked.
        """
        self.picked += len(hidden_states)
        return self._from_all_logits(hidden_states, banned, token)

    def _from_all_logits(self, hidden_states: Tensor, banned: Tensor, token: int) -> Tensor:
        logits = F.linear(hidden_states, self.weight).float()
        logits[banned, token] = float("-inf")
        return self._most_likely(hidden_states, logits)

    def _most_likely(self, hidden_states: Tensor, logits: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The most likely token of each row ``[B]``, ties resolved, by logits ``[B, n]`` of ``tokens`` (None: all)."""
        best, column = logits.max(1)
        chosen = column if tokens is None else tokens.gather(1, column[:, None]).squeeze(1)
        close = logits >= (best - self._error_bound(hidden_states))[:, None]
        for row in (close.sum(1) > 1).nonzero().flatten().tolist():
            columns = close[row].nonzero().flatten()
            near = columns if tokens is None else tokens[row, columns].sort().values
            chosen[row] = self._break_tie(hidden_states[row], near)
        return chosen

    def _error_bound(self, hidden_states: Tensor) -> Tensor:
        """The error bound of each row's logits, below which their order is unreliable: ``[B]``."""
        return self.rounding * self.largest * torch.linalg.vector_norm(hidden_states.float(), dim=1)

    def _break_tie(self, hidden_state: Tensor, tokens: Tensor) -> Tensor:
        """The most likely of some tokens in ascending order, computed in fp64; the first of equals."""
        return tokens[(self.weight[tokens].double() @ hidden_state.double()).argmax()]


def make_head(weight: Tensor, kind: HeadKind) -> OutputHead:
    """The head called ``kind``: ``exact``, ``shortlist-exact``, or ``auto``, whichever is faster.

    Raises:
        InputError: ``shortlist-exact`` is not available here, or ``kind`` is ``shortlist``, which needs a model that
            predicts it (:func:`sentcompress.generation.shortlist_head.make_shortlist_head`).
    """
    if kind == "shortlist":
        raise InputError(
            "head: only a SentenceLM grafted with graft.shortlist_rank predicts a 'shortlist'",
            fix="use exact, shortlist-exact or auto",
        )
    large = weight.device.type == "cpu" and weight.numel() >= MIN_WEIGHTS_FOR_SHORTLIST
    if kind == "exact" or (kind == "auto" and not (large and weight.dtype == torch.float32)):
        return OutputHead(weight)
    from sentcompress.generation.shortlist_head import ShortlistExactHead  # built on this module

    try:
        return ShortlistExactHead(weight)
    except InputError:
        if kind != "auto":
            raise
        return OutputHead(weight)
