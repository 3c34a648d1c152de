"""The output head while writing: which token has the largest logit, without reading all of the weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sentcompress.errors import InputError
from sentcompress.modeling.int8 import Int8Weight, combine, round_rows

WORTH_IT = 2**22
"""Weights of a head from which on reading a quarter of its bytes pays for the work of the proof."""
BLOCK = 64
"""Tokens whose largest logit is looked at together."""
MANY = 1024
"""Candidates a row above which the full head is no slower."""
ONE_PASS_FROM = 16
"""Rows from which on operations, not bytes, are what a pass costs."""


class Head:
    """The full head.

    Args:
        weight: ``[V, H]``.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.picked = 0
        """Tokens picked so far."""
        self.fallbacks = 0
        """Of them, those that took the full head because a shortlist could not be proved."""

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that one step reads."""
        return self.weight.numel() * self.weight.element_size()

    def logits(self, hidden_states: Tensor) -> Tensor:
        """``[B, H] -> [B, V]`` in fp32."""
        return F.linear(hidden_states, self.weight).float()

    def argmax(self, hidden_states: Tensor, banned: Tensor, token: int) -> Tensor:
        """The likeliest token of each row: ``[B, H] -> [B]``.

        Args:
            banned: ``[B]`` bool, rows in which ``token`` may not be picked.
        """
        self.picked += len(hidden_states)
        return self._full(hidden_states, banned, token)

    def _full(self, hidden_states: Tensor, banned: Tensor, token: int) -> Tensor:
        logits = self.logits(hidden_states)
        logits[banned, token] = float("-inf")
        return logits.argmax(-1)


class ShortlistExactHead(Head):
    """The same tokens as the full head, from a quarter of its bytes.

    All logits are computed from weights in 8 bits. How far each can be off is known: at most the norm of what rounding
    took from its row times the norm of the hidden state (Cauchy-Schwarz), and likewise for what rounding took from the
    hidden state. Only tokens that could still be the likeliest, a handful, are computed again from the full weights.
    Rows where they are many, or where the best two are closer than fp32 sums are exact, take the full head.

    Raises:
        InputError: the weights are not on a CPU with exact 8-bit kernels.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        vocab, width = weight.shape
        # Whole blocks; the rows added have no weight and are never candidates.
        self.int8 = Int8Weight(F.pad(weight.detach(), (0, 0, 0, -vocab % BLOCK)))
        largest = self.int8.norms + self.int8.error_norms
        # fp32 sums of `width` products, in another order than the full head's (Higham, section 3.1).
        self.rounding = 2 * width * 2.0**-24
        self.errors = self.int8.error_norms + self.rounding * largest
        self.largest = float(largest.max())

    @property
    def bytes_read(self) -> int:
        return self.int8.nbytes

    def argmax(self, hidden_states: Tensor, banned: Tensor, token: int) -> Tensor:
        self.picked += len(hidden_states)
        passes = 1 if len(hidden_states) >= ONE_PASS_FROM else 2
        chosen, unsure = self._prove(hidden_states, banned, token, passes)
        if passes == 1 and unsure.any():
            chosen[unsure], again = self._prove(hidden_states[unsure], banned[unsure], token, 2)
            unsure[unsure.clone()] = again
        if unsure.any():
            self.fallbacks += int(unsure.sum())
            chosen[unsure] = self._full(hidden_states[unsure], banned[unsure], token)
        return chosen

    def _prove(self, hidden_states: Tensor, banned: Tensor, token: int, passes: int) -> tuple[Tensor, Tensor]:
        """The likeliest token of each row ``[B]``, and where that could not be proved ``[B]`` bool."""
        rows, vocab = len(hidden_states), len(self.weight)
        rounded = round_rows(hidden_states, passes)
        sums = self.int8.products(rounded.whole.flatten(0, 1)).view(passes, rows, -1)
        near = combine(sums, rounded.scales).mul_(self.int8.scales)
        near[banned, token] = float("-inf")
        near[:, vocab:] = float("-inf")
        norms = torch.linalg.vector_norm(hidden_states, dim=1, keepdim=True)
        rest = torch.linalg.vector_norm(rounded.rest, dim=1, keepdim=True)

        # The largest logit is at least what the nearly largest one is at the least.
        top = near.argmax(1, keepdim=True)
        least = near.gather(1, top) - norms * self.errors[top] - rest * self.int8.norms[top]
        most = near.addcmul_(norms, self.errors)
        if passes == 1:  # after two passes the rest is far below what the weights lost, one number will do
            most = most.addcmul_(rest, self.int8.norms)
        else:
            least = least - rest * self.largest
        blocks = most.view(rows, -1, BLOCK)
        at_row, at_block = (blocks.amax(2) >= least).nonzero(as_tuple=True)
        of_block, place = (blocks[at_row, at_block] >= least[at_row]).nonzero(as_tuple=True)
        at_row, tokens = at_row[of_block], at_block[of_block] * BLOCK + place

        counts = torch.bincount(at_row, minlength=rows)
        few = counts <= MANY
        if not few.all():
            kept = few[at_row]
            at_row, tokens = at_row[kept], tokens[kept]
            counts = counts.where(few, 0)
        exact = (self.weight[tokens] * hidden_states[at_row]).sum(-1)
        first = counts.cumsum(0) - counts
        table = exact.new_full((rows, max(2, int(counts.max()))), float("-inf"))
        table[at_row, torch.arange(len(tokens), device=tokens.device) - first[at_row]] = exact
        best = table.topk(2)
        close = best.values[:, 0] - best.values[:, 1] <= self.rounding * self.largest * norms[:, 0]
        unsure = ~few | close
        chosen = torch.zeros_like(counts)
        chosen[~unsure] = tokens[(first + best.indices[:, 0])[~unsure]]
        return chosen, unsure


def make_head(weight: Tensor, kind: str) -> Head:
    """The head called ``kind``: ``exact``, ``shortlist-exact``, or ``auto``, which takes the faster where it pays.

    Raises:
        InputError: ``shortlist-exact`` was asked for by name and cannot be had.
    """
    if kind == "exact":
        return Head(weight)
    if kind == "shortlist-exact":
        return ShortlistExactHead(weight)
    if weight.device.type != "cpu" or weight.numel() < WORTH_IT or weight.dtype != torch.float32:
        return Head(weight)
    try:
        return ShortlistExactHead(weight)
    except InputError:
        return Head(weight)
