"""Serving an LLM as it is, with a sentence memory or without: requests join its batch at the next step."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sentcompress.contracts.causal_lm import position_limit
from sentcompress.errors import InputError, NumericsError, SentCompressError
from sentcompress.files import checked_text
from sentcompress.generation.sentence_writer import Sampler
from sentcompress.sentence_memory.sentence_cache import SentenceMemory
from sentcompress.serving.cache_state import CacheState, TokenPlaces
from sentcompress.serving.limits import ServeLimits
from sentcompress.serving.llm_rows import OneRow, cache_bytes, is_padded, rows_of, side_by_side
from sentcompress.serving.scheduler import Begun, EngineFigures, Job, Piece, TokenScore
from sentcompress.serving.sentence_engine import check_length
from sentcompress.text.lossless_tokenizer import TextStream, lossless

READ_TOGETHER = 2048
"""Characters of prompts that are read in one call, as if all were as long as the longest."""


@dataclass(frozen=True)
class _Prompt:
    """A prompt to read.

    Attributes:
        ids: its tokens.
        room: tokens that may be written after it.
    """

    job: Job
    ids: list[int]
    room: int

    @property
    def scored(self) -> bool:
        """Its tokens get log probabilities too."""
        return self.job.echo and self.job.logprobs is not None


@dataclass(eq=False)
class _Text:
    """A text that is being written.

    Attributes:
        job: which text it is.
        sampler: picks its tokens.
        stream: decodes them.
        logits: ``[1, V]`` of the next token, in fp32.
        length: tokens that the LLM has read of it.
        room: tokens that may still be written.
        written: tokens written so far.
        places: of its tokens in the text, if what it recalls is reported.
        recalled: sentences that the last token recalled, as tokens, with the share of the heads, if that is reported.
    """

    job: Job
    sampler: Sampler
    stream: TextStream
    logits: Tensor
    length: int
    room: int
    written: int = 0
    places: TokenPlaces | None = None
    recalled: Mapping[tuple[int, int], float] = field(default_factory=dict)


@dataclass
class _Batch:
    """Texts that the LLM writes in one call, and their caches."""

    rows: OneRow
    texts: list[_Text]

    def keep(self, texts: list[_Text]) -> None:
        """Let the other texts leave."""
        if 0 < len(texts) < len(self.texts):
            self.rows.select([row for row, text in enumerate(self.texts) if text in texts])
        self.texts = texts


class _Prefixes:
    """Caches that have read a beginning which prompts share; they stay as they are.

    Args:
        max_bytes: of all that is kept; those used least recently go.

    Attributes:
        nbytes: of what is kept, as :func:`cache_bytes`. Counted as they come and go: the engine asks at each step.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = (0, 0, 0)
        self._kept: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        """The one used last at the end."""

    def find(self, ids: list[int]) -> Any:
        """The cache that has read these tokens; None if there is none."""
        key = tuple(ids)
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def keep(self, ids: list[int], cache: Any) -> None:
        """Keep a cache that has read tokens which no other has read."""
        self._kept[tuple(ids)] = cache
        self._count(cache, 1)
        while sum(self.nbytes[:2]) > self.max_bytes:
            self._count(self._kept.popitem(last=False)[1], -1)

    def _count(self, cache: Any, sign: int) -> None:
        device, host, full = self.nbytes
        more = cache_bytes(cache)
        self.nbytes = device + sign * more[0], host + sign * more[1], full + sign * more[2]


