"""``results.json``: one versioned schema for everything that is measured. No torch.

Every table row carries its own honesty line, so results of several runs can be put side by side, and a file that
was measured part by part stays true.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from sentcompress.benchmark.records import PARTS, SCHEMA_VERSION, Results
from sentcompress.errors import InputError, RunError
from sentcompress.files import folder_digest, storage_errors, write_atomically
from sentcompress.recipe import Recipe

FILE = "results.json"
STAGES = ("vae", "graft", "baseline")
"""Stages of a run whose models are measured."""


def read_results(path: Path) -> Results:
    """Read a ``results.json``, or the one in a folder or in its ``bench`` folder.

    Raises:
        InputError: there is none, it is damaged, or it is of a newer version of this program.
    """
    file = next((p for p in (path, path / FILE, path / "bench" / FILE) if p.is_file()), None)
    if file is None:
        raise InputError(f"no {FILE} at '{path}'", fix=f"measure it first: sentcompress bench all {path}")
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        return parse_results(text)
    except RunError as error:
        raise InputError(f"{file}: {error.message}", fix=error.fix) from None


def write_results(results: Results, folder: Path) -> None:
    """Write ``results.json`` into a folder, which is made.

    Raises:
        StorageError: it cannot be written.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FILE, results.model_dump_json(indent=1) + "\n")


def earlier_results(target: Path) -> Results | None:
    """What was measured into a folder before; None where there is nothing, or nothing of this version."""
    try:
        return read_results(target / FILE) if (target / FILE).is_file() else None
    except InputError:
        return None  # of another version or damaged: replaced


def merged(old: Results | None, new: Results, measured: Sequence[str]) -> Results:
    """Keep what an earlier benchmark of the same folder measured and this one did not."""
    if old is None or old.models != new.models or old.title != new.title:
        return new
    kept = [part for part in PARTS if part not in measured]
    new.rows = [row for part in PARTS for row in (old if part in kept else new).rows if row.part == part]
    new.skipped += [skipped for skipped in old.skipped if skipped.part in kept]
    fields = {
        "causality": "causality",
        "quality": "quality",
        "text": "text",
        "reconstruct": "reconstruction",
        "speed": "speed",
        "memory": "memory",
        "data": "data",
    }
    for part, field in fields.items():
        # Quality measures causality on its way.
        if part in kept and not getattr(new, field):
            setattr(new, field, getattr(old, field))
    new.samples = new.samples or old.samples
    return new


def model_digests(stages: Iterable[Path]) -> dict[str, str]:
    """Digests of the weights of model folders, by the folders' names."""
    return {folder.name: folder_digest(folder) for folder in stages}


def is_current(target: Path, folder: Path, recipe: Recipe) -> bool:
    """Whether ``target`` holds the results of a whole benchmark of a run's present models and recipe.

    Args:
        target: folder of the results.
        folder: of the run.
    """
    try:
        results = read_results(target / FILE)
    except InputError:
        return False
    finished = [folder / name for name in STAGES if (folder / name / "config.json").is_file()]
    done = {row.part for row in results.rows} | {skipped.part for skipped in results.skipped}
    return (
        results.recipe == recipe.model_dump(mode="json")
        and results.models == model_digests(finished)
        and done >= set(recipe.bench.metrics)
    )


def parse_results(text: str) -> Results:
    """Check the text of a ``results.json``. Raises RunError saying what is wrong with it."""
    import json

    try:
        raw = json.loads(text)
        version = raw["schema_version"]
    except (ValueError, KeyError, TypeError):
        raise RunError("not a results file of ours, or cut short", fix="measure again") from None
    if version != SCHEMA_VERSION:
        raise RunError(
            f"schema version {version}, this program reads {SCHEMA_VERSION}",
            fix="read it with the version of sentcompress that wrote it, or measure again",
        )
    try:
        return Results.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RunError(f"damaged: {where}: {first['msg']}", fix="measure again") from None
