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

from sentcompress.generation.compiled import CompiledStep
from sentcompress.generation.output_head import Head, Words
from sentcompress.generation.settings import GenerationSettings
from sentcompress.modeling.decoder import DecoderContext
from sentcompress.modeling.layers import Ragged
from sentcompress.modeling.vae import SentenceVAE

READ_AT_A_TIME = 64
"""Texts whose last sentences are read together; bounds memory for large batches."""


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


@dataclass
class Written:
    """A sentence that is done.

    Attributes:
        row: the text it belongs to.
        tokens: with the prefix, without the end mark.
        ended: whether the end mark was written; else it reached its limit.
    """

    row: int
    tokens: list[int]
    ended: bool


@dataclass
class _Sentence:
    """A sentence being written."""

    plan: RowPlan
    latents: Tensor
    unread: int
    """Latents the decoder has still to read."""
    words: Words | None
    """What the output head knows of it."""
    tokens: list[int] = field(default_factory=list)
    full: bool = False
    """Its limit is reached; its last token is still to be read, for the sentences after it."""


class SentenceWriter:
    """Writes sentences for a batch of texts, token by token, each text at a place of its own in its sentence.

    Args:
        vae: the model whose decoder writes.
        head: the output head; None takes the full one.
        use_cache: False runs the decoder over everything again for each token.
        compiled: takes the decoder's steps, with ``use_cache``; None: they are not compiled.
    """

    def __init__(
        self,
        vae: SentenceVAE,
        sampler: Sampler,
        *,
        head: Head | None = None,
        use_cache: bool = True,
        compiled: CompiledStep | None = None,
    ) -> None:
        self.vae = vae
        self.head = head or Head(vae.output_weight)
        self.decoder = cast(Any, vae.decoder)  # ours, or one of the LLM's own blocks
        self.sampler = sampler
        self.use_cache = use_cache
        self.compiled = compiled
        self.cache: Any = None
        self.open: list[_Sentence | None] = []
        """What each text's sentence is at; None where none is being written."""
        self.feed: list[int] = []
        """The token each row reads next."""
        self.past: list[Told] = []
        """Without a cache: what a ``decoder_context`` sees of each text."""

    @property
    def busy(self) -> bool:
        """Whether any sentence is being written."""
        return any(sentence is not None for sentence in self.open)

    @torch.no_grad()
    def read(self, texts: Sequence[Told]) -> None:
        """Begin with texts that stand before what is to be written; only a ``decoder_context`` looks at them."""
        self.open = [None] * len(texts)
        self.feed = [self.vae.config.bos_token_id] * len(texts)
        context = None
        if self.decoder.context:
            tails = [self._tail(text) for text in texts]
            self.past = tails
            if self.use_cache and any(tail.sentences for tail in tails):
                context = self._context(tails)
        if self.use_cache:
            self.past = []
            self.cache = self.decoder.allocate(len(texts), texts[0].latents, context)
            if self.compiled is not None:
                self.compiled.settle(self.cache)

    def _context(self, tails: Sequence[Told]) -> DecoderContext:
        """What the decoder keeps of texts: equal ones are read once, and a few together, to bound memory."""
        different: list[Told] = []
        known: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        places = [0] * len(tails)
        # A text without a sentence comes first, as it cannot be read alone.
        for row in sorted(range(len(tails)), key=lambda row: len(tails[row].sentences)):
            tail = tails[row]
            alike = known.setdefault(tuple(map(tuple, tail.sentences)), [])
            place = next((n for n in alike if torch.equal(different[n].latents, tail.latents)), None)
            if place is None:
                place = len(different)
                alike.append(place)
                different.append(tail)
            places[row] = place
        parts = []
        for begin in range(0, len(different), READ_AT_A_TIME):
            block = different[begin : begin + READ_AT_A_TIME]
            embeddings, layout, latents = self._inputs(block)
            parts.append(self.decoder.read(embeddings, layout, latents, len(block)))
        return DecoderContext.joined(parts, torch.tensor(places, device=self.vae.device))

    def keep(self, rows: list[int]) -> None:
        """Drop all other texts."""
        self.open, self.feed = [self.open[row] for row in rows], [self.feed[row] for row in rows]
        self.past = [self.past[row] for row in rows] if self.past else []
        if self.cache is not None:
            self.decoder.keep(self.cache, torch.tensor(rows, device=self.vae.device))
            if self.compiled is not None:
                self.compiled.settle(self.cache)

    @torch.no_grad()
    def begin(self, rows: Sequence[int], latents: Tensor, plans: Sequence[RowPlan]) -> None:
        """Begin a sentence in some texts.

        Args:
            rows: numbers of texts in which none is being written.
            latents: ``[b, k, H]``.
        """
        unread = 0
        if self.use_cache:
            unread = self.decoder.restart(self.cache, torch.tensor(rows, device=latents.device), latents)
        words = self.head.words(latents)
        for row, told, plan, known in zip(rows, latents, plans, words, strict=True):
            self.open[row] = _Sentence(plan, told, unread, known)
            self.feed[row] = self.vae.config.bos_token_id

    @torch.no_grad()
    def step(self) -> list[Written]:
        """One more token in every open sentence; return those that are done with it."""
        rows = [row for row, sentence in enumerate(self.open) if sentence is not None]
        hidden = self._step(rows)
        done: list[Written] = []
        asked: list[int] = []
        for row in rows:
            sentence = self.open[row]
            assert sentence is not None
            if sentence.unread:
                sentence.unread -= 1
            elif sentence.full:
                done.append(Written(row, sentence.tokens, ended=False))
            elif len(sentence.tokens) < len(sentence.plan.prefix):
                self._put(row, sentence.plan.prefix[len(sentence.tokens)], done)
            else:
                asked.append(row)
        for row, token in zip(asked, self._pick(hidden, rows, asked), strict=True):
            self._put(row, token, done)
        if done:
            self._close(done)
        return done

    @torch.no_grad()
    def write(self, latents: Tensor, plans: Sequence[RowPlan]) -> list[Written]:
        """Write one sentence for each of ``latents [B, k, H]``, with nothing before them, in their order."""
        self.read([Told([], told[None][:0]) for told in latents])
        self.begin(range(len(plans)), latents, plans)
        done: list[Written] = []
        while self.busy:
            done += self.step()
        return sorted(done, key=lambda written: written.row)

    def _step(self, rows: list[int]) -> Tensor:
        """Hidden states ``[b, H]`` of the texts ``rows``."""
        if not self.use_cache:
            sentences = [cast(_Sentence, self.open[row]) for row in rows]
            latents = torch.stack([sentence.latents for sentence in sentences])
            return self.last_hidden(latents, [sentence.tokens for sentence in sentences], rows)
        device = self.vae.device
        some = torch.tensor(rows, device=device) if len(rows) < len(self.open) else None
        if self.compiled is not None:
            every = self.vae.embed_targets(torch.tensor(self.feed, device=device))
            hidden = self.compiled.step(every, self.cache, some)
            return hidden if some is None else hidden[some]
        feed = torch.tensor([self.feed[row] for row in rows], device=device)
        return self.decoder.step(self.vae.embed_targets(feed), self.cache, some)

    def _pick(self, hidden: Tensor, rows: list[int], asked: list[int]) -> list[int]:
        """The next token of the texts ``asked``."""
        if not asked:
            return []
        config = self.vae.config
        if len(asked) < len(rows):
            place = {row: i for i, row in enumerate(rows)}
            hidden = hidden[[place[row] for row in asked]]
        sentences = [cast(_Sentence, self.open[row]) for row in asked]
        # An empty sentence is no sentence, and one of a given length ends there.
        goes_on = [s.plan.length is not None or not s.tokens for s in sentences]
        banned = torch.tensor(goes_on, device=hidden.device)
        words = [s.words for s in sentences]
        if self.sampler.greedy:
            picked = self.head.argmax(hidden, words, banned, config.eos_token_id).tolist()
        else:
            logits = self.head.logits(hidden, words)
            logits[banned, config.eos_token_id] = float("-inf")
            picked = self.sampler.pick(logits, [s.plan.history + s.tokens for s in sentences]).tolist()
        # A forced sentence pays for the step of its end mark like any other.
        return [
            config.eos_token_id if len(s.tokens) == s.plan.length else token
            for s, token in zip(sentences, picked, strict=True)
        ]

    def _put(self, row: int, token: int, done: list[Written]) -> None:
        """Book the next token of a text."""
        sentence = cast(_Sentence, self.open[row])
        plan, tokens = sentence.plan, sentence.tokens
        if token == self.vae.config.eos_token_id and len(tokens) >= len(plan.prefix):
            done.append(Written(row, tokens, ended=True))
            return
        tokens.append(token)
        self.feed[row] = token
        if len(tokens) >= plan.limit:
            if self.decoder.context and self.use_cache:
                sentence.full = True
            else:
                done.append(Written(row, tokens, ended=False))

    def _close(self, done: list[Written]) -> None:
        """Let sentences become the past of their texts."""
        rows = [written.row for written in done]
        if self.decoder.context and self.use_cache:
            lengths = [len(written.tokens) for written in done]
            device = self.vae.device
            self.decoder.retire(
                self.cache, torch.tensor(rows, device=device), torch.tensor(lengths, device=device)
            )
        for written in done:
            sentence = cast(_Sentence, self.open[written.row])
            if self.past:
                text = self.past[written.row]
                self.past[written.row] = self._tail(_with(text, written.tokens, sentence.latents))
            self.open[written.row] = None

    @torch.no_grad()
    def last_hidden(
        self, latents: Tensor, written: Sequence[Sequence[int]], rows: Sequence[int] | None = None
    ) -> Tensor:
        """The decoder's last hidden state of texts with a sentence so far, computed from nothing: ``[b, H]``.

        Args:
            latents: ``[b, k, H]``, what each sentence is told.
            written: its tokens so far.
            rows: the texts they stand in; None: all, in order.
        """
        numbers = range(len(written)) if rows is None else rows
        nothing = Told([], latents[:0])
        past = [self.past[row] if self.past else nothing for row in numbers]
        texts = [_with(text, tokens, told) for text, tokens, told in zip(past, written, latents, strict=True)]
        embeddings, layout, told = self._inputs(texts)
        hidden = self.decoder(embeddings, layout, told)
        ends = torch.tensor([len(text.sentences) for text in texts], device=hidden.device).cumsum(0) - 1
        return hidden[layout.lengths.cumsum(0)[ends] - 1]

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


def _with(text: Told, tokens: Sequence[int], latents: Tensor) -> Told:
    """A text with one more sentence, told ``[k, H]``."""
    return Told([*text.sentences, list(tokens)], torch.cat([text.latents, latents[None]]))
