"""What commands share: option types, examples in help texts, tables."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sentcompress.files import expand_home, printable

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 200
"""Width of tables that go to a file or a pipe, where wrapping at 80 columns makes no sense."""


def user_path(value: str | Path) -> Path:
    """Parser of all options and arguments that take a path: ``~`` becomes the home folder; an empty one is refused."""
    if not str(value).strip():
        raise typer.BadParameter("the path is empty; . is the current folder")
    return Path(expand_home(str(value)))


user_path.__name__ = "path"  # older versions of typer show it in help texts


def finite(number: float | None) -> float | None:
    """Callback of options that take a number: bounds alone let NaN pass."""
    if number is not None and not math.isfinite(number):
        raise typer.BadParameter("must be a finite number")
    return number


RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name from 'sentcompress recipes'.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Change a field of the recipe, such as graft.steps=100; repeatable; overrides all other options.",
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the run.", parser=user_path, show_default="out/NAME, with the recipe's name"
    ),
]
BackboneOption = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="The LLM: an alias (opt-125m), hub name, local folder or GGUF file."),
]
RevisionOption = Annotated[
    str | None, typer.Option(metavar="REVISION", help="Branch, tag or commit of the LLM on the hub.")
]
DataOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH", help="Your text: a file, folder or glob of text, JSON lines, Parquet or CSV."
    ),
]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace earlier runs of the same stages in the folder."),
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the plan (parameters, memory, tokens) and change nothing."),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue from the newest checkpoint in the folder.")
]


def examples(*lines: str) -> str:
    """The end of a help text. The leading ``\\b`` keeps the line breaks."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Turn off garbage collection while large libraries are imported, which saves a seventh of the startup time."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collected:
            gc.enable()


def console() -> Console:
    """A console for tables, as wide as the terminal, or wide enough for a file.

    It shows control characters in names and texts instead of sending them (:func:`sentcompress.files.printable`).
    """
    from rich.console import Console
    from rich.segment import Segment

    class Screen(Console):
        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(printable(segment.text), segment.style)

    return Screen(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
