"""Serving a SentenceLM: requests join the engine's batch at its next step, and prompts share what was read before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile

from sentcompress.errors import InputError, SentCompressError
from sentcompress.generation import Generation, GenerationSettings, Prefix, SentenceGenerator
from sentcompress.generation.sentence_writer import Sampler
from sentcompress.generation.text_batch import TextBatch, TextState
from sentcompress.serving.cache_state import CacheState
from sentcompress.serving.limits import ServeLimits
from sentcompress.serving.scheduler import Begun, EngineFigures, Job, Piece
from sentcompress.text.lossless_tokenizer import lossless


class ReadPrompts:
    """Prompts that were read lately. A new one is read from the sentence where it differs from all of them.

    Args:
        max_bytes: of all that is kept; 0 keeps nothing.

    Attributes:
        nbytes: of what is kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._kept: list[Prefix] = []
        """The one used last at the end."""

    def find(self, sentences: list[list[int]]) -> tuple[Prefix | None, int]:
        """The kept prompt with the longest beginning that these sentences share, and how many they share."""
        best, most = None, 0
        for prompt in self._kept:
            pairs = zip(prompt.sentences, sentences, strict=False)
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            if shared > most:
                best, most = prompt, shared
        if best is not None:
            self._kept = [*(other for other in self._kept if other is not best), best]
        return best, most

    def keep(self, prompt: Prefix) -> None:
        """Keep a prompt that was read, in place of those that it begins with; forget old ones if there is no room."""
        if not prompt.sentences or any(_begins(other, prompt) for other in self._kept):
            return
        self._kept = [other for other in self._kept if not _begins(prompt, other)] + [prompt]
        self.nbytes = sum(each.nbytes for each in self._kept)
        while self.nbytes > self.max_bytes:
            self.nbytes -= self._kept.pop(0).nbytes


def _begins(whole: Prefix, prompt: Prefix) -> bool:
    """Whether a prompt is the beginning of another."""
    return whole.sentences[: len(prompt.sentences)] == prompt.sentences


class SentenceEngine:
    """Writes texts with a SentenceLM, in one batch.

    Args:
        generator: the model and its tokenizer.
        settings: how texts are computed: head and cache.
        limits: of the server.
    """

    def __init__(
        self, generator: SentenceGenerator, settings: GenerationSettings, limits: ServeLimits
    ) -> None:
        self.generator, self.settings, self.limits = generator, settings, limits
        self.prompts = ReadPrompts(limits.prompt_cache_bytes)
        self.batch = TextBatch(generator, settings)
        self._texts: dict[Job, TextState] = {}
        self._jobs: dict[int, Job] = {}
        self._slot_bytes = 0
        """Of one sentence in the backbone's cache."""

    def joining(self, waiting: Sequence[Job]) -> int:
        """As :meth:`sentcompress.serving.scheduler.Engine.joining`: all of them are read together."""
        return len(waiting)

    def add(self, jobs: Sequence[Job]) -> list[Begun | Exception]:
        """As :meth:`sentcompress.serving.scheduler.Engine.add`. Prompts that begin alike are read together."""
        found: list[Begun | Exception] = []
        groups: dict[tuple[int, int], list[TextState]] = {}
        prefixes: dict[tuple[int, int], Prefix | None] = {}
        for job in jobs:
            try:
                text, prompt = self._read(job)
            except SentCompressError as error:
                found.append(error)
                continue
            prefix, shared = self.prompts.find(text.sentences)
            group = id(prefix), shared
            groups.setdefault(group, []).append(text)
            prefixes[group] = prefix
            self._texts[job], self._jobs[id(text)] = text, job
            cached = sum(map(len, text.sentences[:shared]))
            found.append(Begun(self._tokens(text), cached, prompt))
        for group, texts in groups.items():
            prefix = prefixes[group]
            if prefix is not None:
                prefix = prefix.common([texts[0].sentences])
            self.batch.join(texts, prefix, self.prompts.keep if self.prompts.max_bytes else None)
        self._slot_bytes = self.batch.slot_bytes
        return [
            replace(each, cache=self._cache_state(self._texts[job]))
            if job.reports_cache and isinstance(each, Begun)
            else each
            for job, each in zip(jobs, found, strict=True)
        ]

    def _read(self, job: Job) -> tuple[TextState, str]:
        """The state of a job's text, and its prompt as text. Raises InputError."""
        if job.logprobs is not None:
            raise InputError(
                "logprobs: a SentenceLM has no probability of its own for each token of a text",
                fix="leave out logprobs; 'sentcompress bench quality' and 'sentcompress lm-eval' score text",
            )
        if not job.new_tokens:
            raise InputError("max_tokens: 0 writes nothing", fix="use at least 1")
        prompt = job.prompt
        if not isinstance(prompt, str):
            prompt = lossless(self.generator.tokenizer).decode(prompt, begins=True)
        text = self.generator.read(0, Generation(prompt))
        text.settings = job.settings
        text.sampler = Sampler(job.settings, self.generator.device)
        check_length(self._tokens(text), self.limits)
        return text, prompt

    @staticmethod
    def _tokens(text: TextState) -> int:
        """Tokens of its prompt and of the sentences that were written."""
        return sum(map(len, text.sentences)) + len(text.unfinished)

    def step(self) -> Iterator[tuple[Job, Piece]]:
        """As :meth:`sentcompress.serving.scheduler.Engine.step`."""
        for text, _, new in self.batch.step():
            job, reason = self._jobs[id(text)], text.result.finish_reason
            if reason:
                del self._jobs[id(text)], self._texts[job]
            # No positions left: as a limit of tokens.
            ended = "length" if reason == "context" else reason
            cache = self._cache_state(text) if job.reports_cache else None
            yield job, Piece(new, len(text.result.token_ids), ended or None, cache=cache)

    def _cache_state(self, text: TextState) -> CacheState:
        """The backbone's keys and values of a text, without padding and room to grow.

        The LLM of the same blocks has as many bytes for each token as the backbone for each latent.
        """
        model = self.generator.model
        slots = len(text.sentences) - text.unread + model.config.start_latent
        held, full = slots * self._slot_bytes, self._tokens(text) * self._slot_bytes // model.latents
        offloaded = self.settings.cache.startswith("offloaded")
        return CacheState(0 if offloaded else held, held if offloaded else 0, full)

    def drop(self, job: Job) -> None:
        """As :meth:`sentcompress.serving.scheduler.Engine.drop`."""
        if text := self._texts.pop(job, None):
            del self._jobs[id(text)]
            self.batch.drop(text)

    def reset(self) -> None:
        """As :meth:`sentcompress.serving.scheduler.Engine.reset`."""
        self._texts.clear()
        self._jobs.clear()
        self.batch = TextBatch(self.generator, self.settings)

    def figures(self) -> EngineFigures:
        """As :meth:`sentcompress.serving.scheduler.Engine.figures`."""
        held, read = self.batch.cache_bytes, self.prompts.nbytes
        if self.settings.cache.startswith("offloaded"):
            return EngineFigures(device_bytes=read, host_bytes=held)
        return EngineFigures(device_bytes=held + read)


def check_length(tokens: int, limits: ServeLimits) -> None:
    """Refuse a prompt that is longer than the server allows. Raises InputError."""
    if tokens > limits.max_prompt_tokens:
        raise InputError(
            f"the prompt has {tokens:,} tokens, but this server takes {limits.max_prompt_tokens:,}",
            fix="shorten the prompt, or start the server with a larger --max-prompt-tokens",
        )
