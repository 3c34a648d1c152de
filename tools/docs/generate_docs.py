"""Writes what is made from the code (docs/help.md, docs/recipes.md, docs/backbones.md) and from results (README.md).

``python tools/docs/generate_docs.py`` writes them; ``--check`` fails if one is stale (so does tests/test_docs.py).
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from headline import headline
from pydantic import BaseModel
from typer.main import get_command
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 88
NOTE = "<!-- Made by tools/docs/generate_docs.py: change the code, not this page. -->\n"


def help_page() -> str:
    """Every command's --help."""
    from sentcompress.cli import app

    parts = [
        NOTE,
        "# Command line\n",
        "Exit codes: 0 done; 1 the run failed; 2 bad usage, recipe or input; 3 a requested plugin is missing "
        "or broken; 75 stopped by SIGTERM, continue with `--resume`; 130 interrupted. Messages go to stderr; "
        "if stderr cannot be written, the run continues without them. If stdout cannot be written, the exit code is "
        "1; a closed stdout (`>&-`) drops the output. `--debug` anywhere on the line, or `SENTCOMPRESS_DEBUG=1`, "
        "adds the traceback. `sentcompress --install-completion` sets up completion in your shell.\n",
    ]
    for path in _command_paths(get_command(app), []):
        shown = CliRunner().invoke(app, [*path, "--help"], prog_name="sentcompress", terminal_width=WIDTH)
        assert shown.exit_code == 0, shown.output
        parts.append(f"## {' '.join(['sentcompress', *path])}\n")
        parts.append(f"```text\n{shown.output.rstrip()}\n```\n")
    return "\n".join(parts)


def _command_paths(command: Any, path: list[str]) -> Iterator[list[str]]:
    yield path
    for name, sub in getattr(command, "commands", {}).items():
        yield from _command_paths(sub, [*path, name])


def recipes_page() -> str:
    """Every field of a recipe, and every option of the built-in components."""
    os.environ["SENTCOMPRESS_PLUGINS"] = ""  # what happens to be installed here is not ours to document
    from sentcompress.recipe import Recipe, load_recipe, shipped_recipes
    from sentcompress.registry import KINDS, get_registry

    parts = [
        NOTE,
        "# Recipes\n",
        "A recipe is one experiment: the parts, and the stages that train and measure them. Unknown and "
        "duplicate keys are refused; numbers are those of YAML 1.2, so `1e-4` is one; `~` at the beginning of a path "
        "is the home folder; `--set graft.steps=100` changes any field; the resolved recipe is saved beside every "
        "result. "
        "`sentcompress validate RECIPE` checks one, `sentcompress run RECIPE --dry-run` prints its plan.\n",
        "## Shipped recipes\n",
        "| recipe | what it is |\n|---|---|",
        *(f"| `{name}` | {_cell(load_recipe(name).description)} |" for name in shipped_recipes()),
        "",
        "## Fields\n",
        *_sections(Recipe, ""),
        "## Options of the built-in components\n",
        "`sentcompress plugins show NAME` prints these, also for plugins.\n",
    ]
    registry = get_registry()
    for kind in KINDS:
        for name in registry.names(kind):
            component: Any = registry.get(kind, name)
            parts += [f"### {kind} `{name}`\n", (component.__doc__ or "").strip().partition("\n")[0] + "\n"]
            parts += (
                _table(component.Options, "option") if component.Options.model_fields else ["No options.\n"]
            )
    return "\n".join(parts)


