"""``--grid FIELD=VALUE,VALUE``: reading it, the grid points it makes, and what their runs would take."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml

from sentcompress.errors import RecipeError, SentCompressError
from sentcompress.estimate.plan import TOKENS_PER_SENTENCE, UNTOUCHED, token_budget
from sentcompress.recipe import Recipe, load_recipe
from sentcompress.recipe.reading import describe_yaml_error, read_yaml

NAME_LENGTH = 120
"""Characters of a grid point's name: the files below its folder stay within every file system's limits."""
EXAMPLE = "--grid vae.conditioning=add,prefix"
T = TypeVar("T")
R = TypeVar("R")
_PLAIN_VALUE = re.compile(r"[a-z0-9_.+-]+(?: [a-z0-9_]+=[a-z0-9_.+-]+)*")


@dataclass(frozen=True)
class Axis:
    """One ``--grid``: a field of the recipe and the values it takes, as YAML."""

    field: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class GridPoint:
    """One combination of values, and the recipe with them.

    Attributes:
        name: of its folder; depends on its own fields and values only, not on the order of the grid.
        values: one for each axis, as tables show them.
        overrides: ``field=value`` for each axis.
        recipe: resolved and checked.
    """

    name: str
    values: tuple[str, ...]
    overrides: tuple[str, ...]
    recipe: Recipe


def parse_grid(texts: Sequence[str], overrides: Sequence[str] = ()) -> list[Axis]:
    """Read the ``--grid`` options.

    Args:
        overrides: the ``--set`` options; the grid must not undo one.

    Raises:
        RecipeError: an option cannot be read, or two of them set the same field.
    """
    axes = [_axis(text) for text in texts]
    for one, other in itertools.combinations(axes, 2):
        if one.field == other.field:
            raise RecipeError(f"--grid {one.field}: given twice", fix="give all its values in one --grid")
        if _covers(one.field, other.field) or _covers(other.field, one.field):
            raise RecipeError(
                f"--grid {one.field} and --grid {other.field}: one is a part of the other",
                fix="write each combination as one value: "
                "--grid 'fusion={name: mean},{name: attention, options: {latents: 4}}'",
            )
    for axis in axes:
        for override in overrides:
            if _covers(axis.field, override.partition("=")[0]):
                raise RecipeError(
                    f"--set {override}: --grid {axis.field} would override it", fix="leave one of the two out"
                )
    return axes


def _covers(field: str, other: str) -> bool:
    """Whether setting ``field`` replaces ``other``."""
    return other == field or other.startswith(f"{field}.")


def _axis(text: str) -> Axis:
    field, equals, rest = text.partition("=")
    if not equals or not all(field.split(".")):
        raise RecipeError(f"--grid {text}: write FIELD=VALUE,VALUE, such as {EXAMPLE}")
    values = [value.strip() for value in split_values(rest)]
    seen: list[Any] = []
    for value in values:
        if not value:
            raise RecipeError(
                f"--grid {text}: an empty value", fix="write null for no value, '' for empty text"
            )
        try:
            parsed = read_yaml(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise RecipeError(
                f"--grid {text}: '{value}' is not valid YAML: {describe_yaml_error(error)}",
                fix="close its brackets, or quote it",
            ) from None
        if repr(parsed) in seen:
            raise RecipeError(f"--grid {text}: '{value}' is given twice", fix="remove one of them")
        seen.append(repr(parsed))
    return Axis(field, tuple(values))


def split_values(text: str) -> list[str]:
    """Split at commas that are not within brackets, braces or quotes."""
    pieces, start, depth, quote, i = [], 0, 0, "", 0
    while i < len(text):
        character = text[i]
        if quote:
            # YAML writes a quote within quotes as '' or \".
            if (quote == "'" and text.startswith("''", i)) or (quote == '"' and character == "\\"):
                i += 1
            elif character == quote:
                quote = ""
        elif character in "'\"" and (not text[start:i].strip() or text[:i].rstrip()[-1] in ",[{:"):
            quote = character  # elsewhere it is an apostrophe
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth = max(depth - 1, 0)
        elif character == "," and depth == 0:
            pieces.append(text[start:i])
            start = i + 1
        i += 1
    return [*pieces, text[start:]]


def build_grid(recipe: str, overrides: Sequence[str], axes: Sequence[Axis]) -> list[GridPoint]:
    """Every combination of values, as a resolved and checked recipe.

    Args:
        recipe: a file, or a shipped name.
        overrides: ``--set`` options, the same for all runs.

    Raises:
        RecipeError: naming each grid point that cannot be run, and the field.
        PluginError: the same, where a component is missing or broken.
    """
    labels = _labels([axis.field for axis in axes])
    combinations = list(itertools.product(*(axis.values for axis in axes)))

    def resolve(values: tuple[str, ...]) -> GridPoint:
        own = tuple(f"{axis.field}={value}" for axis, value in zip(axes, values, strict=True))
        resolved = load_recipe(recipe, [*overrides, *own])
        resolved.check_components()
        return GridPoint(point_name(labels, values), tuple(map(value_text, values)), own, resolved)

    points = check_each([(point_name(labels, values), values) for values in combinations], resolve)
    _refuse_duplicates(points)
    first = points[0].recipe
    for section, trains in (
        (first.pretrain, "pretrains a backbone"),
        (first.memory, "trains an LLM for a memory"),
    ):
        if section is not None:
            raise RecipeError(
                f"{recipe}: it {trains}, and a sweep compares grafted models",
                fix="give a recipe that grafts an LLM",
            )
    if not first.bench.metrics:
        raise RecipeError(
            f"{recipe}: bench.metrics is empty, so the runs could not be compared",
            fix="name measurements there, such as bench.metrics=[quality]",
        )
    return points


def check_each(named: Sequence[tuple[str, T]], check: Callable[[T], R]) -> list[R]:
    """Call a check for each grid point, given with its name; what it returns, or one error about all that failed."""
    results: list[R] = []
    failed: dict[str, list[str]] = {}
    first: SentCompressError | None = None
    for name, point in named:
        try:
            results.append(check(point))
        except SentCompressError as error:
            first = first or error
            failed.setdefault(error.message, []).append(name)
    if first is None:
        return results
    lines = []
    for message, names in failed.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        who = "every run" if len(names) == len(named) else f"run {names[0]}{others}"
        lines.append(f"{who}: {message}")
    fix = first.fix
    if any(".options." in message and "unknown key" in message for message in failed):
        fix = (
            "options belong to their component: give both as one value, "
            "--grid 'fusion={name: mean},{name: attention, options: {latents: 4}}', "
            "or drop the recipe's with --set 'fusion.options={}'"
        )
    raise type(first)("\n".join(lines) + "\nno run was started", fix=fix)


def _refuse_duplicates(points: Sequence[GridPoint]) -> None:
    """Refuse two runs that are the same experiment, or that would share a folder."""
    experiments: dict[str, str] = {}
    folders: dict[str, str] = {}
    for point in points:
        for kind, table, key in (
            ("are the same experiment", experiments, point.recipe.digest()),
            ("would share a folder", folders, point.name.lower()),
        ):
            if key in table:
                raise RecipeError(
                    f"runs {table[key]} and {point.name} {kind}", fix="leave one of the values out"
                )
            table[key] = point.name


def value_text(value: str) -> str:
    """A value as a table shows it: ``{name: attention, options: {latents: 4}}`` is ``attention latents=4``."""
    parsed = read_yaml(value)
    if isinstance(parsed, dict) and isinstance(parsed.get("name"), str):
        options = parsed.get("options") or {}
        if set(parsed) <= {"name", "options"} and isinstance(options, dict):
            return " ".join([parsed["name"], *(f"{key}={inner}" for key, inner in options.items())])
    return str(parsed) if isinstance(parsed, str) else value


def _labels(fields: Sequence[str]) -> dict[str, str]:
    """A short word for each field: its last part, or the component's where that is ``name``."""
    words = {field: _label(field) for field in fields}
    clash = len(set(words.values())) < len(words)
    return {field: field if clash else word for field, word in words.items()}


