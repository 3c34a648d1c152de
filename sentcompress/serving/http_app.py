"""The HTTP application: OpenAI's endpoints, ``/health``, ``/metrics``, and a page to try them with."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from sentcompress.files import printable
from sentcompress.serving.answers import Answer, ChoiceText
from sentcompress.serving.chat_template import ChatTemplate
from sentcompress.serving.limits import ServeLimits
from sentcompress.serving.openai_form import (
    APIError,
    ChatRequest,
    CompletionRequest,
    Scored,
    chat_logprobs,
    completion_logprobs,
    usage,
)
from sentcompress.serving.prometheus import Metrics
from sentcompress.serving.scheduler import Begun, Job, Scheduler
from sentcompress.serving.try_page import add_page

log = logging.getLogger(__package__)
DEFAULT_COMPLETION_TOKENS = 16
"""``max_tokens`` of a completion that names none, as OpenAI has it."""


@dataclass
class Service:
    """What the endpoints work with.

    Attributes:
        name: of the model, for clients.
        scheduler: owns the model.
        template: makes a prompt of a chat.
        limits: of the server.
        logs_text: prompts and answers are logged.
        started: when the server started, in seconds since 1970.
    """

    name: str
    scheduler: Scheduler
    template: ChatTemplate
    limits: ServeLimits
    logs_text: bool = False
    started: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.scheduler)


def create_app(service: Service) -> FastAPI:
    """The application, without what guards it (:mod:`sentcompress.serving.guard`)."""
    # The pages of the API's description load scripts from elsewhere, so they are left out.
    app = FastAPI(title="sentcompress", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(APIError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _failed)

    add_page(app)

    @app.get("/health")
    def health() -> Response:
        if service.scheduler.draining or not service.scheduler.alive:
            return JSONResponse({"status": "ending"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type=service.metrics.media_type)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        _check_model(service, name)
        return _model(service)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _Completions(service, body, request).response()

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await _Chat(service, body, request).response()

    return app


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.started, "owned_by": "sentcompress"}


def _check_model(service: Service, name: str) -> None:
    if name != service.name:
        raise APIError(
            404,
            f"The model '{name}' does not exist; this server has '{service.name}'",
            param="model",
            code="model_not_found",
        )


class _Endpoint:
    """Answers one request, whole or as a stream. Subclasses say what a prompt is, and the form of the answer."""

    kind: str
    """Of the answer; that of its chunks has ``.chunk`` behind it in chats."""
    chunk_kind: str
    id_prefix: str
    path: str

    def __init__(self, service: Service, body: Any, request: Request) -> None:
        self.service, self.body, self.request = service, body, request
        self.arrived = time.monotonic()
        self.head = {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.name,
        }

    async def jobs(self) -> list[Job]:
        """One for each choice."""
        raise NotImplementedError

    def choice(self, text: str, scored: Scored, reason: str | None) -> dict[str, Any]:
        """The form of a whole choice."""
        raise NotImplementedError

    def first_delta(self, text: str, scored: Scored) -> dict[str, Any] | None:
        """The form of a choice in the first chunk of a stream, before anything is written; None leaves it out."""
        raise NotImplementedError

    def delta(self, text: str, scored: Scored, reason: str | None) -> dict[str, Any]:
        """The form of a choice in a chunk of a stream."""
        raise NotImplementedError

    def begins(self, begun: Begun) -> str:
        """Text that stands before a choice's own: its prompt, with ``echo``."""
        return ""

    async def response(self) -> Response:
        """The answer. Raises APIError."""
        _check_model(self.service, self.body.model)
        self.body.refuse_unsupported()
        stops = self.body.stops
        answer = Answer(self.service.scheduler, await self.jobs(), self.request)
        begun = await answer.start()
        choices = {number: ChoiceText(stops, self.begins(begun[number])) for number in begun}
        if self.body.stream:
            answer.leave_client()
            chunks = self._chunks(answer, begun, choices)
            return _Stream(answer, chunks)
        return JSONResponse(await self._whole(answer, begun, choices))

    async def _whole(
        self, answer: Answer, begun: dict[int, Begun], choices: dict[int, ChoiceText]
    ) -> dict[str, Any]:
        texts = {number: self.begins(each) for number, each in begun.items()}
        scored = {number: [*self._prompt_scores(each)] for number, each in begun.items()}
        async for number, piece in answer.pieces():
            new, scores = choices[number].add(piece)
            texts[number] += new
            scored[number] += scores
            if choices[number].finish_reason and not piece.finish_reason:
                answer.stop(number)
        done = [
            {"index": n} | self.choice(texts[n], scored[n], choices[n].finish_reason) for n in sorted(choices)
        ]
        self._log(200, begun, choices, texts)
        return self.head | {"object": self.kind, "choices": done, "usage": self._usage(begun, choices)}

    async def _chunks(
        self, answer: Answer, begun: dict[int, Begun], choices: dict[int, ChoiceText]
    ) -> AsyncIterator[str]:
        options = self.body.stream_options
        counted = options is not None and options.include_usage
        head = self.head | {"object": self.chunk_kind} | ({"usage": None} if counted else {})
        texts = {number: self.begins(each) for number, each in begun.items()}
        status = 499  # unless the stream comes to its end, the client has gone away
        try:
            for number, each in begun.items():
                first = self.first_delta(texts[number], self._prompt_scores(each))
                if each.cache is not None:
                    cache = each.cache.first_chunk(each.prompt_tokens, each.prompt)
                    first = (first or self.delta("", [], None)) | {"cache": cache}
                if first:
                    yield _event(head | {"choices": [{"index": number} | first]})
            async for number, piece in answer.pieces():
                choice = choices[number]
                new, scores = choice.add(piece)
                texts[number] += new
                if choice.finish_reason and not piece.finish_reason:
                    answer.stop(number)
                if new or scores or choice.finish_reason:
                    form = self.delta(new, scores, choice.finish_reason)
                    if piece.cache is not None:
                        form["cache"] = piece.cache.chunk(begun[number].prompt_tokens, piece.tokens)
                    yield _event(head | {"choices": [{"index": number} | form]})
            if counted:
                yield _event(head | {"choices": [], "usage": self._usage(begun, choices)})
            yield "data: [DONE]\n\n"
            status = 200
        except APIError as error:  # the status has been sent already
            status = error.status
            yield _event(error.body)
        finally:
            answer.cancel()
            self._log(status, begun, choices, texts)

    def _prompt_scores(self, begun: Begun) -> Scored:
        offsets, at = [], 0
        for score in begun.scores:
            offsets.append((at, score))
            at += len(score.token.decode("utf-8", "replace"))
        return offsets

    def _usage(self, begun: dict[int, Begun], choices: dict[int, ChoiceText]) -> dict[str, Any]:
        firsts = [begun[n] for n in begun if n % self.body.choices == 0]  # a prompt counts once
        return usage(
            sum(each.prompt_tokens for each in firsts),
            sum(each.cached_tokens for each in firsts),
            sum(choice.new_tokens for choice in choices.values()),
        )

    def _log(
        self, status: int, begun: dict[int, Begun], choices: dict[int, ChoiceText], texts: dict[int, str]
    ) -> None:
        used = self._usage(begun, choices)
        seconds = time.monotonic() - self.arrived
        counts = f"{used['prompt_tokens']} + {used['completion_tokens']} tokens"
        log.info("%s %d, %s, %.2f s", self.path, status, counts, seconds)
        if self.service.logs_text:
            for number, text in texts.items():
                log.info("prompt: %s", printable(json.dumps(begun[number].prompt, ensure_ascii=False)))
                log.info("text: %s", printable(json.dumps(text, ensure_ascii=False)))

    def make_jobs(self, prompts: list[Any], asked: int | None, default: int, **more: Any) -> list[Job]:
        """Jobs for prompts that have their choices one after the other. Raises APIError."""
        limits, choices = self.service.limits, self.body.choices
        if asked is not None and asked > limits.max_new_tokens:
            raise APIError(
                400,
                f"max_tokens is too large: {asked}. This server writes at most {limits.max_new_tokens} tokens; ask for "
                "fewer, or start it with a larger --max-new-tokens",
                param="max_tokens",
            )
        most = min(limits.max_choices, limits.max_batch + limits.max_waiting)
        if len(prompts) * choices > most:
            raise APIError(
                400,
                f"prompts times n is {len(prompts)} x {choices}. This server writes at most {most} texts for a request",
                param="n",
            )
        tokens = min(default, limits.max_new_tokens) if asked is None else asked
        deadline = self.arrived + limits.request_seconds
        more["reports_cache"] = self.body.reports_cache
        return [
            Job(prompt, self.body.settings(tokens, choice), _nowhere, deadline, tokens, **more)
            for prompt in prompts
            for choice in range(choices)
        ]


