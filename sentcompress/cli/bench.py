"""``sentcompress bench``: a subcommand for each measurement, made from the measurement itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from sentcompress.cli import bench_sweep
from sentcompress.cli.bench_common import (
    FolderArgument,
    InitOption,
    LLMArgument,
    OptionalFolder,
    RecipeOption,
    ResultsOption,
    measure,
    measure_llm,
    measure_random,
    require_only_folder,
)
from sentcompress.cli.common import BackboneOption, DataOption, SetOption, console, examples, user_path
from sentcompress.cli.options import FieldCommand, override, recipe_options

if TYPE_CHECKING:
    from sentcompress.benchmark.measurement import Flag, Measurement


class BenchGroup(TyperGroup):
    """The commands of all measurements, which are read when one of them is asked for, and those of this file."""

    _own: dict[str, Any]
    _complete = False

    @property  # type: ignore[override]
    def commands(self) -> dict[str, Any]:
        if not self._complete:
            self._complete = True
            measured: Any = typer.main.get_command(_measurement_commands())
            self._own = {**measured.commands, **self._own}
        return self._own

    @commands.setter
    def commands(self, own: dict[str, Any]) -> None:
        self._own = own


commands = typer.Typer(cls=BenchGroup, rich_markup_mode=None, no_args_is_help=True)


@commands.callback()
def options() -> None:
    """Measure models beside their token-level baselines; writes results.json and report.html.

    docs/measures.md says what is measured, and how.
    """


# ---- one command for each measurement


def _measurement_commands() -> typer.Typer:
    from sentcompress.benchmark.measurement import measurements

    app = typer.Typer(rich_markup_mode=None)
    app.command(
        "all",
        help="Measure everything the recipe names and write the report.",
        epilog=examples(
            "sentcompress bench all out/quickstart", "sentcompress bench all out/mine --set bench.repeats=9"
        ),
    )(_all_command(tuple(flag for m in measurements() for flag in m.flags if flag.in_all)))
    for measurement in measurements():
        app.command(
            measurement.name.replace("_", "-"),
            cls=FieldCommand if measurement.options else TyperCommand,
            help=inspect.cleandoc(type(measurement).__doc__ or ""),
            epilog=examples(*measurement.examples),
        )(measurement.command(console) or _command(measurement))
    return app


def _all_command(flags: tuple[Flag, ...]) -> Callable[..., None]:
    def run(folder: Path, out: Path | None, set_: list[str] | None, **given: Any) -> None:
        overrides, changes = _settings(flags, given)
        measure(None, folder, out, [*overrides, *(set_ or [])], changes)

    folder = _parameter("folder", FolderArgument, inspect.Parameter.empty)
    return _with_parameters(run, [folder], flags)


def _command(measurement: Measurement[Any]) -> Callable[..., None]:
    """The command of a measurement: of a folder, or of random weights where the measurement allows them."""
    names = [*(other.name for other in measurement.requires), measurement.name]

    def run(
        folder: Any,
        out: Path | None,
        set_: list[str] | None,
        backbone: str | None = None,
        data: str | None = None,
        init: str | None = None,
        recipe: str = "",
        **given: Any,
    ) -> None:
        overrides, changes = _settings(measurement.flags, given)
        overrides += set_ or []
        if measurement.plain_llm:
            results = measure_llm(names, folder, data, out, overrides, changes)
        elif folder is None:
            results = measure_random(names, backbone, init, recipe, out, overrides, changes)
        else:
            require_only_folder(backbone, init)
            results = measure(names, folder, out, overrides, changes)
        measurement.verdict(results)

    parameters = [_parameter("folder", FolderArgument, inspect.Parameter.empty)]
    if measurement.random_weights:
        parameters = [
            _parameter("folder", OptionalFolder),
            _parameter("backbone", BackboneOption),
            _parameter("init", InitOption),
            _parameter("recipe", RecipeOption, "strong"),
        ]
    if measurement.plain_llm:
        parameters = [
            _parameter("folder", LLMArgument, inspect.Parameter.empty),
            _parameter("data", DataOption),
        ]
    command = _with_parameters(run, parameters, measurement.flags)
    if not measurement.options:
        return command
    return recipe_options(**{field: f"bench.{field}" for field in measurement.options})(command)


def _with_parameters(
    run: Callable[..., None], parameters: list[inspect.Parameter], flags: tuple[Flag, ...]
) -> Callable[..., None]:
    """Give a function the parameters that typer makes arguments and options of, and those that all commands have."""
    parameters = [*parameters]
    for flag in flags:
        default = f"the recipe's bench.{flag.field}"
        option = typer.Option(flag.name, metavar=flag.metavar, help=flag.help, show_default=default)
        parameters.append(_parameter(flag.field, Annotated[flag.type | None, option]))
    parameters += [_parameter("out", ResultsOption), _parameter("set_", SetOption)]
    run.__dict__["__signature__"] = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _settings(flags: tuple[Flag, ...], given: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """What the flags that were given set: overrides of the recipe, and changes that it does not record."""
    overrides: list[str] = []
    changes: dict[str, Any] = {}
    for flag in flags:
        value = given.get(flag.field)
        if value is None:
            continue
        settings = flag.settings(value) if flag.settings else {flag.field: value}
        if flag.recorded:
            overrides += [override(f"bench.{field}", setting) for field, setting in settings.items()]
        else:
            changes |= settings
    return overrides, changes


bench_sweep.add_to(commands)


# ---- several results


@commands.command(
    "compare",
    epilog=examples(
        "sentcompress bench compare out/quickstart out/mine", "sentcompress bench compare a.json b.json"
    ),
)
def compare(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="A B ...", parser=user_path, help="Folders or results.json files."),
    ],
) -> None:
    """Put several results side by side."""
    from sentcompress.benchmark.compare import compare as put_side_by_side
    from sentcompress.benchmark.compare import render_comparison, warnings
    from sentcompress.benchmark.results import read_results

    names, rows = put_side_by_side(results)
    render_comparison(names, rows, console())
    for warning in warnings([read_results(path) for path in results]):
        typer.echo(f"caution: {warning}")


@commands.command(
    "scaling-law",
    epilog=examples(
        "sentcompress sweep quickstart --grid graft.steps=60,120,240,480 --grid seed=0,1 --out out/budgets",
        "sentcompress bench scaling-law out/budgets --out out/scaling",
        "sentcompress bench scaling-law out/small out/medium out/large --out out/scaling",
        "sentcompress bench scaling-law docs/results/scaling-law.json out/mine --out out/scaling",
    ),
)
def scaling_law(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER",
            parser=user_path,
            help="Folders of finished runs, or of sweeps of them; a scaling-law.json adds the runs of an earlier law.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", parser=user_path, help="Where the results go.")
    ],
) -> None:
    """Fit bits per byte against tokens and parameters, for the sentence model, its baseline and its opponents.

    Does the gap between them close with more tokens or a larger backbone? All runs must be scored on the same held-out
    bytes; seeds of one size and budget are averaged. Writes scaling-law.json, scaling-law.md and scaling-law.png.
    """
    from sentcompress.studies.presentation import require_matplotlib
    from sentcompress.studies.scaling_law import scaling_law as fit
    from sentcompress.studies.scaling_report import render, write

    require_matplotlib()
    law = fit(sources)
    page = write(law, out)
    render(law, console())
    typer.echo(f"scaling law: {page}")


def add_to(app: typer.Typer) -> None:
    app.add_typer(
        commands,
        name="bench",
        epilog=examples(
            "sentcompress bench all out/quickstart",
            "sentcompress bench speed --backbone opt-125m --init random",
            "sentcompress bench compare out/quickstart out/mine",
        ),
    )
