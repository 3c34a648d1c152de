"""Servers in this process, on free ports: a tiny SentenceLM, and opt-tiny with and without a memory."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from sentcompress.generation import GenerationSettings, SentenceGenerator
from sentcompress.modeling.llm_loading import load_backbone_tokenizer, load_causal_lm
from sentcompress.recipe import BackboneSpec
from sentcompress.sentence_memory.llm_text import write_text
from sentcompress.sentence_memory.sentence_cache import SentenceMemory
from sentcompress.serving.chat_template import ChatTemplate
from sentcompress.serving.http_app import Service
from sentcompress.serving.limits import ServeLimits
from sentcompress.serving.llm_engine import LLMEngine
from sentcompress.serving.scheduler import Engine, Scheduler
from sentcompress.serving.sentence_engine import SentenceEngine
from sentcompress.serving.server import bind, serve
from sentcompress.testing import tiny_sentence_lm

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass
class Running:
    """A server that answers."""

    url: str
    service: Service

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    @property
    def figures(self) -> Any:
        return self.service.scheduler.figures()

    def complete(self, prompt: Any, **settings: Any) -> Any:
        """The openai client's answer; greedy unless told otherwise."""
        return self.client.completions.create(
            **{"model": "test", "prompt": prompt, "temperature": 0, "max_tokens": 24} | settings
        )

    def text(self, prompt: Any, **settings: Any) -> str:
        return self.complete(prompt, **settings).choices[0].text


@contextmanager
def running(
    engine: Engine,
    tokenizer: Any,
    limits: ServeLimits,
    key: str | None = None,
    template: str | None = TEMPLATE,
) -> Iterator[Running]:
    """A server in threads of this process."""
    service = Service("test", Scheduler(engine, limits), ChatTemplate(tokenizer, template), limits)
    urls: list[str] = []
    ready = threading.Event()

    def answers(url: str) -> None:
        urls.append(url)
        ready.set()

    bound = bind("127.0.0.1", 0)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # an answer that is not read is soon noticed
    thread = threading.Thread(target=serve, args=(service, bound, "127.0.0.1", key, answers))
    thread.start()
    assert ready.wait(30)
    try:
        yield Running(urls[0], service)
    finally:
        service.scheduler.close()
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def run_server() -> Callable[..., Any]:
    """``with run_server(engine, tokenizer, limits) as server``: a server with settings of its own."""
    return running


@pytest.fixture(scope="session")
def template() -> str:
    """The chat template of the tests' servers."""
    return TEMPLATE


@pytest.fixture(scope="session")
def make_memory(opt_tiny: tuple[Any, Any]) -> Callable[[], SentenceMemory]:
    """``make_memory()``: too small for the tests' prompts, so that it drops and recalls."""
    return lambda: SentenceMemory(*opt_tiny, recent_sentences=2, recall=2, recall_blocks="all")


@pytest.fixture(scope="session")
def generator(tokenizer: Any) -> SentenceGenerator:
    return SentenceGenerator(tiny_sentence_lm(len(tokenizer), vae={"max_sentence_tokens": 64}), tokenizer)


@pytest.fixture(scope="session")
def opt_tiny() -> tuple[Any, Any]:
    spec = BackboneSpec(model="opt-tiny")
    return load_causal_lm(spec).eval(), load_backbone_tokenizer(spec)


@pytest.fixture(scope="module", params=["sentence", "llm", "memory"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def make_engine(kind: str, request: pytest.FixtureRequest) -> Callable[[ServeLimits], tuple[Engine, Any]]:
    """``make_engine(limits)``: an engine of this kind, and its tokenizer."""

    def make(limits: ServeLimits) -> tuple[Engine, Any]:
        if kind == "sentence":
            generator = request.getfixturevalue("generator")
            return SentenceEngine(generator, GenerationSettings(), limits), generator.tokenizer
        model, tokenizer = request.getfixturevalue("opt_tiny")
        memory = request.getfixturevalue("make_memory")() if kind == "memory" else None
        return LLMEngine(model, tokenizer, memory, limits), tokenizer

    return make


@pytest.fixture(scope="module")
def server(make_engine: Any) -> Iterator[Running]:
    """A server of each kind."""
    limits = ServeLimits(max_batch=8, max_prompt_tokens=400, max_new_tokens=200, max_body_bytes=100_000)
    engine, tokenizer = make_engine(limits)
    with running(engine, tokenizer, limits) as server:
        yield server


@pytest.fixture(scope="module")
def offline(kind: str, request: pytest.FixtureRequest) -> Callable[..., str]:
    """``offline(prompt, **settings)``: what ``sentcompress generate`` writes after a prompt."""

    def generate(prompt: str, **settings: Any) -> str:
        asked = GenerationSettings(**{"max_new_tokens": 24} | settings)
        if kind == "sentence":
            return request.getfixturevalue("generator").generate([prompt], asked)[0].text
        model, tokenizer = request.getfixturevalue("opt_tiny")
        memory = request.getfixturevalue("make_memory")() if kind == "memory" else None
        pieces: list[str] = []
        write_text(model, tokenizer, prompt, pieces.append, memory=memory, **asked.for_llm())
        return "".join(pieces[1:])

    return generate