def backbones_page() -> str:
    """Every alias of the built-in adapters, and what ``auto`` takes and refuses."""
    os.environ["SENTCOMPRESS_PLUGINS"] = ""
    from sentcompress.registry import get_registry

    registry = get_registry()
    adapters: dict[str, Any] = {name: registry.get("backbone", name) for name in registry.names("backbone")}
    tried = yaml.safe_load((ROOT / "tools" / "docs" / "auto_architectures.yaml").read_text(encoding="utf-8"))
    every = yaml.safe_load((ROOT / "tools" / "docs" / "architectures.yaml").read_text(encoding="utf-8"))
    reasons: dict[str, list[str]] = {}
    for name, why in every["refused"].items():
        reasons.setdefault(why, []).append(name)
    intro = (ROOT / "tools" / "docs" / "backbones.md").read_text(encoding="utf-8")
    parts = [NOTE, intro, "## Adapters and aliases\n", "| adapter | serves | aliases |\n|---|---|---|"]
    for name, adapter in adapters.items():
        types = ", ".join(f"`{t}`" for t in adapter.model_types) or "any other type that proves right"
        aliases = ", ".join(f"`{alias}`" for alias in adapter.aliases) or "-"
        parts.append(f"| `{name}` | {types} | {aliases} |")
    parts += [
        "",
        "## What `auto` takes\n",
        f"Tried on {len(tried['passes']) + len(tried['refused'])} further architectures, built tiny from their "
        "configurations with random weights (`tests/backbones/test_auto.py`). These pass every proof, are grafted, "
        "saved and loaded:\n",
        ", ".join(f"`{name}`" for name in tried["passes"]) + ".\n",
        f"{' and '.join(f'`{name}`' for name in tried['since'])} do so with transformers "
        f"{min(tried['since'].values())}; with the oldest version we support they are refused.\n",
        "These are refused:\n",
        "| type | why |\n|---|---|",
        *(f"| `{name}` | {_cell(case['why'])} |" for name, case in tried["refused"].items()),
        "",
        "## Every type of transformers\n",
        f"All causal LMs of transformers {every['transformers']}, built tiny with random weights "
        "(`tools/docs/architectures.py`, repeated by `tests/backbones/test_architectures.py`). "
        f"{len(every['accepted'])} are accepted and take a training step:\n",
        _names(every["accepted"]) + ".\n",
        f"{len(every['refused'])} are refused. Each type is listed under the first reason that applies; the "
        "message gives all of them:\n",
        "| why | types |\n|---|---|",
        *(f"| {_cell(why)} | {_names(names)} |" for why, names in reasons.items()),
        "",
        f"Not tried, because their configurations could not be made small: {_names(every['not built'])}.\n",
    ]
    return "\n".join(parts)


def _names(types: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in types)


def _sections(model: type[BaseModel], path: str) -> Iterator[str]:
    yield f"### {f'`{path}`' if path else 'Top level'}\n"
    yield inspect.cleandoc(model.__doc__ or "").replace("``", "`") + "\n"
    yield from _table(model, "field")
    for name, info in model.model_fields.items():
        for candidate in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                yield from _sections(candidate, f"{path}.{name}".lstrip("."))


def _table(model: type[BaseModel], first: str) -> list[str]:
    from sentcompress.cli.options import describe_fields

    rows = [
        f"| `{row.name}` | {_cell(row.type)} | {_cell(row.default)} | {_cell(row.description)} |"
        for row in describe_fields(model)
    ]
    return [f"| {first} | type | default | what |\n|---|---|---|---|", *rows, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def readme() -> str:
    """The README with the headline table of today's docs/results."""
    before, start, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition("<!-- headline -->\n")
    _, end, after = rest.partition("\n<!-- end of headline -->")
    if not (start and end):
        raise ValueError("README.md has lost the marks of the headline table")
    return f"{before}{start}{headline()}{end}{after}"


PAGES = {
    "README.md": readme,
    "docs/help.md": help_page,
    "docs/recipes.md": recipes_page,
    "docs/backbones.md": backbones_page,
}


def main() -> None:
    stale = []
    for name, make in PAGES.items():
        path, text = ROOT / name, make()
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
    if stale:
        sys.exit(f"stale: {', '.join(stale)}; run python tools/docs/generate_docs.py")


if __name__ == "__main__":
    main()