class _Stream(StreamingResponse):
    """Server-sent events. When it ends, for whatever reason, so do its texts: it may end before its first chunk."""

    def __init__(self, answer: Answer, chunks: AsyncIterator[str]) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


def _nowhere(_: Any) -> None:
    """Where a job's pieces go before it has an :class:`Answer`."""


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


class _Completions(_Endpoint):
    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl"
    path = "/v1/completions"

    async def jobs(self) -> list[Job]:
        body = self.body
        if not body.prompts:
            raise APIError(400, "prompt: the list is empty", param="prompt")
        if body.max_tokens == 0 and not body.echo:
            raise APIError(400, "max_tokens=0 is only for echo=true", param="max_tokens")
        return self.make_jobs(
            body.prompts,
            body.max_tokens,
            DEFAULT_COMPLETION_TOKENS,
            logprobs=body.logprobs,
            echo=bool(body.echo),
        )

    def begins(self, begun: Begun) -> str:
        return begun.prompt if self.body.echo else ""

    def choice(self, text: str, scored: Scored, reason: str | None) -> dict[str, Any]:
        scores = None if self.body.logprobs is None else completion_logprobs(scored)
        return {"text": text, "logprobs": scores, "finish_reason": reason}

    def first_delta(self, text: str, scored: Scored) -> dict[str, Any] | None:
        return self.choice(text, scored, None) if text else None

    def delta(self, text: str, scored: Scored, reason: str | None) -> dict[str, Any]:
        return self.choice(text, scored, reason)