def _label(field: str) -> str:
    parts = field.split(".")
    return parts[-2] if parts[-1] == "name" and len(parts) > 1 else parts[-1]


def point_name(labels: dict[str, str], values: Sequence[str]) -> str:
    """A folder name such as ``conditioning-prefix_fusion-attention-latents-4``.

    Values that such a name cannot tell apart get a digest behind it.
    """
    # Sorted, so that the order of the options on the command line does not matter.
    pairs = sorted(zip(labels, values, strict=True))
    texts = [(labels[field], value_text(value)) for field, value in pairs]
    name = "_".join(
        re.sub(r"[^A-Za-z0-9_.+-]+", "-", f"{label}-{text.replace('=', '-')}") for label, text in texts
    )
    if len(name) <= NAME_LENGTH and all(_PLAIN_VALUE.fullmatch(text) for _, text in texts):
        return name
    digest = hashlib.blake2b(repr(pairs).encode(), digest_size=4).hexdigest()
    return f"{name[:NAME_LENGTH].rstrip('-.')}-{digest}"


def sweep_plan(points: Sequence[GridPoint]) -> str:
    """``--dry-run`` of a sweep: the runs and what they take in tokens, then the total."""
    lines, total = [], 0
    for number, point in enumerate(points, 1):
        tokens = token_budget(point.recipe)
        total += sum(tokens.values())
        stages = ", ".join(f"{stage} {n:,}" for stage, n in tokens.items())
        lines.append(f"[{number}/{len(points)}] {point.name} ({point.recipe.digest()})")
        lines += [f"    {override}" for override in point.overrides]
        lines.append(f"    tokens: {stages}")
    lines.append(
        f"{len(points)} runs, at most {total:,} tokens of training, at {TOKENS_PER_SENTENCE} per sentence "
        "(the corpus and the segmenter decide)"
    )
    return "\n".join([*lines, UNTOUCHED])
