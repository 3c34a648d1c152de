"""``sentcompress serve``: a model behind OpenAI's HTTP API."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sentcompress.cli.common import examples, quick_imports, user_path
from sentcompress.cli.model_loading import (
    DtypeOption,
    MemoryOption,
    MemorySettings,
    ModelArgument,
    QuantizeOption,
    is_llm,
    load_llm,
    load_quantized,
    refuse_for_llm,
    refuse_for_sentence_lm,
)
from sentcompress.cli.options import FieldCommand, model_options
from sentcompress.errors import InputError
from sentcompress.files import printable

if TYPE_CHECKING:
    from sentcompress.serving.limits import ServeLimits


def _default_limits() -> ServeLimits:
    from sentcompress.serving.limits import ServeLimits

    return ServeLimits()


@model_options(_default_limits)
def serve(
    model: ModelArgument,
    memory: MemoryOption = None,
    memory_option: MemorySettings = None,
    dtype: DtypeOption = "fp32",
    quantize: QuantizeOption = "",
    host: Annotated[
        str, typer.Option(help="Address to listen on. One that other machines reach needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name of the model for clients.", show_default="MODEL")
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=user_path,
            help="File with the API key that clients must send; without it, SENTCOMPRESS_API_KEY.",
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=user_path,
            help="Jinja template of a chat, in place of the tokenizer's own.",
        ),
    ] = None,
    log_text: Annotated[
        bool, typer.Option("--log-text", help="Log prompts and answers too; otherwise only their lengths.")
    ] = False,
    **limits: Any,
) -> None:
    """Answer requests of programs that speak OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models.

    Also /health, /metrics (Prometheus), and a page at / to try it with. SIGTERM and Ctrl-C let running requests end.
    """
    from sentcompress.serving.limits import ServeLimits, read_api_key

    try:
        with quick_imports():
            from sentcompress.serving.chat_template import ChatTemplate
            from sentcompress.serving.http_app import Service
            from sentcompress.serving.scheduler import Scheduler
            from sentcompress.serving.server import bind, check_address, log_to_stderr
            from sentcompress.serving.server import serve as answer_requests
    except ImportError as error:
        raise InputError(
            f"sentcompress serve needs {error.name}", fix="pip install 'sentcompress[serve]'"
        ) from None

    allowed = ServeLimits.checked(limits)
    key = read_api_key(api_key_file)
    check_address(host, key)
    bound = bind(host, port)
    engine, tokenizer = _engine(model, memory, memory_option or [], dtype, quantize, allowed)
    template = ChatTemplate.from_file(tokenizer, chat_template)
    log_to_stderr()
    service = Service(name or str(model), Scheduler(engine, allowed), template, allowed, log_text)

    def ready(url: str) -> None:
        typer.echo(f"serve: {printable(service.name)} at {url}/v1 (a page: {url}; Ctrl-C ends it)", err=True)

    answer_requests(service, bound, host, key, ready)


def _engine(
    model: Path, memory: str | None, options: list[str], dtype: str, quantize: str, limits: ServeLimits
) -> tuple[Any, Any]:
    """The engine that writes with the model, and the tokenizer."""
    if is_llm(model):
        refuse_for_llm(quantize)
        from sentcompress.serving.llm_engine import LLMEngine

        llm, tokenizer, held = load_llm("serve", str(model), memory, options, dtype)
        return LLMEngine(llm, tokenizer, held, limits), tokenizer
    refuse_for_sentence_lm(model, memory, options, dtype)
    from sentcompress.generation import GenerationSettings, SentenceGenerator
    from sentcompress.modeling.saved_models import load_saved_tokenizer
    from sentcompress.serving.sentence_engine import SentenceEngine

    generator = SentenceGenerator(load_quantized(model, quantize), load_saved_tokenizer(model))
    return SentenceEngine(generator, GenerationSettings(), limits), generator.tokenizer


def add_to(app: typer.Typer) -> None:
    app.command(
        "serve",
        cls=FieldCommand,
        epilog=examples(
            "sentcompress serve opt-tiny",
            "sentcompress serve opt-tiny --memory window+recall --port 8001",
            "sentcompress serve out/quickstart/graft --api-key-file key.txt --host 0.0.0.0",
        ),
    )(serve)
