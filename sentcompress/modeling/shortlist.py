"""Predicts which tokens a sentence may contain, from the latents that condition its decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sentcompress.modeling.losses import LOGITS_BUDGET


class Shortlist(nn.Module):
    """Scores every token of the vocabulary once per sentence, so that the output head computes only the best ones.

    The score of a token is the product of a query, computed from the latents, and a key, computed from the token's row
    of the output head, plus a bias. Rare tokens profit from similar ones through their keys. The shortlist is trained
    with the model, but sends no gradient to it (training clips the gradients of both together).

    Args:
        hidden_size, latents: of the conditioning, ``[k, H]``.
        vocab_size: tokens.
        rank: size of queries and keys.
    """

    def __init__(self, hidden_size: int, latents: int, vocab_size: int, rank: int) -> None:
        super().__init__()
        width = hidden_size * latents
        self.query = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, rank)
        )
        self.keys = nn.Linear(hidden_size, rank, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    @torch.no_grad()
    def start(self, weight: Tensor, counts: Tensor) -> None:
        """Initialize the bias with token frequencies, and keys at unit scale.

        Args:
            weight: ``[V, H]`` of the output head.
            counts: ``[V]``, occurrences in training text.
        """
        self.bias.copy_(((counts + 1) / (counts + 1).sum()).log())
        size = float(weight.float().square().mean().sqrt())
        nn.init.normal_(self.keys.weight, std=1 / (max(size, 1e-6) * weight.shape[1] ** 0.5))

    def table(self, weight: Tensor) -> Tensor:
        """Keys of all tokens: ``[V, H] -> [V, rank]``."""
        return self.keys(weight)

    def scores(self, latents: Tensor, table: Tensor) -> Tensor:
        """``[S, k, H]`` and ``[V, rank]`` to log-probabilities of a sentence's tokens, up to a constant: ``[S, V]``."""
        return torch.addmm(self.bias, self.query(latents.flatten(1)), table.t())

    def loss(self, latents: Tensor, weight: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Nats per token if the tokens were sampled from their sentence's scores alone: a scalar.

        Args:
            latents: ``[S, k, H]``.
            weight: ``[V, H]`` of the output head.
            input_ids, attention_mask: the sentences, ``[S, L]``.
        """
        table = self.table(weight.detach())
        blocks = latents.detach(), input_ids, attention_mask
        rows = max(1, LOGITS_BUDGET // len(weight))
        nats = [
            checkpoint(self._nats, *block, table, use_reentrant=False, preserve_rng_state=False)
            for block in zip(*(x.split(rows) for x in blocks), strict=True)
        ]
        return torch.stack(nats).sum() / attention_mask.sum()

    def _nats(self, latents: Tensor, input_ids: Tensor, attention_mask: Tensor, table: Tensor) -> Tensor:
        scores = self.scores(latents, table).float()
        own = scores.gather(1, input_ids) - scores.logsumexp(1, keepdim=True)
        return -(own * attention_mask).sum()

    @torch.no_grad()
    def pick(self, latents: Tensor, table: Tensor, tokens: int, always: int) -> Tensor:
        """The most likely tokens of each sentence: ``[S, k, H] -> [S, tokens]``, ``always`` first."""
        scores = self.scores(latents, table)
        scores[:, always] = float("inf")
        return scores.topk(min(tokens, scores.shape[1])).indices