class _Chat(_Endpoint):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"
    path = "/v1/chat/completions"

    async def jobs(self) -> list[Job]:
        body = self.body
        messages = [message.as_template() for message in body.messages]
        # In a thread of its own: templates come with models, and may take long.
        prompt, prefix = await asyncio.to_thread(self.service.template.render, messages)
        asked = body.max_completion_tokens or body.max_tokens
        if body.max_tokens == 0:
            raise APIError(400, "max_tokens: use at least 1", param="max_tokens")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        unlimited = self.service.limits.max_new_tokens
        return self.make_jobs([prompt], asked, unlimited, logprobs=logprobs, prefix=prefix, rendered=True)

    def choice(self, text: str, scored: Scored, reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(scored), "finish_reason": reason}

    def first_delta(self, text: str, scored: Scored) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def delta(self, text: str, scored: Scored, reason: str | None) -> dict[str, Any]:
        new = {"content": text} if text else {}
        return {"delta": new, "logprobs": self._logprobs(scored), "finish_reason": reason}

    def _logprobs(self, scored: Scored) -> dict[str, Any] | None:
        return chat_logprobs(scored) if self.body.logprobs and scored else None


# ---- errors


def _answer(error: APIError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return _answer(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    texts: dict[int, str] = {
        404: f"Invalid URL ({request.method} {request.url.path})",
        405: f"Not allowed to {request.method} on {request.url.path}",
        400: "the body could not be parsed as JSON",
    }
    answer = _answer(APIError(error.status_code, texts.get(error.status_code, str(error.detail))))
    answer.headers.update(error.headers or {})
    return answer


_KINDS = {
    "prompt": "a text, token ids, or a list of either",
    "stop": "a text or a list of texts",
    "content": "a text, or a list of parts of type 'text'",
}
"""Arguments that are of one of several kinds."""


async def _invalid(request: Request, error: Exception) -> Response:
    """The first thing that is wrong with a body, as OpenAI's server says it."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    path = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid" or not path:
        sent = request.headers.get("content-type", "none")
        if "json" not in sent.lower():
            return _answer(
                APIError(400, f"the content-type is {sent}: send JSON with content-type: application/json")
            )
        return _answer(APIError(400, "the body is not a JSON object"))
    param = path[0]
    if first["type"] == "extra_forbidden":
        return _answer(
            APIError(400, f"Unrecognized request argument supplied: {'.'.join(path)}", param=param)
        )
    if first["type"] == "missing":
        return _answer(APIError(400, f"you must provide a {'.'.join(path)} parameter", param=param))
    kind = _KINDS.get(path[-2]) if len(path) > 1 and path[-1] == "str" else None
    if kind is not None:  # pydantic names the first kind only
        return _answer(APIError(400, f"{'.'.join(path[:-1])}: give {kind}", param=param))
    return _answer(APIError(400, f"{'.'.join(path)}: {first['msg']}", param=param))


async def _failed(_: Request, error: Exception) -> Response:
    log.error("a request failed", exc_info=error)
    return _answer(APIError(500, "the server failed to answer; its log says why", code="internal_error"))
