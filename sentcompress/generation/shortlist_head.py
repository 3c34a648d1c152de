"""Output heads that read part of the weights: one proves that its token is right, the other is approximate."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sentcompress.errors import InputError
from sentcompress.generation.output_head import Candidates, CandidateTokens, OutputHead
from sentcompress.modeling.int8 import Int8Weight
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.modeling.shortlist import Shortlist
from sentcompress.recipe.sections import HeadKind

TOKENS_PER_BLOCK = 64
"""Tokens whose largest logit is compared together."""
MAX_CANDIDATES = 1024
"""From this many candidates per row, computing every logit is as fast."""
OTHERS_PROBABILITY = 0.01
"""Probability left to all tokens outside a predicted shortlist, when text is scored with it."""
MIN_ROWS_FOR_ONE_PASS = 4
"""Rows from which the cost of a pass is its operations, not the bytes it reads."""


class ShortlistExactHead(OutputHead):
    """Picks the same tokens as :class:`OutputHead` and reads a quarter of the bytes.

    All logits are first computed from 8-bit weights. The error of each is bounded: at most the norm of the rounding
    error of its weight row times the norm of the hidden state (Cauchy-Schwarz), and likewise for the rounding error of
    the hidden state. Only the few tokens that could still be the most likely are computed again from the full weights.
    Rows with too many such candidates fall back to all logits.

    Raises:
        InputError: the weights are not on a CPU with exact 8-bit kernels.
    """

    kind: HeadKind = "shortlist-exact"

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        # Padded to whole blocks; the added rows are zero and never candidates.
        self.int8 = Int8Weight(F.pad(self.weight, (0, 0, 0, -len(weight) % TOKENS_PER_BLOCK)))
        self.largest_rounded = float(self.int8.norms.max())
        # Hidden states with a few large values need two passes: stop trying one pass when it rarely succeeds.
        self._tried = self._failed = 0

    @property
    def bytes_read(self) -> int:
        return self.int8.nbytes

    def argmax(self, hidden_states: Tensor, candidates: Candidates, banned: Tensor, token: int) -> Tensor:
        self.picked += len(hidden_states)
        passes = 1 if len(hidden_states) >= MIN_ROWS_FOR_ONE_PASS and 4 * self._failed <= self._tried else 2
        chosen, unsure = self._prove(hidden_states, banned, token, passes)
        if passes == 1:
            self._tried += len(hidden_states)
            self._failed += int(unsure.sum())
        if passes == 1 and unsure.any():
            chosen[unsure], again = self._prove(hidden_states[unsure], banned[unsure], token, 2)
            unsure[unsure.clone()] = again
        if unsure.any():
            self.fallbacks += int(unsure.sum())
            chosen[unsure] = self._from_all_logits(hidden_states[unsure], banned[unsure], token)
        return chosen

    def _prove(self, hidden_states: Tensor, banned: Tensor, token: int, passes: int) -> tuple[Tensor, Tensor]:
        """The most likely token of each row ``[B]``, and where that could not be proved, ``[B]`` bool."""
        rows, vocab = len(hidden_states), len(self.weight)
        each = torch.arange(rows)
        products = self.int8.multiply(hidden_states, passes)
        upper = products.sums
        upper[banned, token] = float("-inf")
        upper[:, vocab:] = float("-inf")

        # A lower bound of the largest logit: that of the token that seems the most likely.
        blocks = upper.view(rows, -1, TOKENS_PER_BLOCK)
        block = blocks.amax(2).argmax(1)
        likeliest = block * TOKENS_PER_BLOCK + blocks[each, block].argmax(1)
        error = self._error_bound(hidden_states)
        scales = products.scales[:, 0]
        lower = ((self.weight[likeliest] * hidden_states).sum(-1) - error) / scales
        norms = torch.linalg.vector_norm(hidden_states, dim=1) / scales
        upper.addcmul_(norms[:, None], self.int8.error_norms)
        if passes == 1:
            upper.addcmul_(products.rest, self.int8.norms)
        else:  # after two passes the activations' error is far below the weights': one bound for all rows is enough
            lower = lower - products.rest[:, 0] * self.largest_rounded
        at_row, at_block = (blocks.amax(2) >= lower[:, None]).nonzero(as_tuple=True)
        of_block, column = (blocks[at_row, at_block] >= lower[at_row, None]).nonzero(as_tuple=True)
        at_row, tokens = at_row[of_block], at_block[of_block] * TOKENS_PER_BLOCK + column

        counts = torch.bincount(at_row, minlength=rows)
        few = counts <= MAX_CANDIDATES
        if not few.all():
            kept = few[at_row]
            at_row, tokens = at_row[kept], tokens[kept]
            counts = counts.where(few, 0)
        exact = (self.weight[tokens] * hidden_states[at_row]).sum(-1)
        first = counts.cumsum(0) - counts
        table = exact.new_full((rows, max(2, int(counts.max()))), float("-inf"))
        table[at_row, torch.arange(len(tokens)) - first[at_row]] = exact
        best = table.topk(2)
        chosen = likeliest
        chosen[few] = tokens[(first + best.indices[:, 0])[few]]
        close = few & (best.values[:, 0] - best.values[:, 1] <= error)
        for row in close.nonzero().flatten().tolist():
            mine = slice(int(first[row]), int(first[row] + counts[row]))
            near_ties = exact[mine] >= best.values[row, 0] - error[row]
            chosen[row] = self._break_tie(hidden_states[row], tokens[mine][near_ties])
        return chosen, ~few


class ShortlistHead(OutputHead):
    """Considers only the tokens predicted for each sentence: cheap and approximate.

    Args:
        weight: ``[V, H]``.
        shortlist: predicts the tokens (:class:`sentcompress.modeling.shortlist.Shortlist`).
        tokens: how many per sentence.
        end: the end mark, which is always included.
    """

    kind: HeadKind = "shortlist"

    def __init__(self, weight: Tensor, shortlist: Shortlist, tokens: int, end: int) -> None:
        super().__init__(weight)
        self.shortlist, self.tokens, self.end = shortlist, min(tokens, len(weight)), end
        with torch.no_grad():
            self.table = shortlist.table(self.weight)

    @property
    def bytes_read(self) -> int:
        return self.tokens * self.weight.shape[1] * self.weight.element_size()

    @property
    def bytes_per_sentence(self) -> int:
        return self.table.numel() * self.table.element_size() + self.bytes_read

    def candidates(self, latents: Tensor) -> list[CandidateTokens]:
        chosen = self.shortlist.pick(latents, self.table, self.tokens, self.end)
        return [CandidateTokens(tokens, self.weight[tokens]) for tokens in chosen]

    def logits(self, hidden_states: Tensor, candidates: Candidates) -> Tensor:
        logits = hidden_states.new_full(
            (len(candidates), len(self.weight)), float("-inf"), dtype=torch.float32
        )
        tokens, logits_of_tokens = self._candidate_logits(hidden_states, candidates)
        return logits.scatter_(1, tokens, logits_of_tokens)

    def argmax(self, hidden_states: Tensor, candidates: Candidates, banned: Tensor, token: int) -> Tensor:
        self.picked += len(hidden_states)
        tokens, logits = self._candidate_logits(hidden_states, candidates)
        logits[(tokens == token) & banned[:, None]] = float("-inf")
        return self._most_likely(hidden_states, logits, tokens)

    def nll(self, hidden_states: Tensor, candidates: CandidateTokens, targets: Tensor) -> Tensor:
        """Nats of text with these candidates: ``[t, H]`` and ``[t]`` tokens to ``[t]``.

        All other tokens share ``OTHERS_PROBABILITY`` evenly; generation never picks one.
        """
        logits = F.linear(hidden_states, candidates.weight).float()
        is_target = (candidates.tokens == targets[:, None]).float()
        others = len(self.weight) - len(candidates.tokens)
        inside = is_target.sum(1) > 0
        own = (
            logits.logsumexp(1)
            - (logits * is_target).sum(1)
            - (math.log1p(-OTHERS_PROBABILITY) if others else 0.0)
        )
        return own.where(inside, own.new_tensor(math.log(max(others, 1) / OTHERS_PROBABILITY)))

    @staticmethod
    def _candidate_logits(hidden_states: Tensor, candidates: Candidates) -> tuple[Tensor, Tensor]:
        """Tokens and logits ``[B, n]``. One row at a time: a batched product would copy the weights at each step."""
        listed = [each for each in candidates if each is not None]
        pairs = zip(listed, hidden_states, strict=True)
        logits = torch.stack([each.weight @ hidden_state for each, hidden_state in pairs]).float()
        return torch.stack([each.tokens for each in listed]), logits


def make_shortlist_head(model: SentenceLM, tokens: int) -> ShortlistHead:
    """The approximate head of a model that was grafted with a shortlist.

    Raises:
        InputError: the model has none.
    """
    if model.shortlist is None:
        raise InputError(
            "head: the model predicts no shortlist of tokens",
            fix="graft it with graft.shortlist_rank (64, say), or use exact, shortlist-exact or auto",
        )
    return ShortlistHead(model.vae.output_weight, model.shortlist, tokens, model.config.eos_token_id)
