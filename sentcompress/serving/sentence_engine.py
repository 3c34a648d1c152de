"""Serving a SentenceLM: requests join the engine's batch at its next step, and prompts share what was read before."""

from __future__ import annotations

from collections.abc import Iterator

from sentcompress.errors import InputError
from sentcompress.generation import Generation, GenerationSettings, Prefix, SentenceGenerator
from sentcompress.generation.sentence_writer import Sampler
from sentcompress.generation.text_batch import TextBatch, TextState
from sentcompress.serving.limits import ServeLimits
from sentcompress.serving.scheduler import Begun, EngineFigures, Job, Piece
from sentcompress.text.lossless_tokenizer import lossless

JOINS_PER_STEP = 8
"""Prompts read between two steps, so that many new ones do not hold up the texts that are being written."""


class ReadPrompts:
    """Prompts that were read lately. A new one is read from the sentence where it differs from all of them.

    Args:
        generator: the model.
        max_bytes: of all that is kept; 0 keeps nothing.
    """

    def __init__(self, generator: SentenceGenerator, max_bytes: int) -> None:
        self._generator, self._max_bytes = generator, max_bytes
        self._kept: list[Prefix] = []
        """The one used last at the end."""

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(prompt.nbytes for prompt in self._kept)

    def read(self, sentences: list[list[int]]) -> tuple[Prefix | None, int]:
        """A prompt, read, and how many of its sentences had been read before."""
        if not self._max_bytes or not sentences:
            return None, 0
        model, best = self._generator.model, None
        for prompt in self._kept:
            common = prompt.common([sentences])
            if common.sentences and (best is None or len(common.sentences) > len(best[1].sentences)):
                best = prompt, common
        if best is None:
            shared, whole = 0, self._generator.prefix_of(sentences)
        else:
            shared = len(best[1].sentences)
            if shared == len(sentences):
                self._kept.remove(best[0])
                self._kept.append(best[0])
                return best[1], shared
            new = sentences[shared:]
            whole = best[1].followed_by(model, new, self._generator.encode(new))
            if shared == len(best[0].sentences):  # a longer text of the same beginning serves as well
                self._kept.remove(best[0])
        self._kept.append(whole)
        while self._kept and self.nbytes > self._max_bytes:
            self._kept.pop(0)
        return whole, shared


class SentenceEngine:
    """Writes texts with a SentenceLM, in one batch.

    Args:
        generator: the model and its tokenizer.
        settings: how texts are computed: head and cache.
        limits: of the server.
    """

    joins_per_step = JOINS_PER_STEP

    def __init__(
        self, generator: SentenceGenerator, settings: GenerationSettings, limits: ServeLimits
    ) -> None:
        self.generator, self.settings, self.limits = generator, settings, limits
        self.prompts = ReadPrompts(generator, limits.prompt_cache_bytes)
        self.batch = TextBatch(generator, settings)
        self._texts: dict[Job, TextState] = {}
        self._jobs: dict[int, Job] = {}

    def add(self, job: Job) -> Begun:
        """As :meth:`sentcompress.serving.scheduler.Engine.add`."""
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
        tokens = sum(map(len, text.sentences)) + len(text.unfinished)
        check_length(tokens, self.limits)
        prefix, shared = self.prompts.read(text.sentences)
        cached = sum(map(len, text.sentences[:shared]))
        self.batch.join([text], prefix)
        self._texts[job], self._jobs[id(text)] = text, job
        return Begun(tokens, cached, prompt)

    def step(self) -> Iterator[tuple[Job, Piece]]:
        """As :meth:`sentcompress.serving.scheduler.Engine.step`."""
        for text, _, new in self.batch.step():
            job, reason = self._jobs[id(text)], text.result.finish_reason
            if reason:
                del self._jobs[id(text)], self._texts[job]
            # No positions left: as a limit of tokens.
            ended = "length" if reason == "context" else reason
            yield job, Piece(new, len(text.result.token_ids), ended or None)

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
