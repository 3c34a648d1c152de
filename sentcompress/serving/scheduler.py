"""One thread owns the model: it takes texts from a bounded queue, writes them together and hands on each piece."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import torch

from sentcompress.errors import RunError, SentCompressError, is_out_of_memory
from sentcompress.generation import GenerationSettings
from sentcompress.serving.cache_state import CacheState
from sentcompress.serving.limits import ServeLimits

log = logging.getLogger(__package__)
GATHER_SECONDS = 0.005
"""How long the first request after a pause waits for others, which are then read together."""
RATE_SECONDS = 10
"""Tokens per second are those of the last so many seconds."""


@dataclass(frozen=True)
class TokenScore:
    """The log probability of one token, and the most likely ones in its place.

    Attributes:
        token: its bytes.
        logprob: None for the first token of a text, which nothing predicts.
        top: the most likely tokens with their log probabilities, best first.
    """

    token: bytes
    logprob: float | None
    top: list[tuple[bytes, float]]


@dataclass(frozen=True)
class Begun:
    """The prompt was read.

    Attributes:
        prompt_tokens: its length.
        cached_tokens: how many of them had been read before, for another request.
        prompt: its text, for ``echo``.
        scores: of its tokens, for ``echo`` with ``logprobs``.
        cache: what its cache holds, if asked for.
    """

    prompt_tokens: int
    cached_tokens: int
    prompt: str
    scores: Sequence[TokenScore] = ()
    cache: CacheState | None = None


@dataclass(frozen=True)
class Piece:
    """New text.

    Attributes:
        text: may be empty, while a character is incomplete.
        tokens: tokens written so far, without end marks.
        finish_reason: ``stop`` or ``length`` with the last piece.
        scores: of the new tokens, if asked for.
        cache: what the text's cache holds now, if asked for.
    """

    text: str
    tokens: int
    finish_reason: str | None = None
    scores: Sequence[TokenScore] = ()
    cache: CacheState | None = None


class TimeoutEndedError(SentCompressError):
    """A request took longer than the server allows."""


class ServerBusyError(SentCompressError):
    """The queue is full."""


class ServerEndingError(SentCompressError):
    """The server is ending and takes no new requests."""


@dataclass(eq=False)
class Job:
    """One text to write.

    Attributes:
        prompt: text, or token ids.
        settings: sampling and limits.
        deliver: called by the scheduler's thread with :class:`Begun`, then each :class:`Piece`, or an error.
        deadline: on the clock of ``time.monotonic``.
        new_tokens: most tokens to write; 0 only scores the prompt.
        logprobs: number of the most likely tokens to report; None reports no probabilities.
        echo: the prompt's tokens are scored too, with ``logprobs``.
        prefix: beginning of the prompt that other prompts share: a chat's system message.
        rendered: the prompt has its special tokens already, by a chat template.
        reports_cache: say with each piece what the text's cache holds.
    """

    prompt: str | list[int]
    settings: GenerationSettings
    deliver: Callable[[Begun | Piece | Exception], None]
    deadline: float
    new_tokens: int
    logprobs: int | None = None
    echo: bool = False
    prefix: str = ""
    rendered: bool = False
    reports_cache: bool = False


@dataclass
class EngineFigures:
    """What an engine holds now.

    Attributes:
        device_bytes: caches beside the model, with the prompts that stay read.
        host_bytes: caches in slow storage.
        full_bytes: what the LLM's own caches of the same texts would hold; None for a SentenceLM.
        recalled_sentences: sentences that tokens have recalled since the start; None without a memory that recalls.
    """

    device_bytes: int = 0
    host_bytes: int = 0
    full_bytes: int | None = None
    recalled_sentences: int | None = None


class Engine(Protocol):
    """Writes texts. Only the scheduler's thread calls it."""

    def joining(self, waiting: Sequence[Job]) -> int:
        """How many of these texts, from the first on, should join before the next step; at least one."""

    def add(self, jobs: Sequence[Job]) -> list[Begun | Exception]:
        """Read prompts; their texts are written from the next step on. An error stands for one that does not fit."""

    def step(self) -> Iterable[tuple[Job, Piece | Exception]]:
        """Go on with every text. An error stands for one that cannot.

        A text with an error or a ``finish_reason`` has left the batch.
        """

    def drop(self, job: Job) -> None:
        """Forget a text."""

    def reset(self) -> None:
        """Forget all texts, after an error."""

    def figures(self) -> EngineFigures:
        """What it holds now."""


@dataclass
class Figures:
    """What ``/metrics`` shows of the scheduler; counters since the start."""

    waiting: int = 0
    running: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    tokens_per_second: float = 0.0
    engine: EngineFigures = field(default_factory=EngineFigures)


