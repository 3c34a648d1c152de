"""Decodes sentences from their latents, token by token, for a batch of texts."""

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

from sentcompress.generation.compiled import CompiledStep
from sentcompress.generation.conditioned_text import ConditionedText, last_hidden_states, read_context
from sentcompress.generation.output_head import CandidateTokens, OutputHead
from sentcompress.generation.settings import GenerationSettings
from sentcompress.modeling.vae import SentenceVAE


@dataclass
class SentencePlan:
    """What is fixed about a sentence before it is decoded.

    Attributes:
        max_tokens: its limit, the prefix included.
        prefix: tokens it begins with (the unfinished end of a prompt).
        exact_tokens: number of tokens; None lets the model end it.
        history: tokens before it, for the repetition penalty.
        sampler: picks its tokens; None takes the most likely ones.
    """

    max_tokens: int
    prefix: Sequence[int] = ()
    exact_tokens: int | None = None
    history: list[int] = field(default_factory=list)
    sampler: Sampler | None = None

    @property
    def greedy(self) -> bool:
        """Whether every token is the one with the largest logit."""
        return self.sampler is None or self.sampler.greedy


class Sampler:
    """Picks the next token of each text as the settings say."""

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
        """Whether it always picks the largest logit."""
        return not self.do_sample and self.penalty is None

    def pick(self, logits: Tensor, histories: list[list[int]]) -> Tensor:
        """``[B, V]`` logits to ``[B]`` tokens; the repetition penalty applies to the tokens in ``histories``."""
        if self.penalty:
            # Padded with a token that is already in the history: repeating it changes nothing.
            longest = max(1, *(len(h) for h in histories))
            padded = [h + [h[0]] * (longest - len(h)) for h in histories if h]
            rows = [i for i, h in enumerate(histories) if h]
            if rows:
                seen = torch.tensor(padded, device=logits.device)
                logits = logits.index_copy(
                    0, torch.tensor(rows, device=logits.device), self.penalty(seen, logits[rows])
                )
        if not self.do_sample:
            return logits.argmax(-1)
        scores = self.warpers(None, logits)
        return torch.multinomial(scores.softmax(-1), 1, generator=self.generator).squeeze(1)


@dataclass
class FinishedSentence:
    """A decoded sentence.

    Attributes:
        row: the text it belongs to.
        tokens: with the prefix, without the end mark.
    """

    row: int
    tokens: list[int]


@dataclass
class _OpenSentence:
    """A sentence being decoded."""

    plan: SentencePlan
    latents: Tensor
    unread_latents: int
    """Latents the decoder has not read yet."""
    candidates: CandidateTokens | None
    """The tokens it may contain; None allows all."""
    tokens: list[int] = field(default_factory=list)
    at_limit: bool = False
    """No token may follow, but the decoder still has to read the last one for the next sentences."""


