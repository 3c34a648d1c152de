"""Puts a request's pieces together: the text of each choice up to its stop text, and the tokens that were used."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial

from starlette.requests import Request

from sentcompress.errors import SentCompressError, is_out_of_memory
from sentcompress.serving.openai_form import APIError
from sentcompress.serving.scheduler import (
    Begun,
    Job,
    Piece,
    Scheduler,
    ServerBusyError,
    ServerEndingError,
    TimeoutEndedError,
    TokenScore,
)

GRACE_SECONDS = 5
"""How long after a request's time the scheduler may still report that it is over: a prompt is read in one go."""
RETRY_SECONDS = 2


class ChoiceText:
    """The text of one choice, as it may be shown: what could begin a stop text is held back.

    Attributes:
        new_tokens: tokens written so far.
        finish_reason: once it has ended.
    """

    def __init__(self, stops: Sequence[str], begins: str = "") -> None:
        self._stops, self._shown, self._held = stops, len(begins), ""
        self._scores: list[tuple[int, TokenScore]] = []
        """Tokens whose text was not shown yet, each with the characters before it."""
        self.new_tokens = 0
        self.finish_reason: str | None = None

    def add(self, piece: Piece) -> tuple[str, list[tuple[int, TokenScore]]]:
        """The text that a piece lets us show, and the tokens in it."""
        offset = self._shown + len(self._held)
        self._scores += [(offset, score) for score in piece.scores]
        self._held += piece.text
        self.new_tokens, self.finish_reason = piece.tokens, piece.finish_reason
        ends = min((at for stop in self._stops if (at := self._held.find(stop)) >= 0), default=None)
        if ends is not None:
            self._held, self.finish_reason = self._held[:ends], "stop"
        keep = 0 if self.finish_reason else self._may_begin_a_stop()
        text = self._held[: len(self._held) - keep]
        self._held = self._held[len(text) :]
        self._shown += len(text)
        ready = [
            (at, score)
            for at, score in self._scores
            if at < self._shown or (ends is None and self.finish_reason)
        ]
        self._scores = self._scores[len(ready) :]
        return text, ready

    def _may_begin_a_stop(self) -> int:
        """Characters at the end that may be the beginning of a stop text."""
        most = len(self._held)
        return max(
            (
                n
                for stop in self._stops
                for n in range(1, min(len(stop), most + 1))
                if self._held.endswith(stop[:n])
            ),
            default=0,
        )


class Answer:
    """The texts of one request, while they are written.

    Args:
        scheduler: writes them.
        jobs: one for each choice; their ``deliver`` is set here.
        request: of the client.
    """

    def __init__(self, scheduler: Scheduler, jobs: Sequence[Job], request: Request) -> None:
        self.scheduler, self.jobs, self.request = scheduler, jobs, request
        self._events: asyncio.Queue[tuple[int, Begun | Piece | Exception]] = asyncio.Queue()
        self._open = set(range(len(jobs)))
        """Choices that have not ended."""
        self._gone: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        loop = asyncio.get_running_loop()
        for number, job in enumerate(jobs):
            job.deliver = partial(self._deliver, loop, number)

    def _deliver(
        self, loop: asyncio.AbstractEventLoop, number: int, event: Begun | Piece | Exception
    ) -> None:
        """Called in the scheduler's thread."""
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

    async def start(self) -> dict[int, Begun]:
        """Queue the texts and wait until all prompts are read, so that an error can still have its own status.

        Raises:
            APIError: the queue is full, the server is ending, a prompt does not fit, or the client is gone.
        """
        try:
            self.scheduler.submit(self.jobs)
        except ServerBusyError as error:
            raise APIError(429, str(error), code="queue_full", retry_after=RETRY_SECONDS) from None
        except ServerEndingError as error:
            raise APIError(503, str(error), code="shutting_down", retry_after=RETRY_SECONDS) from None
        self._gone = asyncio.create_task(self._watch_client())
        seconds = max(0.0, self.jobs[0].deadline - time.monotonic()) + GRACE_SECONDS
        late = TimeoutEndedError("the request took too long")
        self._timer = asyncio.get_running_loop().call_later(seconds, self._events.put_nowait, (0, late))
        begun: dict[int, Begun] = {}
        pieces: list[tuple[int, Begun | Piece | Exception]] = []
        try:
            while len(begun) < len(self.jobs):
                number, event = await self._next()
                if isinstance(event, Begun):
                    begun[number] = event
                else:
                    pieces.append((number, event))
        except BaseException:
            self.cancel()
            raise
        # Texts that began first are ahead already, and more of theirs may be waiting behind.
        pieces += [self._events.get_nowait() for _ in range(self._events.qsize())]
        for piece in pieces:
            self._events.put_nowait(piece)
        return begun

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all choices until each has ended, or :meth:`stop` was called for it. Raises APIError."""
        try:
            while self._open:
                number, event = await self._next()
                if number not in self._open or isinstance(event, Begun):
                    continue
                if event.finish_reason:
                    self._open.discard(number)
                yield number, event
        finally:
            self.cancel()

    def stop(self, number: int) -> None:
        """End one choice: its stop text has come."""
        self._open.discard(number)
        self.scheduler.cancel([self.jobs[number]])

    def cancel(self) -> None:
        """End all choices; those that have ended are left as they are."""
        self.leave_client()
        if self._timer is not None:
            self._timer.cancel()
        self.scheduler.cancel(self.jobs)

    def leave_client(self) -> None:
        """Look no longer whether the client goes away: a stream notices by itself."""
        if self._gone is not None:
            self._gone.cancel()

    async def _watch_client(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait((0, APIError(499, "the client is gone", code="client_gone")))

    async def _next(self) -> tuple[int, Begun | Piece]:
        """The next event. Raises APIError if it is an error."""
        number, event = await self._events.get()
        if isinstance(event, Exception):
            raise as_api_error(event)
        return number, event


def as_api_error(error: Exception) -> APIError:
    """What a client learns of an error: the message of one that it caused, and no details of others."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, TimeoutEndedError):
        return APIError(504, str(error), code="timeout")
    if isinstance(error, ServerEndingError):
        return APIError(503, str(error), code="shutting_down", retry_after=RETRY_SECONDS)
    if is_out_of_memory(error):
        return APIError(503, "the server has too little memory for this request", code="out_of_memory")
    if isinstance(error, SentCompressError) and error.exit_code == 2:
        return APIError(400, str(error))
    return APIError(500, "the server failed to answer; its log says why", code="internal_error")
