"""The output head while writing: which token has the largest logit, without reading all of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from sentcompress.errors import InputError
from sentcompress.modeling.int8 import ROWS_AT_A_TIME, Int8Weight
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.modeling.shortlist import Shortlist
from sentcompress.recipe.choices import HeadKind

WORTH_IT = 2**22
"""Weights of a head from which on reading a quarter of its bytes pays for the work of the proof."""
BLOCK = 64
"""Tokens whose largest logit is looked at together."""
MANY = 1024
"""Candidates a row above which the full head is no slower."""
MISSED = 0.01
"""Probability left to all tokens that are not on a predicted shortlist, when text is charged with it."""
ONE_PASS_FROM = 4
"""Rows from which on operations, not bytes, are what a pass costs."""


@dataclass(frozen=True)
class Words:
    """The tokens one sentence is written with.

    Attributes:
        tokens: ``[n]`` int64, the end mark first.
        weight: ``[n, H]``, their rows of the output head.
    """

    tokens: Tensor
    weight: Tensor


Known = Sequence[Words | None]
"""For each row what :meth:`Head.words` gave its sentence."""


class Head:
    """The full head.

    Logits closer than fp32 sums are exact would be ordered by chance, by how a product was split up. They are settled
    in fp64, here and in :class:`ShortlistExactHead`: the token is the likeliest by the weights, whatever computes it.

    Args:
        weight: ``[V, H]``.
    """

    kind: HeadKind = "exact"

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()
        # Sums of `width` products in lanes of eight or more, as every matrix product has them (Higham, section 4.2),
        # of two tokens, here and there.
        self.rounding = 4 * (weight.shape[1] / 8 + 16) * torch.finfo(torch.float32).eps / 2
        self.picked = 0
        """Tokens picked so far."""
        self.fallbacks = 0
        """Of them, those that took the full head because a shortlist could not be proved."""

    @cached_property
    def largest(self) -> float:
        """The largest norm of a row."""
        return float(max(rows.float().norm(dim=1).max() for rows in self.weight.split(ROWS_AT_A_TIME)))

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that one step reads."""
        return self.weight.numel() * self.weight.element_size()

    @property
    def bytes_a_sentence(self) -> int:
        """Bytes read once a sentence besides."""
        return 0

    def words(self, latents: Tensor) -> Known:
        """What the head wants to know of sentences that are begun, told ``[b, k, H]``; the full head: nothing."""
        return [None] * len(latents)

    def logits(self, hidden_states: Tensor, words: Known) -> Tensor:
        """``[B, H] -> [B, V]`` in fp32; minus infinity where a token is not among the sentence's words."""
        return F.linear(hidden_states, self.weight).float()

    def argmax(self, hidden_states: Tensor, words: Known, banned: Tensor, token: int) -> Tensor:
        """The likeliest token of each row: ``[B, H] -> [B]``.

        Args:
            words: of each row's sentence.
            banned: ``[B]`` bool, rows in which ``token`` may not be picked.
        """
        self.picked += len(hidden_states)
        return self._full(hidden_states, banned, token)

    def _full(self, hidden_states: Tensor, banned: Tensor, token: int) -> Tensor:
        logits = F.linear(hidden_states, self.weight).float()
        logits[banned, token] = float("-inf")
        return self._likeliest(hidden_states, logits)

    def _likeliest(self, hidden_states: Tensor, logits: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The likeliest token of each row ``[B]``, ties settled, by logits ``[B, n]`` of ``tokens``; None: of all."""
        best, place = logits.max(1)
        chosen = place if tokens is None else tokens.gather(1, place[:, None]).squeeze(1)
        close = logits >= (best - self._doubt(hidden_states))[:, None]
        for row in (close.sum(1) > 1).nonzero().flatten().tolist():
            places = close[row].nonzero().flatten()
            near = places if tokens is None else tokens[row, places].sort().values
            chosen[row] = self._settle(hidden_states[row], near)
        return chosen

    def _doubt(self, hidden_states: Tensor) -> Tensor:
        """How close logits can be in each row before their order is chance: ``[B]``."""
        return self.rounding * self.largest * torch.linalg.vector_norm(hidden_states.float(), dim=1)

    def _settle(self, hidden_state: Tensor, tokens: Tensor) -> Tensor:
        """The likeliest of some tokens in ascending order, the first of equals."""
        return tokens[(self.weight[tokens].double() @ hidden_state.double()).argmax()]


class ShortlistExactHead(Head):
    """The same tokens as the full head, from a quarter of its bytes.

    All logits are computed from weights in 8 bits. How far each can be off is known: at most the norm of what rounding
    took from its row times the norm of the hidden state (Cauchy-Schwarz), and likewise for what rounding took from the
    hidden state. Only tokens that could still be the likeliest, a handful, are computed again from the full weights.
    Rows where they are many take the full head.

    Raises:
        InputError: the weights are not on a CPU with exact 8-bit kernels.
    """

    kind: HeadKind = "shortlist-exact"

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        # Whole blocks; the rows added have no weight and are never candidates.
        self.int8 = Int8Weight(F.pad(self.weight, (0, 0, 0, -len(weight) % BLOCK)))
        self.largest_rounded = float(self.int8.norms.max())
        # Hidden states with a few large values may need two passes; then one is not tried in vain for ever.
        self._tried = self._failed = 0

    @property
    def bytes_read(self) -> int:
        return self.int8.nbytes

    def argmax(self, hidden_states: Tensor, words: Known, banned: Tensor, token: int) -> Tensor:
        self.picked += len(hidden_states)
        passes = 1 if len(hidden_states) >= ONE_PASS_FROM and 4 * self._failed <= self._tried else 2
        chosen, unsure = self._prove(hidden_states, banned, token, passes)
        if passes == 1:
            self._tried += len(hidden_states)
            self._failed += int(unsure.sum())
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
        each = torch.arange(rows)
        products = self.int8.multiply(hidden_states, passes)
        near = products.sums
        near[banned, token] = float("-inf")
        near[:, vocab:] = float("-inf")

        # The largest logit is at least the one of the token that seems the likeliest.
        blocks = near.view(rows, -1, BLOCK)
        block = blocks.amax(2).argmax(1)
        likely = block * BLOCK + blocks[each, block].argmax(1)
        doubt = self._doubt(hidden_states)
        scales = products.scales[:, 0]
        least = ((self.weight[likely] * hidden_states).sum(-1) - doubt) / scales
        norms = torch.linalg.vector_norm(hidden_states, dim=1) / scales
        near.addcmul_(norms[:, None], self.int8.error_norms)
        if passes == 1:
            near.addcmul_(products.rest, self.int8.norms)
        else:  # after two passes the rest is far below what the weights lost: one number will do
            least = least - products.rest[:, 0] * self.largest_rounded
        at_row, at_block = (blocks.amax(2) >= least[:, None]).nonzero(as_tuple=True)
        of_block, place = (blocks[at_row, at_block] >= least[at_row, None]).nonzero(as_tuple=True)
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
        table[at_row, torch.arange(len(tokens)) - first[at_row]] = exact
        best = table.topk(2)
        chosen = likely
        chosen[few] = tokens[(first + best.indices[:, 0])[few]]
        close = few & (best.values[:, 0] - best.values[:, 1] <= doubt)
        for row in close.nonzero().flatten().tolist():
            mine = slice(int(first[row]), int(first[row] + counts[row]))
            near_ties = exact[mine] >= best.values[row, 0] - doubt[row]
            chosen[row] = self._settle(hidden_states[row], tokens[mine][near_ties])
        return chosen, ~few


class ShortlistHead(Head):
    """Knows for each sentence only the tokens predicted for it: cheap, and approximate.

    Args:
        weight: ``[V, H]``.
        shortlist: predicts them (:class:`sentcompress.modeling.shortlist.Shortlist`).
        tokens: how many a sentence has.
        end: the end mark, which is always one of them.
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
    def bytes_a_sentence(self) -> int:
        return self.table.numel() * self.table.element_size() + self.bytes_read

    def words(self, latents: Tensor) -> list[Words]:
        chosen = self.shortlist.pick(latents, self.table, self.tokens, self.end)
        return [Words(tokens, self.weight[tokens]) for tokens in chosen]

    def logits(self, hidden_states: Tensor, words: Known) -> Tensor:
        logits = hidden_states.new_full((len(words), len(self.weight)), float("-inf"), dtype=torch.float32)
        tokens, known = self._known(hidden_states, words)
        return logits.scatter_(1, tokens, known)

    def argmax(self, hidden_states: Tensor, words: Known, banned: Tensor, token: int) -> Tensor:
        self.picked += len(hidden_states)
        tokens, logits = self._known(hidden_states, words)
        logits[(tokens == token) & banned[:, None]] = float("-inf")
        return self._likeliest(hidden_states, logits, tokens)

    def nats(self, hidden_states: Tensor, words: Words, targets: Tensor) -> Tensor:
        """What text costs that is written with these words: ``[t, H]`` and ``[t]`` tokens to ``[t]``.

        All other tokens share ``MISSED`` of the probability evenly; generation never writes one.
        """
        logits = F.linear(hidden_states, words.weight).float()
        place = (words.tokens == targets[:, None]).float()
        others = len(self.weight) - len(words.tokens)
        inside = place.sum(1) > 0
        own = logits.logsumexp(1) - (logits * place).sum(1) - (math.log1p(-MISSED) if others else 0.0)
        return own.where(inside, own.new_tensor(math.log(max(others, 1) / MISSED)))

    @staticmethod
    def _known(hidden_states: Tensor, words: Known) -> tuple[Tensor, Tensor]:
        """Tokens and logits ``[B, n]``, a row at a time: together their weights would be copied at each step."""
        listed = [known for known in words if known is not None]
        pairs = zip(listed, hidden_states, strict=True)
        logits = torch.stack([known.weight @ hidden_state for known, hidden_state in pairs]).float()
        return torch.stack([known.tokens for known in listed]), logits


def make_head(weight: Tensor, kind: HeadKind) -> Head:
    """The head called ``kind``: ``exact``, ``shortlist-exact``, or ``auto``, which takes the faster where it pays.

    Raises:
        InputError: ``shortlist-exact`` was asked for by name and cannot be had, or ``shortlist``, which needs a model
            that predicts it (:func:`make_shortlist_head`).
    """
    if kind == "shortlist":
        raise InputError(
            "head: 'shortlist' is predicted from what a SentenceLM tells its decoder; here nothing predicts it",
            fix="use exact, shortlist-exact or auto",
        )
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


def make_shortlist_head(model: SentenceLM, tokens: int) -> ShortlistHead:
    """The approximate head of a model that was grafted with one.

    Raises:
        InputError: it was not.
    """
    if model.shortlist is None:
        raise InputError(
            "head: the model predicts no shortlist of tokens",
            fix="graft it with graft.shortlist_rank (64, say), or use exact, shortlist-exact or auto",
        )
    return ShortlistHead(model.vae.output_weight, model.shortlist, tokens, model.config.eos_token_id)