class SentenceWriter:
    """Decodes one sentence per text, token by token; the texts need not be at the same token.

    Args:
        vae: the model with the decoder.
        head: the output head; None computes every logit.
        use_cache: False runs the decoder over everything again for each token.
        compiled: the compiled decoder step, for ``use_cache``; None runs it uncompiled.
    """

    def __init__(
        self,
        vae: SentenceVAE,
        *,
        head: OutputHead | None = None,
        use_cache: bool = True,
        compiled: CompiledStep | None = None,
    ) -> None:
        self.vae = vae
        self.head = head or OutputHead(vae.output_weight)
        self.decoder = cast(Any, vae.decoder)  # ours, or one of the LLM's own blocks
        self.use_cache = use_cache
        self.compiled = compiled
        self.cache: Any = None
        self.sentences: list[_OpenSentence | None] = []
        """The sentence of each text; None where none is open."""
        self.next_input_ids: list[int] = []
        """The token each text reads next."""
        self.past_texts: list[ConditionedText] = []
        """Without a cache: the sentences of each text within reach of ``decoder_context``."""

    @property
    def busy(self) -> bool:
        """Whether any sentence is open."""
        return any(sentence is not None for sentence in self.sentences)

    @torch.no_grad()
    def read(self, texts: Sequence[ConditionedText]) -> None:
        """Begin with the texts to continue; only a decoder with ``decoder_context`` looks at their sentences."""
        self.sentences = [None] * len(texts)
        self.next_input_ids = [self.vae.config.bos_token_id] * len(texts)
        context = None
        if self.decoder.context:
            self.past_texts = [text.within_reach(self.decoder) for text in texts]
            if self.use_cache and any(text.sentences for text in self.past_texts):
                context = read_context(self.vae, self.past_texts)
        if self.use_cache:
            self.past_texts = []
            self.cache = self.decoder.allocate(len(texts), texts[0].latents, context)
            if self.compiled is not None:
                self.compiled.mark_static(self.cache)

    def keep(self, rows: list[int]) -> None:
        """Drop all other texts."""
        self.sentences = [self.sentences[row] for row in rows]
        self.next_input_ids = [self.next_input_ids[row] for row in rows]
        self.past_texts = [self.past_texts[row] for row in rows] if self.past_texts else []
        if self.cache is not None:
            self.decoder.keep(self.cache, torch.tensor(rows, device=self.vae.device))
            if self.compiled is not None:
                self.compiled.mark_static(self.cache)

    def join(self, other: SentenceWriter) -> None:
        """Add the texts of another writer, which has not begun a sentence yet, as the last rows."""
        self.sentences += other.sentences
        self.next_input_ids += other.next_input_ids
        self.past_texts += other.past_texts
        if self.cache is not None:
            self.decoder.join(self.cache, other.cache)
            if self.compiled is not None:
                self.compiled.mark_static(self.cache)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the decoder's keys and values."""
        layers = [] if self.cache is None else self.cache.layers
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    @torch.no_grad()
    def begin(self, rows: Sequence[int], latents: Tensor, plans: Sequence[SentencePlan]) -> None:
        """Open a sentence in some texts.

        Args:
            rows: indices of texts without an open sentence.
            latents: ``[b, k, H]`` that condition them.
            plans: one per sentence.
        """
        unread_latents = 0
        if self.use_cache:
            unread_latents = self.decoder.restart(
                self.cache, torch.tensor(rows, device=latents.device), latents
            )
        candidates = self.head.candidates(latents)
        for row, latent, plan, allowed in zip(rows, latents, plans, candidates, strict=True):
            self.sentences[row] = _OpenSentence(plan, latent, unread_latents, allowed)
            self.next_input_ids[row] = self.vae.config.bos_token_id

    @torch.no_grad()
    def step(self) -> list[FinishedSentence]:
        """Decode one more token of every open sentence; return the sentences that this finishes."""
        rows = [row for row, sentence in enumerate(self.sentences) if sentence is not None]
        hidden_states = self._hidden_states(rows)
        finished: list[FinishedSentence] = []
        ready: list[int] = []
        for row in rows:
            sentence = self.sentences[row]
            assert sentence is not None
            if sentence.unread_latents:
                sentence.unread_latents -= 1
            elif sentence.at_limit:
                finished.append(FinishedSentence(row, sentence.tokens))
            elif len(sentence.tokens) < len(sentence.plan.prefix):
                self._append(row, sentence.plan.prefix[len(sentence.tokens)], finished)
            else:
                ready.append(row)
        for row, token in zip(ready, self._next_tokens(hidden_states, rows, ready), strict=True):
            self._append(row, token, finished)
        if finished:
            self._close(finished)
        return finished

    @torch.no_grad()
    def write(self, latents: Tensor, plans: Sequence[SentencePlan]) -> list[FinishedSentence]:
        """Decode one sentence for each of ``latents [B, k, H]``, without context, and return them in order."""
        self.read([ConditionedText([], latents[:0]) for _ in plans])
        self.begin(range(len(plans)), latents, plans)
        finished: list[FinishedSentence] = []
        while self.busy:
            finished += self.step()
        return sorted(finished, key=lambda sentence: sentence.row)

    def _hidden_states(self, rows: list[int]) -> Tensor:
        """The decoder's hidden states ``[b, H]`` of the texts ``rows``, each after its last token."""
        if not self.use_cache:
            sentences = [cast(_OpenSentence, self.sentences[row]) for row in rows]
            latents = torch.stack([sentence.latents for sentence in sentences])
            return self.last_hidden(latents, [sentence.tokens for sentence in sentences], rows)
        device = self.vae.device
        index = torch.tensor(rows, device=device) if len(rows) < len(self.sentences) else None
        if self.compiled is not None:
            input_ids = torch.tensor(self.next_input_ids, device=device)
            hidden_states = self.compiled.step(self.vae.embed_targets(input_ids), self.cache, index)
            return hidden_states if index is None else hidden_states[index]
        input_ids = torch.tensor([self.next_input_ids[row] for row in rows], device=device)
        return self.decoder.step(self.vae.embed_targets(input_ids), self.cache, index)

    def _next_tokens(self, hidden_states: Tensor, rows: list[int], ready: list[int]) -> list[int]:
        """The next tokens of the texts ``ready``, given the hidden states of the texts ``rows``."""
        if not ready:
            return []
        config = self.vae.config
        if len(ready) < len(rows):
            index = {row: i for i, row in enumerate(rows)}
            hidden_states = hidden_states[[index[row] for row in ready]]
        sentences = [cast(_OpenSentence, self.sentences[row]) for row in ready]
        # A sentence must not be empty, and one of a given length must not end earlier.
        no_end = [s.plan.exact_tokens is not None or not s.tokens for s in sentences]
        banned = torch.tensor(no_end, device=hidden_states.device)
        candidates = [s.candidates for s in sentences]
        greedy = [n for n, s in enumerate(sentences) if s.plan.greedy]
        sampled: dict[Sampler, list[int]] = {}
        for n, s in enumerate(sentences):
            if s.plan.sampler is not None and not s.plan.greedy:
                sampled.setdefault(s.plan.sampler, []).append(n)
        picked = [0] * len(ready)

        def chosen(numbers: list[int]) -> tuple[Tensor, list[CandidateTokens | None], Tensor]:
            if len(numbers) == len(ready):
                return hidden_states, candidates, banned
            return hidden_states[numbers], [candidates[n] for n in numbers], banned[numbers]

        if greedy:
            tokens = self.head.argmax(*chosen(greedy), config.eos_token_id).tolist()
            for n, token in zip(greedy, tokens, strict=True):
                picked[n] = token
        for sampler, numbers in sampled.items():
            states, allowed, no_end_yet = chosen(numbers)
            logits = self.head.logits(states, allowed)
            logits[no_end_yet, config.eos_token_id] = float("-inf")
            histories = [sentences[n].plan.history + sentences[n].tokens for n in numbers]
            for n, token in zip(numbers, sampler.pick(logits, histories).tolist(), strict=True):
                picked[n] = token
        # A sentence of a given length also takes the step of its end mark.
        return [
            config.eos_token_id if len(s.tokens) == s.plan.exact_tokens else token
            for s, token in zip(sentences, picked, strict=True)
        ]

    def _append(self, row: int, token: int, finished: list[FinishedSentence]) -> None:
        """Add a token to the open sentence of a text."""
        sentence = cast(_OpenSentence, self.sentences[row])
        plan, tokens = sentence.plan, sentence.tokens
        if token == self.vae.config.eos_token_id and len(tokens) >= len(plan.prefix):
            finished.append(FinishedSentence(row, tokens))
            return
        tokens.append(token)
        self.next_input_ids[row] = token
        if len(tokens) >= plan.max_tokens:
            if self.decoder.context and self.use_cache:
                sentence.at_limit = True
            else:
                finished.append(FinishedSentence(row, tokens))

    def _close(self, finished: list[FinishedSentence]) -> None:
        """Move finished sentences into the past of their texts."""
        rows = [each.row for each in finished]
        if self.decoder.context and self.use_cache:
            lengths = [len(each.tokens) for each in finished]
            device = self.vae.device
            self.decoder.retire(
                self.cache, torch.tensor(rows, device=device), torch.tensor(lengths, device=device)
            )
        for each in finished:
            sentence = cast(_OpenSentence, self.sentences[each.row])
            if self.past_texts:
                text = self.past_texts[each.row]
                self.past_texts[each.row] = text.followed_by(each.tokens, sentence.latents).within_reach(
                    self.decoder
                )
            self.sentences[each.row] = None

    @torch.no_grad()
    def last_hidden(
        self, latents: Tensor, written: Sequence[Sequence[int]], rows: Sequence[int] | None = None
    ) -> Tensor:
        """The decoder's last hidden state of each open sentence, computed without a cache: ``[b, H]``.

        Args:
            latents: ``[b, k, H]`` that condition the sentences.
            written: their tokens so far.
            rows: the texts they belong to; None: all, in order.
        """
        numbers = range(len(written)) if rows is None else rows
        empty = ConditionedText([], latents[:0])
        past = [self.past_texts[row] if self.past_texts else empty for row in numbers]
        triples = zip(past, written, latents, strict=True)
        return last_hidden_states(self.vae, [text.followed_by(ids, latent) for text, ids, latent in triples])
