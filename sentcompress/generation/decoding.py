"""Writing one sentence a row from its latents, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sentcompress.generation.settings import GenerationSettings
from sentcompress.modeling.ragged import Ragged
from sentcompress.modeling.vae import SentenceVAE


@dataclass
class RowPlan:
    """What is known about the sentence a row is to write.

    Attributes:
        prefix: tokens it begins with (the unfinished end of a prompt).
        limit: tokens it may have, the prefix included.
        length: exact number of tokens, or None to let the model end it.
        history: tokens before it, for the repetition penalty.
    """

    limit: int
    prefix: Sequence[int] = ()
    length: int | None = None
    history: list[int] = field(default_factory=list)


class Sampler:
    """Picks the next token of each row as the settings say."""

    def __init__(self, settings: GenerationSettings, device: torch.device) -> None:
        self.do_sample = settings.do_sample
        self.generator = torch.Generator(device=device)
        if settings.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(settings.seed)
        self.penalty = (
            RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)
            if settings.repetition_penalty != 1.0
            else None
        )
        self.warpers = LogitsProcessorList()
        if settings.do_sample:
            if settings.temperature != 1.0:
                self.warpers.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_k:
                self.warpers.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1.0:
                self.warpers.append(TopPLogitsWarper(settings.top_p))

    def pick(self, logits: Tensor, histories: list[list[int]]) -> Tensor:
        """``[B, V]`` logits to ``[B]`` tokens; ``histories`` feed the repetition penalty."""
        if self.penalty:
            # Rows are filled up with a token of their own: seeing it twice changes nothing.
            longest = max(1, *(len(h) for h in histories))
            filled = [h + [h[0]] * (longest - len(h)) for h in histories if h]
            rows = [i for i, h in enumerate(histories) if h]
            if rows:
                seen = torch.tensor(filled, device=logits.device)
                logits = logits.index_copy(
                    0, torch.tensor(rows, device=logits.device), self.penalty(seen, logits[rows])
                )
        if not self.do_sample:
            return logits.argmax(-1)
        scores = self.warpers(None, logits)
        return torch.multinomial(scores.softmax(-1), 1, generator=self.generator).squeeze(1)


@torch.no_grad()
def write_sentences(
    vae: SentenceVAE, latents: Tensor, plans: Sequence[RowPlan], sampler: Sampler, *, use_cache: bool = True
) -> tuple[list[list[int]], list[bool]]:
    """Write one sentence a row.

    Args:
        vae: the model whose decoder writes.
        latents: ``[B, k, H]``.
        plans: one a row.
        use_cache: False runs the decoder over the whole sentence again for each token.

    Returns:
        the tokens of each sentence, prefix included and end mark left out, and whether the end mark was written.
    """
    eos, device = vae.config.eos_token_id, latents.device
    written: list[list[int]] = [[] for _ in plans]
    ended = [False] * len(plans)
    open_rows = list(range(len(plans)))
    cache: Any = vae.decoder.start(latents) if use_cache else None
    current = torch.full((len(plans),), vae.config.bos_token_id, device=device)
    while open_rows:
        hidden = (
            vae.decoder.step(vae.embed_targets(current), cache)
            if cache is not None
            else _last_hidden(vae, latents, written)
        )
        # The prefix is known, so its logits are not needed.
        if all(len(written[i]) < len(plans[i].prefix) for i in open_rows):
            chosen = [0] * len(plans)
        else:
            logits = vae.logits(hidden).float()
            for i in open_rows:
                length = plans[i].length
                if length is not None or not written[i]:
                    logits[i, eos] = float("-inf")  # an empty sentence is no sentence
            chosen = sampler.pick(
                logits, [p.history + w for p, w in zip(plans, written, strict=True)]
            ).tolist()
        for i in tuple(open_rows):
            plan, at = plans[i], len(written[i])
            token = plan.prefix[at] if at < len(plan.prefix) else chosen[i]
            if at == plan.length:
                token = eos  # a forced sentence pays for the step of its end mark like any other
            if token == eos and at >= len(plan.prefix):
                ended[i] = True
                open_rows.remove(i)
                continue
            written[i].append(int(token))
            if len(written[i]) >= plan.limit:
                open_rows.remove(i)
        current = torch.tensor([w[-1] if w else eos for w in written], device=device)
    return written, ended


def _last_hidden(vae: SentenceVAE, latents: Tensor, written: list[list[int]]) -> Tensor:
    """The decoder's last hidden state of each row, computed from nothing: ``[B, H]``."""
    rows = [[vae.config.bos_token_id, *tokens] for tokens in written]
    layout = Ragged(torch.tensor([len(row) for row in rows], device=latents.device))
    tokens = torch.tensor([token for row in rows for token in row], device=latents.device)
    hidden = vae.decoder(vae.embed_targets(tokens), layout, latents)
    return hidden[layout.lengths.cumsum(0) - 1]
