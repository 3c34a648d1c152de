"""Commands of one stage each, such as ``graft`` and ``baseline``. How a command gets a recipe."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from sentcompress.cli.common import (
    BackboneOption,
    DataOption,
    DryRunOption,
    OutOption,
    OverwriteOption,
    RecipeArgument,
    ResumeOption,
    RevisionOption,
    SetOption,
    examples,
)
from sentcompress.cli.options import FieldCommand, override, recipe_options
from sentcompress.errors import InputError
from sentcompress.files import expand_home

if TYPE_CHECKING:
    from sentcompress.recipe import Recipe


_ABOUT = ("readme", "license", "licence", "notice", "changelog")
"""Beginnings of the names of files that describe a corpus and are not part of it."""


class StageCommand(NamedTuple):
    """A command that runs one stage of a recipe."""

    name: str
    stage: str
    summary: str
    examples: tuple[str, ...]
    options: dict[str, str] = {}
    """Further options, and the recipe fields they set."""
    recipe: str = "quickstart"
    """Name of the recipe, unless one is given."""

    def stages(self, recipe: Recipe) -> list[str]:
        """The stage, or all whose names begin with it.

        Raises:
            InputError: the recipe has none of them.
        """
        if not self.stage.endswith("-"):
            return [self.stage]
        from sentcompress.pipeline import stages_of

        found = [name for name in stages_of(recipe) if name.startswith(self.stage)]
        if not found:
            fix = "add one: --set 'opponents={equal-cost: {}}'"
            if recipe.opponents:
                fix = "they are opponents of a graft: remove the section 'memory' or 'pretrain'"
            raise InputError("the recipe has no opponents to train", fix=fix)
        return found

    def function(self) -> Callable[..., None]:
        """The function of the command."""

        def command(
            recipe: RecipeArgument = self.recipe,
            backbone: BackboneOption = None,
            revision: RevisionOption = None,
            data: DataOption = None,
            out: OutOption = None,
            set_: SetOption = None,
            resume: ResumeOption = False,
            overwrite: OverwriteOption = False,
            dry_run: DryRunOption = False,
        ) -> None:
            resolved = resolve(recipe, set_, backbone=backbone, revision=revision, data=data)
            execute(
                resolved,
                out,
                stages=self.stages(resolved),
                resume=resume,
                overwrite=overwrite,
                dry_run=dry_run,
            )

        command.__doc__ = self.summary
        return recipe_options(**self.options)(command) if self.options else command


COMMANDS = (
    StageCommand(
        "train-vae",
        "vae",
        "Train a SentenceVAE: sentences to latents and back. Writes OUT/vae.",
        (
            "sentcompress train-vae",
            "sentcompress train-vae --data 'corpus/*.jsonl' --out out/mine",
            "sentcompress train-vae paper/vae-768-h1 --backbone opt-125m --dry-run",
        ),
    ),
    StageCommand(
        "graft",
        "graft",
        "Graft a SentenceVAE onto an LLM and fine-tune both. Writes OUT/graft.\n\n"
        "To keep the LLM whole and fine-tune it for a sentence memory: sentcompress train-memory.",
        (
            "sentcompress graft --out out/quickstart",
            "sentcompress graft --backbone opt-1.3b --vae out/paper-vae-2048-h1/vae --set graft.tune=lora",
            "sentcompress graft paper/sllm-125m-h1 --vae out/paper-vae-768-h1/vae --dry-run",
        ),
        {"vae": "graft.vae"},
    ),
    StageCommand(
        "train-memory",
        "memory",
        "Fine-tune an LLM with a sentence memory in effect. Writes OUT/memory, an ordinary causal LM.\n\n"
        "The number of recent and recalled sentences is drawn anew for each batch, so one model serves all settings.",
        (
            "sentcompress train-memory --backbone smollm2-135m --out out/memory",
            "sentcompress train-memory --data 'corpus/*.jsonl' --memory window+entries --set memory.steps=100",
            "sentcompress baseline memory --out out/memory",
        ),
        {"memory": "memory.name"},
        "memory",
    ),
    StageCommand(
        "baseline",
        "baseline",
        "Fine-tune the LLM token by token, for comparison. Writes OUT/baseline.\n\n"
        "It reads the same passages as the graft or memory of the recipe, for the same number of steps.",
        (
            "sentcompress baseline --out out/quickstart",
            "sentcompress baseline paper/sllm-125m-h1 --data corpus.jsonl --set baseline.learning_rate=1e-5",
        ),
    ),
    StageCommand(
        "opponents",
        "opponent-",
        "Train the recipe's token-level opponents of equal cost. Writes OUT/opponent-NAME.\n\n"
        "Each is the LLM with as many blocks as make a token cost what it costs with the graft. It reads the graft's "
        "passages, for the same number of steps.",
        (
            "sentcompress opponents strong --out out/strong",
            "sentcompress opponents smollm2 --set opponents.equal-cost.keep=ends",
        ),
    ),
)


def add_to(app: typer.Typer) -> None:
    for command in COMMANDS:
        kind = FieldCommand if command.options else None
        app.command(command.name, cls=kind, epilog=examples(*command.examples))(command.function())


def resolve(
    recipe: str,
    overrides: list[str] | None,
    *,
    backbone: str | None = None,
    revision: str | None = None,
    data: str | None = None,
    on_bad_line: str | None = None,
) -> Recipe:
    """Read a recipe, change it by the options (``--set`` overrides them) and check it.

    Raises:
        RecipeError: the recipe or an override is wrong.
        PluginError: it names a component that is missing or broken.
        InputError: ``data`` does not exist.
    """
    from sentcompress.recipe import load_recipe

    changes: list[str] = []
    if backbone is not None:
        changes += backbone_overrides(backbone, revision)
    elif revision is not None:
        changes.append(override("backbone.revision", revision))
    if data is not None:
        changes.append(override("data", data_section(data)))
    if on_bad_line is not None:
        changes.append(override("data.options.on_bad_line", on_bad_line))
    loaded = load_recipe(recipe, [*changes, *(overrides or [])])
    loaded.check_components()
    return loaded


def execute(
    recipe: Recipe,
    out: Path | None,
    *,
    stages: list[str] | None,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
) -> Path:
    """Run stages of a recipe, or print their plan.

    Args:
        stages: names of stages in order; None runs all that the recipe has.

    Returns:
        the folder of the run.
    """
    folder = out or Path("out") / recipe.name.replace("/", "-")
    if dry_run:
        from sentcompress.estimate.plan import plan

        typer.echo(plan(recipe))
        return folder
    from sentcompress.pipeline import run_recipe

    run_recipe(recipe, folder, stages=stages, resume=resume, overwrite=overwrite)
    return folder


def backbone_overrides(model: str, revision: str | None = None) -> list[str]:
    """Overrides for ``--backbone`` and ``--revision``; the adapter is chosen again, by the model."""
    return [
        override("backbone", {"model": model} if revision is None else {"model": model, "revision": revision})
    ]


def data_section(path: str) -> dict[str, Any]:
    """The recipe's ``data`` for ``--data PATH``, chosen by the names of the files there, or by what is in the first.

    Of a folder, one kind of file is read, and what is left out is printed.

    Raises:
        InputError: there is no such file or folder, it is something else, such as a pipe, or a glob matches files of
            several kinds.
    """
    from sentcompress.datasets._files import SUFFIXES, files_of, left_out, path_of, say_left_out

    path = expand_home(path)
    suffixes = tuple(suffix for kind in SUFFIXES.values() for suffix in kind)
    is_folder = path_of(path).is_dir() if path.strip() else False
    found = files_of(path, suffixes)
    if not found and is_folder and files_of(lists := f"{glob.escape(path)}/**/*.json", suffixes):
        return {"name": "jsonl", "options": {"paths": [lists]}}
    if not found:
        listed = ", ".join(f"*{suffix}" for suffix in suffixes)
        others = left_out(path_of(path), suffixes) if is_folder else ""
        raise InputError(
            f"--data {path}: no file there" + (f" that sentcompress reads, only {others}" if others else ""),
            fix=f"give a file, a glob, or a folder with files such as {listed}; for a dataset of the hub, use "
            "--set data.name=hub --set data.options.path=NAME",
        )
    # A README beside a corpus does not make the corpus plain text.
    data = [file for file in found if not file.name.lower().startswith(_ABOUT)] or found
    counts = {name: sum(_is_of_kind(file, kind) for file in data) for name, kind in SUFFIXES.items()}
    kinds = [name for name, count in counts.items() if count]
    if is_folder:
        # It is searched by suffix: JSON lines in a file with another suffix would not be found there.
        name = kinds[0]
        say_left_out(path, SUFFIXES[name])
    elif len(kinds) > 1:
        raise InputError(
            f"--data {path}: matches files of several kinds: "
            + ", ".join(f"{counts[kind]} of '{kind}'" for kind in kinds),
            fix="write a glob that matches one kind, such as 'folder/*.jsonl', or combine datasets with 'mix'",
        )
    else:
        name = kinds[0] if kinds and kinds != ["text"] else _kind_of_content(data[0])
    return {"name": name, "options": {"paths": [path]}}


def _is_of_kind(file: Path, suffixes: tuple[str, ...]) -> bool:
    from sentcompress.datasets._packed import without_packing

    return without_packing(file.name).endswith(suffixes)


def _kind_of_content(path: Path) -> str:
    """The dataset for a file whose name does not tell; ``text`` gets the unknown ones, and refuses what is not text."""
    from sentcompress.datasets._packed import read_pieces, start_of, without_packing

    start = start_of(path)
    if start.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        return "parquet"
    try:
        text = next(read_pieces(path), b"").removeprefix(b"\xef\xbb\xbf").lstrip()
        if re.match(rb'\[\s*\{\s*"', text) or (
            text.startswith(b"{") and without_packing(path.name).endswith(".json")
        ):
            return "jsonl"
        return "jsonl" if isinstance(json.loads(text.partition(b"\n")[0]), dict) else "text"
    except (InputError, ValueError, RecursionError):
        # Not JSON, not UTF-8 or damaged: the text dataset reports what is wrong with it, if anything.
        return "text"
