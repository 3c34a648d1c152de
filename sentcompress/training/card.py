"""Model cards: what a saved folder is, how it was made, and how to load it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from sentcompress import __version__
from sentcompress.distributed import LAUNCHED
from sentcompress.provenance import command, commit, plugin_packages
from sentcompress.recipe import Recipe

MADE = "How it was made"
"""Heading of a card's last section."""


@dataclass(frozen=True)
class Card:
    """What a job contributes to its model card.

    Attributes:
        title: heading.
        summary: a paragraph on what the model is and what it is for.
        data: a line on the data it was trained on.
        heldout: how the held-out figures were measured, in one line.
        usage: Python code that loads and uses the folder; ``{folder}`` stands for its path, in quotes.
        tags: for the front matter.
    """

    title: str
    summary: str
    data: str
    heldout: str
    usage: str
    tags: tuple[str, ...] = ()


def provenance(recipe: Recipe) -> dict[str, str]:
    """Command, version, commit, plugin packages and recipe of this process; recorded with every result."""
    return {
        "command": command(),
        "version": __version__,
        "commit": commit(),
        **plugin_packages(recipe),
        "recipe": recipe.name,
        "recipe_hash": recipe.digest(),
    }


def resume_command() -> str:
    """The command that continues what this process was doing, in the same number of processes."""
    kept = [argument for argument in sys.argv[1:] if argument not in ("--overwrite", "--resume")]
    if kept[:1] != ["run"]:  # "run" resumes without the option
        kept.append("--resume")
    count = os.environ.get(LAUNCHED)
    return command([sys.argv[0], *(["launch", "-n", count] if count else []), *kept])


def render_card(
    card: Card, recipe: Recipe, folder: Path, training: Mapping[str, object], figures: Mapping[str, float]
) -> str:
    """The README.md of a model folder.

    Args:
        folder: where the model will be.
        training: facts about the training run, shown as a table.
        figures: held-out figures; may be empty before the first evaluation.
    """
    front = yaml.safe_dump(
        {"library_name": "sentcompress", "tags": ["sentcompress", *card.tags]}, sort_keys=False
    )
    facts = {**training, "data": card.data, **provenance(recipe)}
    table = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in facts.items())
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
{card.usage.format(folder=json.dumps(folder.as_posix(), ensure_ascii=False)).strip()}
```

## Held-out figures

{heldout}

## {MADE}

| | |
|---|---|
{table}

`sentcompress run recipe.yaml --out DIR` reproduces it, with the resolved `recipe.yaml` next to this file.
"""


def with_section(card: str, heading: str, body: str) -> str:
    """A card with a section before the one on how the model was made, in place of its section of that heading."""
    parts = re.split(r"^(?=## )", card, flags=re.MULTILINE)
    others = [part for part in parts if not part.startswith(f"## {heading}\n")]
    place = next((at for at, part in enumerate(others) if part.startswith(f"## {MADE}\n")), len(others))
    return "".join([*others[:place], f"## {heading}\n\n{body}\n\n", *others[place:]])
