"""What the subcommands of ``bench`` share: their arguments, what they measure, showing results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sentcompress.cli.common import console, user_path
from sentcompress.cli.options import override

if TYPE_CHECKING:
    from sentcompress.benchmark.results import Results
    from sentcompress.recipe import Recipe

FolderArgument = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        help="Folder of a run (out/quickstart) or of a model (out/quickstart/graft).",
        parser=user_path,
    ),
]
OptionalFolder = Annotated[
    Path | None,
    typer.Argument(
        metavar="[DIR]", parser=user_path, help="Folder of a run or model; not needed with --init random."
    ),
]
InitOption = Annotated[
    Literal["random"] | None,
    typer.Option(help="Measure random weights in the shapes of --backbone: no training, no download."),
]
RecipeOption = Annotated[
    str, typer.Option(metavar="RECIPE", help="Recipe to take text and shapes from when DIR is not given.")
]
LLMArgument = Annotated[
    str,
    typer.Argument(
        metavar="LLM", help="An alias (smollm2-135m), hub name, folder or GGUF file; or the folder of a run."
    ),
]
LLM_BENCH = {"max_documents": 4, "max_bytes_per_document": 16000}
"""Bench settings where there is no recipe."""
ResultsOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        parser=user_path,
        help="Where results go.",
        show_default="bench in the folder",
    ),
]


def measure(
    names: list[str] | None,
    folder: Path,
    out: Path | None,
    overrides: list[str] | None,
    changes: Mapping[str, Any] | None = None,
) -> Results:
    """Measure a folder and show the results.

    Args:
        names: measurements; None takes the recipe's.
        overrides: fields of the recipe, such as ``bench.repeats=9``.
        changes: fields of ``bench`` that the results do not record in their recipe.
    """
    from sentcompress.benchmark.models import ModelFolder
    from sentcompress.benchmark.runner import run_bench

    found = ModelFolder(folder)
    target = out or found.path / "bench"
    results = run_bench(names, found, found.recipe(overrides), target, changes=changes)
    show(results, target, names)
    return results


def measure_llm(
    names: list[str],
    llm: str,
    data: str | None,
    out: Path | None,
    overrides: list[str],
    changes: Mapping[str, Any] | None = None,
) -> Results:
    """Measure an LLM that nothing was trained for, or the folder of a run, and show the results."""
    from sentcompress.benchmark.models import is_llm
    from sentcompress.benchmark.runner import run_bench
    from sentcompress.cli.train import backbone_overrides, data_section
    from sentcompress.errors import InputError
    from sentcompress.recipe import build_recipe

    if not is_llm(llm):
        if data is not None:
            raise InputError("--data: a run is measured on its own text", fix="leave --data out")
        return measure(names, user_path(llm), out, overrides, changes)
    text = [] if data is None else [override("data", data_section(data))]
    name = Path(llm).name or llm
    raw = {"name": name, "bench": LLM_BENCH}
    recipe = build_recipe(raw, [*backbone_overrides(llm), *text, *overrides], "the command line")
    recipe.check_components()
    target = out or Path("out") / f"bench-{name}"
    results = run_bench(names, None, recipe, target, changes=changes)
    show(results, target, names)
    return results


def measure_random(
    names: list[str],
    backbone: str | None,
    init: str | None,
    recipe: str,
    out: Path | None,
    overrides: list[str],
    changes: Mapping[str, Any] | None = None,
) -> Results:
    """Measure random weights in a recipe's shapes and show the results."""
    from sentcompress.benchmark.runner import run_bench

    resolved = random_recipe(recipe, backbone, init, overrides)
    target = out or random_folder(resolved)
    results = run_bench(names, None, resolved, target, changes=changes)
    show(results, target, names)
    return results


def random_recipe(recipe: str, backbone: str | None, init: str | None, overrides: list[str]) -> Recipe:
    """A recipe whose backbone has random weights. Raises InputError unless ``--init random`` was given."""
    from sentcompress.cli.train import resolve
    from sentcompress.errors import InputError

    if init is None:
        raise InputError(
            "no folder of a model was given", fix="give DIR, or add --init random to measure random weights"
        )
    return resolve(recipe, [*overrides, "backbone.init=random"], backbone=backbone)


def random_folder(recipe: Recipe) -> Path:
    """Where results of random weights go."""
    return Path("out") / f"bench-{Path(recipe.backbone.model).name}"


def require_only_folder(backbone: str | None, init: str | None) -> None:
    """Refuse random weights beside a folder. Raises InputError."""
    from sentcompress.errors import InputError

    if backbone is not None or init is not None:
        raise InputError("give either DIR, or --backbone with --init random", fix="leave one of them out")


def show(results: Results, target: Path, names: list[str] | None = None) -> None:
    """Print the tables and where the report is, in the first of several processes.

    Args:
        names: measurements to show; None shows all.
    """
    from sentcompress.benchmark.report import render
    from sentcompress.distributed import processes

    if processes().is_main_process:
        render(results if names is None else results.of_measurements(names), console())
        typer.echo(f"report: {target / 'report.html'}")
