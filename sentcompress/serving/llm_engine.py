"""Serving an LLM as it is, with a sentence memory or without: each text has a cache of its own, and they take turns."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sentcompress.contracts.causal_lm import position_limit
from sentcompress.errors import InputError, SentCompressError
from sentcompress.files import checked_text
from sentcompress.generation.sentence_writer import Sampler
from sentcompress.sentence_memory.sentence_cache import SentenceMemory
from sentcompress.serving.cache_state import CacheState, TokenPlaces
from sentcompress.serving.limits import ServeLimits
from sentcompress.serving.scheduler import Begun, EngineFigures, Job, Piece, TokenScore
from sentcompress.serving.sentence_engine import check_length
from sentcompress.text.lossless_tokenizer import TextStream, lossless


@dataclass
class _Text:
    """A text that is being written.

    Attributes:
        cache: the LLM's own, or a sentence memory.
        sampler: picks its tokens.
        stream: decodes them.
        logits: ``[1, V]`` of the next token, in fp32.
        room: tokens that may still be written.
        written: tokens written so far.
        places: of its tokens in the text, if what it recalls is reported.
        recalled: sentences that the last token recalled, as tokens, with the share of the heads.
    """

    cache: Any
    sampler: Sampler
    stream: TextStream
    logits: Tensor
    room: int
    written: int = 0
    places: TokenPlaces | None = None
    recalled: Mapping[tuple[int, int], float] = field(default_factory=dict)


class LLMEngine:
    """Writes texts with an LLM, one token of each in turn. A text gets the tokens that ``generate`` gives it.

    Args:
        model: a causal LM of transformers, in eval mode.
        tokenizer: its tokenizer.
        memory: an empty one, which is copied for each text; None uses the LLM's own cache of all tokens.
        limits: of the server.
    """

    joins_per_step = (
        1  # a prompt takes as long as many steps: the texts that are being written go on in between
    )

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, memory: SentenceMemory | None, limits: ServeLimits
    ) -> None:
        self.model, self.tokenizer, self.memory, self.limits = model, tokenizer, memory, limits
        self.longest = position_limit(model.config) if memory is None else memory.longest_text
        own = model.generation_config.eos_token_id if model.generation_config else None
        self.end_ids = {own} if isinstance(own, int) else {*(own or ())}
        self._last_only = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        )
        self._texts: dict[Job, _Text] = {}
        self._prefixes: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        """Caches that have read a beginning which prompts share; the one used last at the end."""
        self._recalled = 0

    # ---- prompts

    def add(self, jobs: Sequence[Job]) -> list[Begun | Exception]:
        """As :meth:`sentcompress.serving.scheduler.Engine.add`."""
        found: list[Begun | Exception] = []
        for job in jobs:
            try:
                found.append(self._add(job))
            except SentCompressError as error:
                found.append(error)
        return found

    def _add(self, job: Job) -> Begun:
        """Read one prompt. Raises InputError."""
        ids = self._token_ids(job.prompt, job.rendered)
        check_length(len(ids), self.limits)
        if len(ids) >= self.longest:
            raise InputError(
                f"the prompt has {len(ids):,} tokens, but the LLM has {self.longest:,} positions",
                fix="shorten the prompt",
            )
        room = min(job.new_tokens, self.longest - len(ids))
        prompt = (
            job.prompt if isinstance(job.prompt, str) else lossless(self.tokenizer).decode(ids, begins=True)
        )
        scores: list[TokenScore] = []
        if job.echo and job.logprobs is not None:
            known = 0
            cache, logits = self._forward(self._empty(), ids)  # a memory is in effect from the first token on
            scores = self._prompt_scores(ids, logits[0], job.logprobs)
        else:
            cache, read, known = self._with_prefix(job, ids)
            cache, logits = self._read(cache, ids, read, longest=len(ids) + room)
        sampler, stream = Sampler(job.settings, self.model.device), lossless(self.tokenizer).streamed()
        text = self._texts[job] = _Text(cache, sampler, stream, logits[:, -1].float(), room)
        if job.reports_cache:
            encoded = not job.rendered if isinstance(job.prompt, str) else None
            text.places = TokenPlaces(self.tokenizer, prompt, ids, encoded)
        return Begun(len(ids), known, prompt, scores, _cache_state(text))

    def _token_ids(self, prompt: str | list[int], rendered: bool) -> list[int]:
        """Token ids of a prompt. Raises InputError for an empty one, and for tokens that the LLM does not have."""
        if isinstance(prompt, str):
            if not checked_text(prompt, "the prompt").strip():
                raise InputError("the prompt is empty", fix="give some text to continue")
            ids: list[int] = self.tokenizer(prompt, add_special_tokens=not rendered)["input_ids"]
        else:
            ids, known = prompt, len(self.model.get_input_embeddings().weight)
            if wrong := [token for token in ids if not 0 <= token < known]:
                raise InputError(
                    f"the prompt has a token {wrong[0]}, but the LLM knows {known:,}, from 0",
                    fix="encode it with the tokenizer of this LLM",
                )
        if not ids:
            raise InputError("the prompt is empty", fix="give some text to continue")
        return ids

    def _with_prefix(self, job: Job, ids: list[int]) -> tuple[Any, int, int]:
        """The cache for a prompt. The beginning that it shares with others is read by itself, and once.

        Returns:
            the cache, the tokens that it has read, and how many of them it had read for an earlier prompt.
        """
        prefix = self._token_ids(job.prefix, True) if job.prefix else []
        if not prefix or len(prefix) >= len(ids) or ids[: len(prefix)] != prefix:
            return self._empty(), 0, 0
        key = tuple(prefix)
        known = len(prefix) if key in self._prefixes else 0
        cache = self._prefixes.pop(key) if known else self._read(self._empty(), prefix, 0)[0]
        self._prefixes[key] = cache
        while sum(sum(_held(kept)[:2]) for kept in self._prefixes.values()) > self.limits.prompt_cache_bytes:
            self._prefixes.popitem(last=False)
        own = cache.copy() if isinstance(cache, SentenceMemory) else copy.deepcopy(cache)
        return own, len(prefix), known

    def _empty(self) -> SentenceMemory | None:
        return copy.deepcopy(self.memory)

    def _read(self, cache: Any, ids: list[int], read: int, *, longest: int = 0) -> tuple[Any, Tensor]:
        """Read a prompt as ``generate`` does.

        Args:
            cache: a memory, or the LLM's own; None for a new one.
            read: tokens that it has read before.
            longest: tokens that prompt and output may have.

        Returns:
            the cache, and the logits ``[1, 1, V]`` of the next token.
        """
        reading: Any = nullcontext()
        if isinstance(cache, SentenceMemory):
            prompt = torch.tensor([ids], device=self.model.device)
            reading = cache.reading_prompt(prompt, None, whole=True, longest=max(longest, len(ids)))
        with reading:
            return self._forward(cache, ids[read:], **self._last_only)

    def _forward(self, cache: Any, ids: list[int], **more: Any) -> tuple[Any, Tensor]:
        input_ids = torch.tensor([ids], device=self.model.device)
        output = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, **more)
        return output.past_key_values, output.logits

    # ---- new tokens

    def step(self) -> Iterator[tuple[Job, Piece]]:
        """As :meth:`sentcompress.serving.scheduler.Engine.step`."""
        for job, text in [*self._texts.items()]:
            piece = self._next(job, text)
            if piece.finish_reason:
                del self._texts[job]
            yield job, piece

    def _next(self, job: Job, text: _Text) -> Piece:
        """One more token of a text."""
        if not text.room:
            return Piece("", 0, "length")
        token = int(text.sampler.pick(text.logits, [[]]))
        if token in self.end_ids:
            return Piece(text.stream.add([], ends=True), text.written, "stop", cache=_cache_state(text))
        scores = [] if job.logprobs is None else [self._score(token, text.logits[0], job.logprobs)]
        text.written += 1
        ends = text.written == text.room
        new = text.stream.add([token], ends=ends)
        if text.places is not None:
            text.places.add(new)
        if not ends:
            text.cache, logits = self._forward(text.cache, [token], **self._last_only)
            text.logits = logits[:, -1].float()
            if isinstance(text.cache, SentenceMemory):
                text.recalled = text.cache.recall_shares()[0]
                self._recalled += len(text.recalled)
        return Piece(new, text.written, "length" if ends else None, scores, _cache_state(text))

    def _score(self, token: int, logits: Tensor, number: int) -> TokenScore:
        """The log probability of a token, given the logits ``[V]`` in its place."""
        scores = logits.float().log_softmax(-1)
        best = scores.topk(number)
        spelt = lossless(self.tokenizer).to_bytes
        top = [(spelt([i]), p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        return TokenScore(spelt([token]), float(scores[token]), top)

    def _prompt_scores(self, ids: list[int], logits: Tensor, number: int) -> list[TokenScore]:
        """The log probabilities of a prompt's tokens, given the logits ``[T, V]`` behind each."""
        first = TokenScore(lossless(self.tokenizer).to_bytes(ids[:1]), None, [])
        return [first, *(self._score(*pair, number) for pair in zip(ids[1:], logits, strict=False))]

    # ---- what it holds

    def drop(self, job: Job) -> None:
        """As :meth:`sentcompress.serving.scheduler.Engine.drop`."""
        self._texts.pop(job, None)

    def reset(self) -> None:
        """As :meth:`sentcompress.serving.scheduler.Engine.reset`."""
        self._texts.clear()
        self._prefixes.clear()

    def figures(self) -> EngineFigures:
        """As :meth:`sentcompress.serving.scheduler.Engine.figures`."""
        caches = [*(text.cache for text in self._texts.values()), *self._prefixes.values()]
        device = host = full = 0
        for cache in caches:
            held = _held(cache)
            device, host, full = device + held[0], host + held[1], full + held[2]
        recalls = self.memory is not None and self.memory.policy.recall
        return EngineFigures(device, host, full, self._recalled if recalls else None)


def _held(cache: Any) -> tuple[int, int, int]:
    """Bytes of a cache on the device and in slow storage, and what the LLM's own would hold of the same tokens."""
    if isinstance(cache, SentenceMemory):
        return cache.device_bytes(), cache.storage_bytes(), cache.full_bytes()
    states = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    held = sum(tensor.nbytes for tensor in states if isinstance(tensor, Tensor))
    return held, 0, held


def _cache_state(text: _Text) -> CacheState | None:
    """What a text's cache holds, if that is reported."""
    if text.places is None:
        return None
    recalled = {text.places.span(*tokens): share for tokens, share in text.recalled.items()}
    return CacheState(*_held(text.cache), recalled)
