"""``sentcompress generate`` continues a text; ``sentcompress reconstruct`` shows what of it survives the latents."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sentcompress.cli.common import console, examples, quick_imports, user_path
from sentcompress.cli.options import FieldCommand, model_options
from sentcompress.files import checked_text, printable

if TYPE_CHECKING:
    from sentcompress.generation import GenerationSettings


def _default_settings() -> GenerationSettings:
    from sentcompress.generation.settings import DEFAULT_SETTINGS

    return DEFAULT_SETTINGS


@model_options(_default_settings)
def generate(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", parser=user_path, help="Folder of a SentenceLM, such as OUT/graft."),
    ],
    prompt: Annotated[
        str,
        typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from standard input, as UTF-8."),
    ],
    quantize: Annotated[
        str,
        typer.Option(
            metavar="PARTS",
            help="Round the weights of encoder, backbone, decoder (comma-separated) to 8 bits.",
        ),
    ] = "",
    **settings: Any,
) -> None:
    """Continue PROMPT with a grafted model; sentences appear as they are written."""
    from sentcompress.errors import InputError

    text = _standard_input() if prompt == "-" else _argument(prompt, "the prompt")
    if not text.strip():
        raise InputError("the prompt is empty", fix="give some text to continue")

    with quick_imports():
        from sentcompress.generation import GenerationSettings, SentenceGenerator
        from sentcompress.modeling.int8 import quantize as quantized
        from sentcompress.modeling.saved_models import load_saved_tokenizer, load_sentence_lm

    asked = GenerationSettings.checked(settings)
    parts = [part.strip() for part in quantize.split(",") if part.strip()]
    generator = SentenceGenerator(quantized(load_sentence_lm(folder), parts), load_saved_tokenizer(folder))
    shown = printable if sys.stdout.isatty() else str  # a file gets the text as it is
    typer.echo(shown(text), nl=False)
    for piece in generator.stream(text, asked):
        typer.echo(shown(piece), nl=False)
        sys.stdout.flush()
    typer.echo()


def _argument(text: str, what: str) -> str:
    """Text from the command line. It is UTF-8 even where the locale knows ASCII only, as in many containers."""
    with suppress(UnicodeError):
        text = os.fsencode(text).decode()
    return checked_text(text, what)


def _standard_input() -> str:
    """All of standard input, as UTF-8 whatever the locale says: so are the files that a model is trained on."""
    from sentcompress.errors import InputError

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    try:
        return checked_text(sys.stdin.read(), "standard input")
    except UnicodeDecodeError as error:
        raise InputError(
            f"standard input: not UTF-8 (byte {error.start})",
            fix="convert it, such as with: iconv -f ISO-8859-1 -t UTF-8",
        ) from None


def reconstruct(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", parser=user_path, help="Folder of a SentenceVAE or SentenceLM.")
    ],
    sentence: Annotated[
        str, typer.Argument(metavar="SENTENCE", help="Text; it is split into sentences as in training.")
    ],
) -> None:
    """Encode SENTENCE, decode it from its latents alone, and show both side by side.

    [-lost-] is in the original only, {+added+} in the reconstruction only.
    """
    from sentcompress.errors import InputError

    sentence = _argument(sentence, "the sentence")
    if not sentence.strip():
        raise InputError("the sentence is empty", fix="give some text to reconstruct")

    from rich.table import Table
    from rich.text import Text

    from sentcompress.generation import differences
    from sentcompress.generation import reconstruct as write_again
    from sentcompress.modeling.saved_models import (
        load_saved_tokenizer,
        load_sentence_lm,
        load_vae,
        read_config,
    )
    from sentcompress.text.segmentation import sentences_to_ids

    is_vae = read_config(folder)["model_type"] == "sentence-vae"
    vae = load_vae(folder) if is_vae else load_sentence_lm(folder).vae
    tokenizer = load_saved_tokenizer(folder)
    pieces = sentences_to_ids(sentence, vae.config.load_segmenter(tokenizer), tokenizer)
    results = write_again(vae, tokenizer, [ids for _, ids in pieces])
    table = Table("sentence", "reconstruction", "what was lost", "tokens right")
    for result in results:
        shown = Text()
        for part in differences(tokenizer, result):
            mark = {"kept": "{}", "lost": "[-{}-]", "added": "{{+{}+}}"}[part.kind]
            shown.append(mark.format(part.text), style={"lost": "red", "added": "green"}.get(part.kind, ""))
        right = sum(a == b for a, b in zip(result.reference_ids, result.hypothesis_ids, strict=False))
        table.add_row(
            Text(result.reference), Text(result.hypothesis), shown, f"{right} of {len(result.reference_ids)}"
        )
    console().print(table)


def add_to(app: typer.Typer) -> None:
    app.command(
        "generate",
        cls=FieldCommand,
        epilog=examples(
            'sentcompress generate out/quickstart/graft "The state of the Union is"',
            'sentcompress generate out/quickstart/graft "My fellow citizens," --do-sample --top-p 0.9 --seed 1',
            'sentcompress generate out/quickstart/graft "The state of the Union is" --cache int8 --quantize decoder',
            "cat speech.txt | sentcompress generate out/quickstart/graft -",
        ),
    )(generate)
    app.command(
        "reconstruct",
        epilog=examples('sentcompress reconstruct out/quickstart/vae "The people are the Government."'),
    )(reconstruct)
