"""Writing one sentence a row from its latents, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sentcompress.generation.heads import Head
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

    @property
    def greedy(self) -> bool:
        """Whether only the largest logit counts."""
        return not self.do_sample and self.penalty is None

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


@dataclass
class Told:
    """Sentences of one text, and what the decoder was told when it wrote (or would have written) each.

    Attributes:
        sentences: tokens of each, end marks left out.
        latents: ``[n, k, H]``; zeros where nothing predicted a sentence.
    """

    sentences: list[list[int]]
    latents: Tensor


class SentenceWriter:
    """Writes one sentence after the other for each of a batch of texts.

    Args:
        vae: the model whose decoder writes.
        head: the output head; None takes the full one.
        use_cache: False runs the decoder over everything again for each token.
    """

    def __init__(
        self, vae: SentenceVAE, sampler: Sampler, *, head: Head | None = None, use_cache: bool = True
    ) -> None:
        self.vae = vae
        self.head = head or Head(vae.output_weight)
        self.decoder = cast(Any, vae.decoder)  # ours, or one of the LLM's own blocks
        self.sampler = sampler
        self.use_cache = use_cache
        self.context: Any = None
        """What a decoder with ``decoder_context`` keeps of the texts so far."""
        self.past: list[Told] = []
        """The same for a decoder that may keep nothing."""

    @torch.no_grad()
    def read(self, texts: Sequence[Told]) -> None:
        """Begin with texts that stand before what is to be written; only a ``decoder_context`` looks at them."""
        if not self.decoder.context:
            return
        tails = [self._tail(text) for text in texts]
        if not self.use_cache:
            self.past = tails
        elif any(tail.sentences for tail in tails):
            embeddings, layout, latents = self._inputs(tails)
            self.context = self.decoder.read(embeddings, layout, latents, len(tails))

    def keep(self, rows: list[int]) -> None:
        """Drop all other texts."""
        if self.context is not None:
            self.context = self.context.keep(
                torch.tensor(rows, dtype=torch.long, device=self.context.filled.device)
            )
        if self.past:
            self.past = [self.past[row] for row in rows]

    @torch.no_grad()
    def write(self, latents: Tensor, plans: Sequence[RowPlan]) -> tuple[list[list[int]], list[bool]]:
        """Write the next sentence of each text.

        Args:
            latents: ``[B, k, H]``.
            plans: one a text.

        Returns:
            the tokens of each sentence, prefix included and end mark left out, and whether the end mark was written.
        """
        vae, device = self.vae, latents.device
        eos = vae.config.eos_token_id
        written: list[list[int]] = [[] for _ in plans]
        ended = [False] * len(plans)
        open_rows = list(range(len(plans)))
        cache: Any = self.decoder.start(latents, self.context) if self.use_cache else None
        current = torch.full((len(plans),), vae.config.bos_token_id, device=device)
        steps = 0
        while open_rows:
            hidden = (
                self.decoder.step(vae.embed_targets(current), cache)
                if cache is not None
                else self.last_hidden(latents, written)
            )
            steps += 1
            # A prefix is known, and a sentence that is over asks for nothing: their logits are not needed.
            asked = [i for i in open_rows if len(written[i]) >= len(plans[i].prefix)]
            chosen = dict(zip(asked, self._pick(hidden, asked, plans, written), strict=True))
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
        if self.decoder.context:
            if cache is not None:
                if steps <= max(map(len, written)):  # one that was cut short: its last token is still unread
                    self.decoder.step(vae.embed_targets(current), cache)
                lengths = torch.tensor([len(tokens) for tokens in written], device=device)
                self.context = self.decoder.finish(cache, lengths)
            else:
                self.past = [self._tail(text) for text in self._with(latents, written)]
        return written, ended

    def _pick(
        self,
        hidden: Tensor,
        rows: list[int],
        plans: Sequence[RowPlan],
        written: Sequence[list[int]],
    ) -> list[int]:
        """The next token of some rows of ``hidden [B, H]``."""
        if not rows:
            return []
        eos = self.vae.config.eos_token_id
        # An empty sentence is no sentence, and one of a given length ends there.
        goes_on = [plans[i].length is not None or not written[i] for i in rows]
        banned = torch.tensor(goes_on, device=hidden.device)
        if len(rows) < len(hidden):
            hidden = hidden[rows]
        if self.sampler.greedy:
            return self.head.argmax(hidden, banned, eos).tolist()
        logits = self.head.logits(hidden)
        logits[banned, eos] = float("-inf")
        return self.sampler.pick(logits, [plans[i].history + written[i] for i in rows]).tolist()

    @torch.no_grad()
    def last_hidden(self, latents: Tensor, written: Sequence[Sequence[int]]) -> Tensor:
        """The decoder's last hidden state of each text with a sentence so far, computed from nothing: ``[B, H]``."""
        texts = self._with(latents, written)
        embeddings, layout, told = self._inputs(texts)
        hidden = self.decoder(embeddings, layout, told)
        ends = torch.tensor([len(text.sentences) for text in texts], device=hidden.device).cumsum(0) - 1
        return hidden[layout.lengths.cumsum(0)[ends] - 1]

    def _with(self, latents: Tensor, written: Sequence[Sequence[int]]) -> list[Told]:
        """The past of each text with one more sentence."""
        new = [Told([list(tokens)], told[None]) for tokens, told in zip(written, latents, strict=True)]
        if not self.past:
            return new
        return [
            Told(a.sentences + b.sentences, torch.cat([a.latents, b.latents]))
            for a, b in zip(self.past, new, strict=True)
        ]

    def _tail(self, text: Told) -> Told:
        """What the next sentence depends on."""
        first = len(text.sentences) - self.decoder.sentences_read([len(ids) for ids in text.sentences])
        return Told(text.sentences[first:], text.latents[first:])

    def _inputs(self, texts: Sequence[Told]) -> tuple[Tensor, Ragged, Tensor]:
        """What the decoder reads of the sentences of all texts: embeddings, layout, latents."""
        latents = torch.cat([text.latents for text in texts])
        sentences = [ids for text in texts for ids in text.sentences]
        streams = [number for number, text in enumerate(texts) for _ in text.sentences]
        layout = Ragged(
            torch.tensor([1 + len(ids) for ids in sentences], device=latents.device),
            torch.tensor(streams, device=latents.device),
        )
        bos = self.vae.config.bos_token_id
        tokens = torch.tensor([token for ids in sentences for token in (bos, *ids)], device=latents.device)
        return self.vae.embed_targets(tokens), layout, latents
