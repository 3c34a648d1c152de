"""``plugins new``: writes a small working package for a plugin author to start from. No torch.

The files come from ``templates/``: plain text with ``$names``, one folder per kind.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from string import Template

from sentcompress import __version__
from sentcompress.errors import InputError, did_you_mean
from sentcompress.files import storage_errors
from sentcompress.packages import installed_version
from sentcompress.registry import KINDS as FOLDERS
from sentcompress.registry import Registry

PREFIX = "sentcompress-"
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
LONGEST_NAME = 50
"""In characters; file names may have 255, but people read recipes."""


@dataclass(frozen=True)
class Kind:
    """What the templates need to know about a kind: the component's summary, and how a recipe names it."""

    summary: str
    field: str
    value: str
    dependencies: tuple[str, ...] = ()
    command: str = ""
    """What to run first, if that is not a recipe."""


KINDS = {
    "segmenter": Kind("Splits text after line ends", "segmenter", "{name: $name}"),
    "fusion": Kind("The largest value per channel as latent", "fusion", "{name: $name}", ("torch",)),
    "backbone": Kind("StableLM as a backbone", "backbone", "{name: $name, model: stablelm-3b}"),
    "dataset": Kind("A folder of Markdown files", "data", "{name: $name, options: {folder: notes}}"),
    "metric": Kind("Share of words reconstructed", "bench.extra_metrics", "[{name: $name}]"),
    "memory": Kind(
        "The first tokens of every older sentence",
        "memory",
        "{name: window+$name}",
        ("torch",),
        'sentcompress generate opt-tiny "The state of the Union is" --memory window+$name',
    ),
}


@dataclass(frozen=True)
class Scaffold:
    """A package to write."""

    kind: str
    name: str
    files: dict[str, str]
    """Contents by path in the package's folder."""
    command: str
    """A command that uses the new component."""

    @property
    def package(self) -> str:
        return PREFIX + self.name


def plan(name: str, kind: str, registry: Registry) -> Scaffold:
    """Check the name and fill in the templates. Writes nothing.

    Raises:
        InputError: there is no such kind, or the name is invalid or taken.
    """
    if kind not in KINDS:
        raise InputError(
            f"--kind {kind}: no such kind of plugin.{did_you_mean(kind, KINDS)}",
            fix=f"use one of {', '.join(KINDS)}",
        )
    name = name.removeprefix(PREFIX)
    _check_name(name)
    _check_free(name, kind, registry)
    module = f"{PREFIX}{name}".replace("-", "_")
    of_kind = KINDS[kind]
    value = Template(of_kind.value).substitute(name=name)
    command = f"sentcompress run quickstart --set '{of_kind.field}={value}'"
    if of_kind.command:
        command = Template(of_kind.command).substitute(name=name)
    texts = {
        "package": PREFIX + name,
        "name": name,
        "kind": kind,
        "module": module,
        "class_name": _class_name(name, kind),
        "hook": f"register_{FOLDERS[kind]}",
        "description": f"{of_kind.summary}: a {kind} for sentcompress",
        "python": _own_python(),
        "dependencies": ", ".join(f'"{d}"' for d in (_own_versions(), *of_kind.dependencies)),
        "recipe": _as_yaml(of_kind.field, value),
        "command": command,
    }
    paths = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{module}/__init__.py": "init.py",
        f"{module}/{kind}.py": f"{kind}/component.py",
        f"tests/test_{module}.py": f"{kind}/test.py",
    }
    templates = files("sentcompress.cli") / "templates"
    contents = {
        path: Template(templates.joinpath(f"{template}.tmpl").read_text(encoding="utf-8")).substitute(texts)
        for path, template in paths.items()
    }
    return Scaffold(kind, name, contents, command)


def write(scaffold: Scaffold, folder: Path) -> None:
    """Write the files into a new or empty folder.

    Raises:
        InputError: the folder is not empty.
        StorageError: it cannot be written.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(
            f"{folder}: {'is not empty' if folder.is_dir() else 'is a file'}; nothing was written",
            fix="choose another folder with --out",
        )
    with storage_errors(folder):
        for path, content in scaffold.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            # "x": do not overwrite a file that has appeared in the meantime.
            with open(folder / path, "x", encoding="utf-8", newline="\n") as file:
                file.write(content)


def _check_name(name: str) -> None:
    """It becomes a component, a distribution and a module: lower-case words are all three without a change."""
    if NAME.fullmatch(name) and len(name) <= LONGEST_NAME:
        return
    words = re.sub(r"[^a-z0-9]+", "-", name.lower())[:LONGEST_NAME].strip("-")
    near = f"such as '{words}'" if NAME.fullmatch(words) else "such as 'my-plugin'"
    raise InputError(
        f"'{name}' cannot be the name of a plugin",
        fix=f"use at most {LONGEST_NAME} lower-case letters, digits and single hyphens, starting with a letter, {near}",
    )


def _check_free(name: str, kind: str, registry: Registry) -> None:
    if name in registry.names(kind):
        owners = " and ".join(f"'{c.plugin.package}' {c.plugin.version}" for c in registry.claims(kind, name))
        raise InputError(
            f"there is already a {kind} called '{name}', from package {owners}", fix="choose another name"
        )
    version = installed_version(PREFIX + name)
    if version is None:
        return
    raise InputError(
        f"a package '{PREFIX}{name}' {version} is installed; the new one would replace it",
        fix="choose another name",
    )


def _class_name(name: str, kind: str) -> str:
    """``max-pool`` to ``MaxPoolFusion``, and ``max-fusion`` to ``MaxFusion``."""
    words = [word.capitalize() for word in name.split("-")]
    return "".join(
        words if words[-1] == kind.capitalize() and len(words) > 1 else [*words, kind.capitalize()]
    )


def _own_python() -> str:
    """A plugin can support only the Python versions that sentcompress supports."""
    try:
        return metadata.metadata("sentcompress")["Requires-Python"]
    except (metadata.PackageNotFoundError, KeyError):  # run from a folder, not installed
        return ">=3.11"


def _own_versions() -> str:
    """Before 1.0, a minor version may break plugins."""
    major, minor = (int(part) for part in __version__.split(".")[:2])
    below = f"{major}.{minor + 1}" if major == 0 else f"{major + 1}"
    return f"sentcompress>={major}.{minor},<{below}"


def _as_yaml(field: str, value: str) -> str:
    """``bench.extra_metrics`` and a value as lines of a recipe."""
    outer, _, inner = field.partition(".")
    return f"{outer}:\n  {inner}: {value}" if inner else f"{outer}: {value}"
