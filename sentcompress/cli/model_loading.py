"""MODEL and the options that go with it: a SentenceLM, or an LLM with or without a sentence memory."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from sentcompress.cli.common import quick_imports, user_path
from sentcompress.errors import InputError, ModelFolderError, SentCompressError
from sentcompress.files import printable, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sentcompress.modeling import SentenceLM
    from sentcompress.sentence_memory.sentence_cache import SentenceMemory

ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        parser=user_path,
        help="Folder of a SentenceLM, such as OUT/graft; or an LLM: alias (opt-tiny), hub name, folder, GGUF file.",
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="NAMES",
        help="What an LLM attends to, such as window+recall; 'sentcompress plugins' lists memories.",
        show_default="the one it was trained with, or all tokens",
    ),
]
MemorySettings = Annotated[
    list[str] | None,
    typer.Option(
        "--memory-option",
        metavar="NAME=VALUE",
        help="Option of the memory, such as recall=8, or of where it is stored: storage=int8; repeatable.",
    ),
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", metavar="TYPE", help="Data type of an LLM's weights: fp32, bf16 or fp16.")
]
QuantizeOption = Annotated[
    str,
    typer.Option(
        "--quantize",
        metavar="PARTS",
        help="Round the weights of a SentenceLM's encoder, backbone, decoder (comma-separated) to 8 bits.",
    ),
]


def refuse(option: str, what: str, fix: str) -> NoReturn:
    raise InputError(f"{option} is for {what}", fix=fix)


def refuse_for_llm(quantize: str) -> None:
    """Refuse what only a SentenceLM has. Raises InputError."""
    if quantize:
        refuse("--quantize", "a SentenceLM", "--dtype bf16 halves the bytes of an LLM's weights")


def refuse_for_sentence_lm(
    model: Path, memory: str | None, memory_option: list[str] | None, dtype: str
) -> None:
    """Refuse what only an LLM has. Raises InputError."""
    if memory is not None or memory_option:
        refuse(
            "--memory",
            "an LLM",
            f"leave it out: '{model}' holds a SentenceLM, which reads whole sentences anyway",
        )
    if dtype != "fp32":
        refuse("--dtype", "an LLM", "--quantize makes a SentenceLM smaller")


def is_llm(model: Path) -> bool:
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


def load_quantized(folder: Path, quantize: str) -> SentenceLM:
    """A SentenceLM, with the parts that ``quantize`` names in 8 bits."""
    from sentcompress.modeling.int8 import quantize as quantized
    from sentcompress.modeling.saved_models import load_sentence_lm

    parts = [part.strip() for part in quantize.split(",") if part.strip()]
    return quantized(load_sentence_lm(folder), parts)


def load_llm(
    command: str, name: str, memory: str | None, options: list[str], dtype: str
) -> tuple[PreTrainedModel, Any, SentenceMemory | None]:
    """An LLM on a GPU if there is one, its tokenizer, and its empty memory; says on stderr what takes long.

    Args:
        command: the one that loads it.
        name: alias, hub name, folder or GGUF file.
        memory: names of memories; None takes the one it was trained with, or none.
        options: of the memory, as ``NAME=VALUE``.

    Raises:
        InputError: an option is wrong or does not fit the LLM.
    """
    with quick_imports():
        import torch

        from sentcompress.modeling.llm_loading import load_backbone_tokenizer, load_causal_lm
        from sentcompress.modeling.saved_models import load_split
        from sentcompress.modeling.split import SPLIT
        from sentcompress.recipe import BackboneSpec
        from sentcompress.sentence_memory.arguments import SETTINGS, read_settings
        from sentcompress.sentence_memory.sentence_cache import SentenceMemory

    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype not in types:
        raise InputError(f"--dtype: there is no type '{dtype}'", fix=f"use {', '.join(types)}")
    changes = dict(map(memory_argument, options))
    trained = (Path(name) / SETTINGS).is_file()
    if changes and not trained and memory is None:
        raise InputError("--memory-option needs a memory", fix="add --memory window+recall")
    is_split = (Path(name) / SPLIT).is_file()
    if is_split and memory is not None:
        refuse("--memory", "an LLM that is not split", "leave it out")
    if memory is not None:
        SentenceMemory.check(memory, **changes)  # the tokenizer and the LLM may take half a minute to load
    spec = BackboneSpec(model=name)
    typer.echo(f"{command}: loading {printable(name)} ...", err=True)
    with _without_field():
        tokenizer = load_backbone_tokenizer(spec)
    if trained:
        memory, saved = read_settings(name, tokenizer, memory)
        changes = saved | changes
        SentenceMemory.check(memory, **changes)
    with _without_field():
        llm = load_split(name)[0] if is_split else load_causal_lm(spec).eval()
    llm = llm.to("cuda" if torch.cuda.is_available() else "cpu", types[dtype])
    if memory is None:
        return llm, tokenizer, None
    typer.echo(f"{command}: testing it with the memory {memory} ...", err=True)
    return llm, tokenizer, SentenceMemory(llm, tokenizer, memory, **changes)


@contextmanager
def _without_field() -> Iterator[None]:
    """The loader's messages name a field of a recipe, which these commands do not have."""
    try:
        yield
    except SentCompressError as error:
        error.message = error.message.removeprefix("backbone.model: ")
        raise


def memory_argument(text: str) -> tuple[str, Any]:
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
