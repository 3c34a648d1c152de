"""``sentcompress generate``: continue a text, a sentence at a time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sentcompress.cli.common import examples, quick_imports
from sentcompress.files import printable
from sentcompress.recipe.choices import CacheKind, HeadKind


def generate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a SentenceLM, such as OUT/graft.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens to write at most.")] = 128,
    max_new_sentences: Annotated[int | None, typer.Option(help="Sentences to write at most.")] = None,
    max_sentence_tokens: Annotated[
        int | None, typer.Option(help="Longest sentence.", show_default="the model's limit")
    ] = None,
    do_sample: Annotated[bool, typer.Option("--do-sample", help="Draw tokens; else the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(help="Divides the logits when sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k likeliest tokens; 0 from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this probability.")] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens already seen are less likely.")
    ] = 1.0,
    stop_threshold: Annotated[
        float, typer.Option(help="Probability at which the stop flag stops; 1 never.")
    ] = 0.5,
    seed: Annotated[int | None, typer.Option(help="Seeds the draws.")] = None,
    head: Annotated[
        HeadKind,
        typer.Option(
            help="How the likeliest token is found; all write the same but shortlist, which knows for each sentence "
            "only the tokens predicted for it."
        ),
    ] = "auto",
    shortlist_tokens: Annotated[int, typer.Option(help="Tokens of a predicted shortlist.")] = 1024,
    cache: Annotated[
        CacheKind,
        typer.Option(
            help="Keep the backbone's keys and values as they are, in 8 bits, or in the computer's memory."
        ),
    ] = "full",
    compile_: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="torch.compile the decoder's step: a CUDA graph on a GPU, for small models faster on a CPU too. The "
            "first sentence waits for it.",
        ),
    ] = False,
    quantize: Annotated[
        str,
        typer.Option(
            metavar="PARTS",
            help="Round weights of encoder, backbone, decoder (commas between them) to 8 bits.",
        ),
    ] = "",
) -> None:
    """Continue PROMPT with a grafted model; sentences appear as they are written."""
    from pydantic import ValidationError

    from sentcompress.errors import InputError
    from sentcompress.registry import describe_validation_error

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise InputError("the prompt is empty", fix="give some text to continue")

    with quick_imports():
        from sentcompress.generation import GenerationSettings, SentenceGenerator
        from sentcompress.modeling.int8 import quantize as quantized
        from sentcompress.modeling.loading import load_saved_tokenizer, load_sentence_lm

    try:
        settings = GenerationSettings(
            max_new_tokens=max_new_tokens,
            max_new_sentences=max_new_sentences,
            max_sentence_tokens=max_sentence_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            stop_threshold=stop_threshold,
            seed=seed,
            head=head,
            shortlist_tokens=shortlist_tokens,
            cache=cache,
            compile=compile_,
        )
    except ValidationError as error:
        raise InputError(describe_validation_error(error, GenerationSettings, "")) from None
    parts = [part.strip() for part in quantize.split(",") if part.strip()]
    generator = SentenceGenerator(quantized(load_sentence_lm(folder), parts), load_saved_tokenizer(folder))
    shown = printable if sys.stdout.isatty() else str  # a file gets the text as it is
    typer.echo(shown(text), nl=False)
    for piece in generator.stream(text, settings):
        typer.echo(shown(piece), nl=False)
        sys.stdout.flush()
    typer.echo()


def add_to(app: typer.Typer) -> None:
    app.command(
        "generate",
        epilog=examples(
            'sentcompress generate out/quickstart/graft "The state of the Union is"',
            'sentcompress generate out/quickstart/graft "My fellow citizens," --do-sample --top-p 0.9 --seed 1',
            'sentcompress generate out/quickstart/graft "The state of the Union is" --cache int8 --quantize decoder',
            "cat speech.txt | sentcompress generate out/quickstart/graft -",
        ),
    )(generate)