class LLMEngine:
    """Writes texts with an LLM, in one batch. A text gets the tokens that ``generate`` gives it.

    Texts that cannot stand side by side, such as those of recurrent LLMs, have a batch each.

    Args:
        model: a causal LM of transformers, in eval mode.
        tokenizer: its tokenizer.
        memory: an empty one, which is copied for each text; None uses the LLM's own cache of all tokens.
        limits: of the server.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, memory: SentenceMemory | None, limits: ServeLimits
    ) -> None:
        self.model, self.tokenizer, self.memory, self.limits = model, tokenizer, memory, limits
        self.longest = position_limit(model.config) if memory is None else memory.longest_text
        own = model.generation_config.eos_token_id if model.generation_config else None
        self.end_ids = {own} if isinstance(own, int) else {*(own or ())}
        takes = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._positions = "position_ids" in takes
        self._pads: bool | None = (memory is not None or None) if side_by_side(model) else False
        """Texts can stand side by side. None: the LLM's own cache says so, when the first prompt was read."""
        self._batches: list[_Batch] = []
        self._prefixes = _Prefixes(limits.prompt_cache_bytes)
        self._recalled = 0

    # ---- prompts

    def joining(self, waiting: Sequence[Job]) -> int:
        """As :meth:`sentcompress.serving.scheduler.Engine.joining`.

        Short prompts are read together. A long one takes as long as many steps, so texts that are being written go on
        before the next is read.
        """
        number = longest = 0
        for job in waiting:
            longest = max(longest, len(job.prompt))
            if number and (not self._pads or (number + 1) * longest > READ_TOGETHER):
                break
            number += 1
        return number

    def add(self, jobs: Sequence[Job]) -> list[Begun | Exception]:
        """As :meth:`sentcompress.serving.scheduler.Engine.add`."""
        found: dict[Job, Begun | Exception] = {}
        together: list[_Prompt] = []
        groups: list[list[_Prompt]] = [together]
        for job in jobs:
            try:
                prompt = self._prompt(job)
            except SentCompressError as error:
                found[job] = error
                continue
            if self._pads and not job.prefix and not prompt.scored and self._in_full(prompt):
                together.append(prompt)
            else:
                groups.append([prompt])
        for group in filter(None, groups):
            try:
                found |= self._begin(group)
            except SentCompressError as error:
                found |= {prompt.job: error for prompt in group}
        return [found[job] for job in jobs]

    def _prompt(self, job: Job) -> _Prompt:
        """The prompt of a job as tokens. Raises InputError."""
        ids = self._token_ids(job.prompt, job.rendered)
        check_length(len(ids), self.limits)
        if len(ids) >= self.longest:
            raise InputError(
                f"the prompt has {len(ids):,} tokens, but the LLM has {self.longest:,} positions",
                fix="shorten the prompt",
            )
        return _Prompt(job, ids, min(job.new_tokens, self.longest - len(ids)))

    def _in_full(self, prompt: _Prompt) -> bool:
        """Whether a prompt changes nothing for others of its call."""
        return self.memory is None or len(prompt.ids) <= self.memory.longest_full_prompt

    def _begin(self, prompts: list[_Prompt]) -> dict[Job, Begun | Exception]:
        """Read prompts, whose texts join a batch. Raises InputError."""
        first, known = prompts[0], 0
        scores: list[TokenScore] = []
        if first.scored:
            # A memory is in effect from the first token on.
            cache, logits = self._forward(self._empty(), first.ids)
            scores = self._prompt_scores(first.ids, logits[0], first.job.logprobs or 0)
        elif len(prompts) == 1:
            cache, read, known = self._with_prefix(first.job, first.ids)
            cache, logits = self._read(cache, first.ids, read, longest=len(first.ids) + first.room)
        else:
            cache, logits = self._read_together(prompts)
        if self._pads is None:
            self._pads = is_padded(cache)
        lengths = [len(prompt.ids) for prompt in prompts]
        # Whatever may fail comes first, so that no row joins without its text.
        texts = [self._text(prompt, logits[row, -1:].float()) for row, prompt in enumerate(prompts)]
        spelt = [self._spelt(prompt) for prompt in prompts]
        batch = next((batch for batch in self._batches if self._pads and batch.rows.takes(cache)), None)
        if batch is None:
            batch = _Batch(rows_of(cache, lengths), [])
            self._batches.append(batch)
        else:
            batch.rows.join(cache, lengths)
        batch.texts += texts
        return {
            text.job: Begun(text.length, known, prompt, scores, _cache_state(batch, text))
            for text, prompt in zip(texts, spelt, strict=True)
        }

    def _text(self, prompt: _Prompt, logits: Tensor) -> _Text:
        """What is known of a text when its prompt was read; ``logits [1, V]`` are those of its first token."""
        job = prompt.job
        sampler, stream = Sampler(job.settings, self.model.device), lossless(self.tokenizer).streamed()
        text = _Text(job, sampler, stream, logits, len(prompt.ids), prompt.room)
        if job.reports_cache:
            encoded = not job.rendered if isinstance(job.prompt, str) else None
            text.places = TokenPlaces(self.tokenizer, self._spelt(prompt), prompt.ids, encoded)
        return text

    def _spelt(self, prompt: _Prompt) -> str:
        """A prompt as text."""
        given = prompt.job.prompt
        return given if isinstance(given, str) else lossless(self.tokenizer).decode(prompt.ids, begins=True)

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
                    f"the prompt has the token {wrong[0]}, but the tokens of this LLM are 0 to {known - 1}",
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
        prefix = self._token_ids(job.prefix, True) if job.prefix.strip() else []
        if not prefix or len(prefix) >= len(ids) or ids[: len(prefix)] != prefix:
            return self._empty(), 0, 0
        cache = self._prefixes.find(prefix)
        known = 0 if cache is None else len(prefix)
        if cache is None:
            cache = self._read(self._empty(), prefix, 0)[0]
            self._prefixes.keep(prefix, cache)
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
            reading = cache.reading_prompt(
                self._tensor([ids]), None, whole=True, longest=max(longest, len(ids))
            )
        with reading:
            return self._forward(cache, ids[read:], **self._last_only)

    def _read_together(self, prompts: list[_Prompt]) -> tuple[Any, Tensor]:
        """Read several prompts in one call, padded on the left: as :meth:`_read`, for ``[B, 1, V]`` logits."""
        longest = max(len(prompt.ids) for prompt in prompts)
        ids = self._tensor([[0] * (longest - len(prompt.ids)) + prompt.ids for prompt in prompts])
        mask = self._tensor([[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts])
        cache = self._empty()
        more: dict[str, Any] = {"attention_mask": mask, **self._last_only}
        if self._positions:
            more["position_ids"] = (mask.cumsum(1) - 1).clamp_min_(0)
        reading: Any = nullcontext()
        if cache is not None:
            reading = cache.reading_prompt(ids, mask, whole=True, longest=longest)
        with reading:
            output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **more)
        return output.past_key_values, output.logits

    def _forward(self, cache: Any, ids: list[int], **more: Any) -> tuple[Any, Tensor]:
        """Read tokens of one text: its cache, and the logits."""
        output = self.model(input_ids=self._tensor([ids]), past_key_values=cache, use_cache=True, **more)
        return output.past_key_values, output.logits

    def _tensor(self, numbers: list[list[int]]) -> Tensor:
        return torch.tensor(numbers, device=self.model.device)

    # ---- new tokens

    def step(self) -> Iterator[tuple[Job, Piece | Exception]]:
        """As :meth:`sentcompress.serving.scheduler.Engine.step`."""
        for batch in self._batches:
            picked = [(text, *self._pick_or_fail(batch, text)) for text in batch.texts]
            going = [(text, token) for text, token, piece in picked if not _is_last(piece)]
            batch.keep([text for text, _ in going])
            if going:
                self._write(batch, [token for _, token in going])
            for text, _, piece in picked:
                if isinstance(piece, Piece) and not piece.finish_reason:
                    piece = replace(piece, cache=_cache_state(batch, text))
                yield text.job, piece
        self._batches = [batch for batch in self._batches if batch.texts]

    def _pick_or_fail(self, batch: _Batch, text: _Text) -> tuple[int, Piece | Exception]:
        """As :meth:`_pick`. If it fails for one text, the others go on."""
        try:
            return self._pick(batch, text)
        except Exception as error:
            return -1, error

    def _pick(self, batch: _Batch, text: _Text) -> tuple[int, Piece]:
        """The next token of a text, and what it adds to it."""
        if not text.room:
            return -1, Piece("", 0, "length")
        if not text.logits.max().isfinite():  # to sample from these would end all work of a GPU
            raise NumericsError("the LLM computes no finite numbers for a text", fix="use --dtype fp32")
        token = int(text.sampler.pick(text.logits, [[]]))
        if token in self.end_ids:
            rest = text.stream.add([], ends=True)
            return token, Piece(rest, text.written, "stop", cache=_cache_state(batch, text))
        number = text.job.logprobs
        scores = [] if number is None else [self._score(token, text.logits[0], number)]
        text.written += 1
        ends = text.written == text.room
        new = text.stream.add([token], ends=ends)
        if text.places is not None:
            text.places.add(new)
        if not ends:
            return token, Piece(new, text.written, None, scores)
        return token, Piece(new, text.written, "length", scores, _cache_state(batch, text))

    def _write(self, batch: _Batch, tokens: list[int]) -> None:
        """Let the LLM read the next token of each text of a batch."""
        more = dict[str, Any](self._last_only)
        if self._positions:
            more["position_ids"] = self._tensor([[text.length] for text in batch.texts])
        ids = self._tensor([[token] for token in tokens])
        output = self.model(input_ids=ids, use_cache=True, **batch.rows.inputs(), **more)
        batch.rows.wrote(output.past_key_values)
        self._recalled += batch.rows.recalled()
        for row, text in enumerate(batch.texts):
            text.logits = output.logits[row, -1:].float()
            text.length += 1
        if reporting := [row for row, text in enumerate(batch.texts) if text.places is not None]:
            for row, shares in zip(reporting, batch.rows.recall_shares(reporting), strict=True):
                batch.texts[row].recalled = shares

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
        for batch in self._batches:
            batch.keep([text for text in batch.texts if text.job is not job])
        self._batches = [batch for batch in self._batches if batch.texts]

    def reset(self) -> None:
        """As :meth:`sentcompress.serving.scheduler.Engine.reset`."""
        self._batches.clear()
        self._prefixes = _Prefixes(self.limits.prompt_cache_bytes)

    def figures(self) -> EngineFigures:
        """As :meth:`sentcompress.serving.scheduler.Engine.figures`."""
        sizes = [*(batch.rows.nbytes() for batch in self._batches), self._prefixes.nbytes]
        device, host, full = (sum(part) for part in zip((0, 0, 0), *sizes, strict=True))
        recalls = self.memory is not None and self.memory.policy.recall
        return EngineFigures(device, host, full, self._recalled if recalls else None)


def _is_last(piece: Piece | Exception) -> bool:
    return isinstance(piece, Exception) or piece.finish_reason is not None


def _cache_state(batch: _Batch, text: _Text) -> CacheState | None:
    """What a text's cache holds, if that is reported."""
    if text.places is None:
        return None
    recalled = {text.places.span(*tokens): share for tokens, share in text.recalled.items()}
    return CacheState(*batch.rows.text_bytes(batch.texts.index(text)), recalled)
