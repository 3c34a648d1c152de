"""Requests and answers in the form of OpenAI's server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from sentcompress.files import printable
from sentcompress.generation import GenerationSettings
from sentcompress.generation.settings import MIN_TEMPERATURE
from sentcompress.serving.scheduler import TokenScore

Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]
"""A list whose first mistake is the last that is looked for: a body has room for half a million of them."""
SEEDS = 2**63
MAX_STOPS = 4


class APIError(Exception):
    """An error that the client gets, in OpenAI's form.

    Args:
        status: of HTTP.
        message: what is wrong, and what to do about it.
        param: the argument of the request that it is about.
        code: for programs.
        retry_after: seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        self.body = {
            "error": {
                "message": printable(message),
                "type": _error_type(status),
                "param": None if param is None else printable(param),
                "code": code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


def _error_type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


# ---- requests


class _Form(BaseModel):
    """JSON of a client: an unknown argument is refused, and so is a value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Form):
    include_usage: bool = False
    include_obfuscation: bool = False
    include_cache: bool = False
    """Not OpenAI's: each chunk says what the text's cache holds."""


class _Request(_Form):
    """What both kinds of requests have. OpenAI's arguments that change nothing here are taken and left unused."""

    model: str
    n: int | None = Field(default=None, ge=1, le=128)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    max_tokens: int | None = Field(default=None, ge=0)
    seed: int | None = Field(default=None, ge=-SEEDS, lt=SEEDS)
    stop: str | Items[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def choices(self) -> int:
        """Texts for each prompt."""
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer. Raises APIError."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS or not all(stops):
            raise APIError(400, f"stop: give at most {MAX_STOPS} texts, none of them empty", param="stop")
        return stops

    @property
    def reports_cache(self) -> bool:
        """The stream says what the caches hold."""
        return self.stream_options is not None and self.stream_options.include_cache

    def refuse_unsupported(self) -> None:
        """Refuse arguments that would change the answer and cannot here. Raises APIError."""
        for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
            if getattr(self, name):
                raise _unsupported(name)
        if self.stream_options is not None and not self.stream:
            raise APIError(400, "stream_options is only for stream=true", param="stream_options")

    def settings(self, tokens: int, choice: int) -> GenerationSettings:
        """How one choice is written. The first choice of a seed is what ``generate`` writes with it."""
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        if temperature < MIN_TEMPERATURE or not top_p:
            return GenerationSettings(max_new_tokens=max(1, tokens))
        seed = None if self.seed is None else (self.seed + choice) % SEEDS
        return GenerationSettings(
            max_new_tokens=max(1, tokens), do_sample=True, temperature=temperature, top_p=top_p, seed=seed
        )


class CompletionRequest(_Request):
    """The body of ``/v1/completions``."""

    prompt: str | Items[str] | Items[int] | Items[Items[int]]
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.best_of is not None and self.best_of != self.choices:
            raise _unsupported("best_of")
        if self.suffix:
            raise _unsupported("suffix")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each text or token ids."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        return list(prompt)


class TextPart(_Form):
    type: Literal["text"]
    text: str


class ChatMessage(_Form):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Items[TextPart]
    name: str | None = None

    def as_template(self) -> dict[str, str]:
        """The message as chat templates know it."""
        role = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": role, "content": text}


class ResponseFormat(_Form):
    type: Literal["text"]


class ChatRequest(_Request):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[Items[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.tools:
            raise _unsupported("tools")
        if self.tool_choice not in (None, "none", "auto"):
            raise _unsupported("tool_choice")
        if self.top_logprobs is not None and not self.logprobs:
            raise APIError(400, "top_logprobs is only for logprobs=true", param="top_logprobs")


def _unsupported(name: str) -> APIError:
    return APIError(
        400, f"{name} is not supported by this server; leave it out", param=name, code="unsupported_parameter"
    )


# ---- answers


def usage(prompt_tokens: int, cached_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Tokens of a request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


Scored = Sequence[tuple[int, TokenScore]]
"""Tokens with the characters of text before each."""


def completion_logprobs(scored: Scored) -> dict[str, Any]:
    """``logprobs`` of a choice of ``/v1/completions``."""
    return {
        "tokens": [_text(score.token) for _, score in scored],
        "token_logprobs": [score.logprob for _, score in scored],
        "top_logprobs": [
            None if score.logprob is None else {_text(token): p for token, p in reversed(score.top)}
            for _, score in scored
        ],
        "text_offset": [offset for offset, _ in scored],
    }


def chat_logprobs(scored: Scored) -> dict[str, Any]:
    """``logprobs`` of a choice of ``/v1/chat/completions``."""

    def entry(token: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": _text(token), "logprob": logprob, "bytes": list(token)}

    content = [
        entry(score.token, score.logprob) | {"top_logprobs": [entry(*each) for each in score.top]}
        for _, score in scored
    ]
    return {"content": content, "refusal": None}


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")