class Scheduler:
    """Runs an engine in a thread of its own. Its methods may be called from any thread.

    Texts wait in the order in which they came. All texts that are being written go on at each step, so a long one holds
    up no other.

    Args:
        engine: with the model.
        limits: of the server.
    """

    def __init__(self, engine: Engine, limits: ServeLimits) -> None:
        self.engine, self.limits = engine, limits
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: dict[Job, int] = {}
        """Texts that are being written, with their tokens so far."""
        self._cancelled: set[Job] = set()
        self._draining = self._closed = False
        self._figures = Figures(engine=engine.figures())
        self._rates: deque[tuple[float, int]] = deque()
        """Time and number of tokens of the last steps."""
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    # ---- for the threads of the server

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the texts of one request, all or none.

        Raises:
            ServerBusyError: they do not fit into the queue.
            ServerEndingError: the server takes no new requests.
        """
        with self._changed:
            if self._draining or not self.alive:
                raise ServerEndingError("the server is shutting down", fix="try another server, or later")
            free = self.limits.max_batch - len(self._running)
            if len(self._waiting) + len(jobs) > self.limits.max_waiting + max(0, free):
                raise ServerBusyError("the server has too many requests", fix="try again later")
            self._waiting += jobs
            self._changed.notify_all()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Forget texts whose readers are gone. Those that have ended are left as they are."""
        with self._changed:
            for job in jobs:
                if job in self._running:
                    self._cancelled.add(job)
                elif job in self._waiting:
                    self._waiting.remove(job)
            self._changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """Take no new texts, and wait until those that are there have ended; whether they have."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not (self._waiting or self._running), seconds)

    @property
    def draining(self) -> bool:
        """Whether the server is ending."""
        return self._draining

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive() and not self._closed

    def close(self) -> None:
        """End the thread after its current step."""
        with self._changed:
            self._draining = self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def figures(self) -> Figures:
        """What is going on now, as of the last step."""
        with self._changed:
            now = self._figures
            rate = sum(tokens for at, tokens in self._rates if at > time.monotonic() - RATE_SECONDS)
            counts = now.prompt_tokens, now.cached_tokens, now.new_tokens
            return Figures(len(self._waiting), len(self._running), *counts, rate / RATE_SECONDS, now.engine)

    # ---- the thread of the model

    @torch.no_grad()
    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._closed)
                if self._closed:
                    ending = [*self._waiting, *self._running]
                    self._waiting.clear()
                    self._running.clear()
                    break
                cancelled = [job for job in self._cancelled if job in self._running]
                self._cancelled.clear()
            for job in cancelled:
                self._end(job)
            self._end_overdue()
            if not self._running:
                time.sleep(GATHER_SECONDS)
            self._admit()
            if self._running:
                self._step()
        for job in ending:
            job.deliver(ServerEndingError("the server was shut down before the text was complete"))

    def _admit(self) -> None:
        """Let waiting texts join, in their order."""
        with self._changed:
            first = [*islice(self._waiting, self.limits.max_batch - len(self._running))]
            jobs = [self._waiting.popleft() for _ in range(self.engine.joining(first) if first else 0)]
            self._running.update((job, 0) for job in jobs)
        if not jobs:
            return
        try:
            begun = self.engine.add(jobs)
        except Exception as error:
            log.exception("%d prompts could not be read", len(jobs))
            begun = [error] * len(jobs)
        for job, each in zip(jobs, begun, strict=True):
            if isinstance(each, Exception):
                self._end(job, each)
                continue
            with self._changed:
                self._figures.prompt_tokens += each.prompt_tokens
                self._figures.cached_tokens += each.cached_tokens
            job.deliver(each)

    def _step(self) -> None:
        try:
            pieces = list(self.engine.step())
        except Exception as error:
            self._lose_all(error)
            return
        new = 0
        with self._changed:
            for job, piece in pieces:
                if isinstance(piece, Exception):
                    log.error("one text is lost", exc_info=piece)
                    del self._running[job]
                    continue
                new += piece.tokens - self._running[job]
                self._running[job] = piece.tokens
                if piece.finish_reason:
                    del self._running[job]
        self._note(new)  # whoever gets a piece finds it in the figures
        for job, piece in pieces:
            job.deliver(piece)

    def _lose_all(self, error: Exception) -> None:
        """After an error in the midst of the model's work, the texts are lost, but not the server."""
        log.exception("the model failed; %d texts are lost", len(self._running))
        # Even an InputError: these clients' input was accepted before.
        reason = error if is_out_of_memory(error) else RunError("the model failed")
        for job in [*self._running]:
            job.deliver(reason)
        self.engine.reset()
        with self._changed:
            self._running.clear()
            self._changed.notify_all()

    def _note(self, new: int) -> None:
        """Keep the figures of now, after ``new`` tokens."""
        held, now = self.engine.figures(), time.monotonic()
        with self._changed:
            self._figures.new_tokens += new
            self._figures.engine = held
            self._rates.append((now, new))
            while self._rates[0][0] < now - RATE_SECONDS:
                self._rates.popleft()
            self._changed.notify_all()

    def _end_overdue(self) -> None:
        now = time.monotonic()
        with self._changed:
            overdue = [job for job in (*self._running, *self._waiting) if job.deadline < now]
        for job in overdue:
            seconds = f"{self.limits.request_seconds:g}"
            self._end(job, TimeoutEndedError(f"the request took longer than {seconds} seconds"))

    def _end(self, job: Job, error: Exception | None = None) -> None:
        """Forget a text; say why, unless its reader is gone."""
        try:
            self.engine.drop(job)
        except Exception as failure:
            with self._changed:
                self._running.pop(job, None)
            self._lose_all(failure)
        self._note(0)
        with self._changed:
            self._running.pop(job, None)
            if job in self._waiting:
                self._waiting.remove(job)
            self._changed.notify_all()
        if error is not None:
            job.deliver(error)
