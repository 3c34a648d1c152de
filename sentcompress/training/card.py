"""Model cards: what a saved folder is, how it was made, and how to load it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from sentcompress import __version__
from sentcompress.recipe import Recipe


@dataclass(frozen=True)
class Card:
    """What a job says about its model.

    Attributes:
        title: heading.
        summary: a paragraph: what it is and what it is for.
        data: a line on the data it was trained on.
        heldout: a line on how the held-out figures were measured.
        usage: Python code that loads and uses the folder; ``{folder}`` stands for its path.
        tags: for the front matter.
    """

    title: str
    summary: str
    data: str
    heldout: str
    usage: str
    tags: tuple[str, ...] = ()


def provenance(recipe: Recipe) -> dict[str, str]:
    """Command, version, commit and recipe of this process: what every result carries."""
    return {
        "command": command_line(),
        "version": __version__,
        "commit": commit(),
        "recipe": recipe.name,
        "recipe_hash": recipe.digest(),
    }


def command_line() -> str:
    """The command this process was started with, as one would type it."""
    return _typed(sys.argv)


def _typed(argv: list[str]) -> str:
    program = Path(argv[0])
    if program.name == "__main__.py":
        return shlex.join(["python", "-m", program.parent.name, *argv[1:]])
    # A console script is found by its name; a script of one's own needs its path.
    start = ["python", str(program)] if program.suffix == ".py" else [program.name]
    return shlex.join([*start, *argv[1:]])


def resume_command() -> str:
    """The command that goes on with what this process was doing."""
    kept = [argument for argument in sys.argv[1:] if argument not in ("--overwrite", "--resume")]
    if kept[:1] != ["run"]:  # "run" picks up by itself
        kept.append("--resume")
    return _typed([sys.argv[0], *kept])


@cache
def commit() -> str:
    """Commit of the source this runs from (``+changes`` if edited); ``unknown`` outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"

    def git(*arguments: str) -> str:
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        return subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
            env=environment,
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "sentcompress")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def render_card(
    card: Card, recipe: Recipe, folder: Path, training: Mapping[str, object], figures: Mapping[str, float]
) -> str:
    """The README.md of a model folder.

    Args:
        folder: where the model will be.
        training: facts of the training run, shown as a table.
        figures: held-out figures; may be empty before the first evaluation.
    """
    front = yaml.safe_dump(
        {"library_name": "sentcompress", "tags": ["sentcompress", *card.tags]}, sort_keys=False
    )
    rows = {**training, "data": card.data, **provenance(recipe)}
    table = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in rows.items())
    measured = "\n".join(f"| {name.replace('_', ' ')} | {value:.6g} |" for name, value in figures.items())
    heldout = (
        f"| figure | value |\n|---|---|\n{measured}\n\n{card.heldout}" if measured else "Not measured yet."
    )
    return f"""---
{front}---

# {card.title}

{card.summary}

## Use

```python
{card.usage.format(folder=folder.as_posix()).strip()}
```

## Held-out figures

{heldout}

## How it was made

| | |
|---|---|
{table}

`sentcompress run recipe.yaml --out DIR` makes it again, with the resolved `recipe.yaml` beside this file.
"""
