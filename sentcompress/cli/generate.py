"""``sentcompress generate`` continues a text; ``sentcompress reconstruct`` shows what of it survives the latents."""

from __future__ import annotations

import inspect
import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from sentcompress.cli.common import console, examples, quick_imports, user_path
from sentcompress.cli.options import FieldCommand, model_options
from sentcompress.errors import InputError, ModelFolderError
from sentcompress.files import checked_text, printable, read_json

if TYPE_CHECKING:
    from sentcompress.generation import GenerationSettings


def _default_settings() -> GenerationSettings:
    from sentcompress.generation.settings import DEFAULT_SETTINGS

    return DEFAULT_SETTINGS


@model_options(_default_settings)
def generate(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            parser=user_path,
            help="Folder of a SentenceLM, such as OUT/graft; or an LLM: alias (opt-tiny), hub name, folder, GGUF file.",
        ),
    ],
    prompt: Annotated[
        str,
        typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from standard input, as UTF-8."),
    ],
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="What an LLM attends to, such as window+recall; 'sentcompress plugins' lists memories.",
            show_default="the one it was trained with, or all tokens",
        ),
    ] = None,
    memory_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Option of the memory, such as recall=8, or of where it is stored: storage=int8; repeatable.",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="Data type of an LLM's weights: fp32, bf16 or fp16.")
    ] = "fp32",
    quantize: Annotated[
        str,
        typer.Option(
            metavar="PARTS",
            help="Round the weights of a SentenceLM's encoder, backbone, decoder (comma-separated) to 8 bits.",
        ),
    ] = "",
    **settings: Any,
) -> None:
    """Continue PROMPT with a SentenceLM, or with an LLM and a sentence memory; text appears as it is written."""
    text = _standard_input() if prompt == "-" else _argument(prompt, "the prompt")
    if not text.strip():
        raise InputError("the prompt is empty", fix="give some text to continue")

    with quick_imports():
        from sentcompress.generation import GenerationSettings, SentenceGenerator
        from sentcompress.generation.settings import LLM_SAMPLING
        from sentcompress.modeling.int8 import quantize as quantized
        from sentcompress.modeling.saved_models import load_saved_tokenizer, load_sentence_lm

    asked = GenerationSettings.checked(settings)
    changed = asked.model_dump(exclude_defaults=True)
    if not asked.do_sample and (unused := [name for name in LLM_SAMPLING if name in changed]):
        option = f"--{unused[0].replace('_', '-')}"
        _refuse(option, "sampling, which is off", "add --do-sample, or leave it out")
    if _is_llm(model):
        if quantize:
            _refuse("--quantize", "a SentenceLM", "--dtype bf16 halves the bytes of an LLM's weights")
        _write_with_llm(str(model), text, memory, memory_option or [], dtype, asked)
        return
    if memory is not None or memory_option:
        _refuse(
            "--memory",
            "an LLM",
            f"leave it out: '{model}' holds a SentenceLM, which reads whole sentences anyway",
        )
    if dtype != "fp32":
        _refuse("--dtype", "an LLM", "--quantize makes a SentenceLM smaller")
    parts = [part.strip() for part in quantize.split(",") if part.strip()]
    generator = SentenceGenerator(quantized(load_sentence_lm(model), parts), load_saved_tokenizer(model))
    pieces = generator.stream(text, asked)
    _show(text)
    for piece in pieces:
        _show(piece)
    typer.echo()


def _show(text: str) -> None:
    typer.echo(printable(text) if sys.stdout.isatty() else text, nl=False)  # a file gets the text as it is
    sys.stdout.flush()


def _refuse(option: str, what: str, fix: str) -> NoReturn:
    raise InputError(f"{option} is for {what}", fix=fix)


def _is_llm(model: Path) -> bool:
    """Whether it is an LLM as it is, not a model of sentcompress, going by the model type in its folder.

    Raises:
        ModelFolderError: a path to a folder that does not exist.
    """
    if model.is_dir():
        if not (model / "config.json").is_file():
            return not any(model.glob("*/config.json"))  # not a run: the LLM's loader says what is missing
        config = read_json(model / "config.json")
        return isinstance(config, dict) and config.get("model_type") not in ("sentence-lm", "sentence-vae")
    within = len(model.parts) > 2 or (len(model.parts) == 2 and model.parent.is_dir())
    if within and model.suffix != ".gguf":
        raise ModelFolderError(
            f"no folder '{model}'", fix="give the folder of a model, or an LLM: an alias or a hub name"
        )
    return True


def _write_with_llm(
    name: str, prompt: str, memory: str | None, options: list[str], dtype: str, settings: GenerationSettings
) -> None:
    """Continue a prompt with an LLM, and say on stderr what its memory held."""
    with quick_imports():
        import torch

        from sentcompress.modeling.llm_loading import load_backbone_tokenizer, load_causal_lm
        from sentcompress.modeling.saved_models import load_split
        from sentcompress.modeling.split import SPLIT
        from sentcompress.recipe import BackboneSpec
        from sentcompress.sentence_memory.arguments import SETTINGS, read_settings
        from sentcompress.sentence_memory.llm_text import write_text
        from sentcompress.sentence_memory.sentence_cache import SentenceMemory

    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype not in types:
        raise InputError(f"--dtype: there is no type '{dtype}'", fix=f"use {', '.join(types)}")
    arguments = settings.for_llm()
    changes = dict(map(_memory_option, options))
    trained = (Path(name) / SETTINGS).is_file()
    if changes and not trained and memory is None:
        raise InputError("--memory-option needs a memory", fix="add --memory window+recall")
    is_split = (Path(name) / SPLIT).is_file()
    if is_split and memory is not None:
        _refuse("--memory", "an LLM that is not split", "leave it out")
    if memory is not None:
        SentenceMemory.check(memory, **changes)  # the tokenizer and the LLM may take half a minute to load
    spec = BackboneSpec(model=name)
    typer.echo(f"generate: loading {printable(name)} ...", err=True)
    tokenizer = load_backbone_tokenizer(spec)
    if trained:
        memory, saved = read_settings(name, tokenizer, memory)
        changes = saved | changes
        SentenceMemory.check(memory, **changes)
    llm = load_split(name)[0] if is_split else load_causal_lm(spec).eval()
    llm = llm.to("cuda" if torch.cuda.is_available() else "cpu", types[dtype])
    held = None
    if memory is not None:
        typer.echo(f"generate: testing it with the memory {memory} ...", err=True)
        held = SentenceMemory(llm, tokenizer, memory, **changes)
    write_text(llm, tokenizer, prompt, _show, memory=held, **arguments)
    typer.echo()
    if held is not None:
        here, stored, full = (
            f"{size / 2**20:.1f} MiB"
            for size in (held.device_bytes(), held.storage_bytes(), held.full_bytes())
        )
        slow = f", and {stored} in slow storage" if held.storage_bytes() else ""
        typer.echo(
            f"The memory {held.policy.name} holds {here}{slow}. A cache of all tokens would hold {full}.",
            err=True,
        )


def _memory_option(text: str) -> tuple[str, Any]:
    """``recall=8`` as a name and a value: an option of a memory, which checks it, or an argument of SentenceMemory."""
    import yaml

    from sentcompress.sentence_memory.sentence_cache import SentenceMemory

    name, equals, value = text.partition("=")
    arguments = inspect.signature(SentenceMemory).parameters
    known = arguments.get(name)
    if (
        not equals
        or not name.isidentifier()
        or (known and (known.kind is not known.KEYWORD_ONLY or name == "prove"))
    ):
        raise InputError(
            f"--memory-option: '{text}' is not an option of a memory", fix="write it as recall=8"
        )
    kinds = str(known.annotation) if known else ""
    if known and "int" not in kinds and "bool" not in kinds:
        return name, value
    with suppress(yaml.YAMLError):
        value = yaml.safe_load(value)
    if known and "int" in kinds and "Sequence" not in kinds and type(value) is not int:
        raise InputError(f"--memory-option {name}: '{value}' is not a whole number", fix=f"write {name}=64")
    return name, value


def _argument(text: str, what: str) -> str:
    """Text from the command line. It is UTF-8 even where the locale knows ASCII only, as in many containers."""
    with suppress(UnicodeError):
        text = os.fsencode(text).decode()
    return checked_text(text, what)


def _standard_input() -> str:
    """All of standard input, as UTF-8 whatever the locale says: so are the files that a model is trained on."""
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
            'sentcompress generate opt-tiny "The state of the Union is" --memory window+recall',
            'sentcompress generate opt-tiny "My fellow citizens," --memory window --memory-option recent_sentences=4',
        ),
    )(generate)
    app.command(
        "reconstruct",
        epilog=examples('sentcompress reconstruct out/quickstart/vae "The people are the Government."'),
    )(reconstruct)
