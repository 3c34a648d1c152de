"""``results.json``: one versioned schema for everything that is measured. No torch.

Every row carries its own provenance, so results of several runs can be put side by side, and a file that was measured
bit by bit stays true. Reports of the measurements are checked against the types that the measurements name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    PrivateAttr,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    create_model,
    model_serializer,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler

from sentcompress.benchmark.measurement import Measurement, measurements
from sentcompress.errors import InputError, RunError
from sentcompress.files import folder_digest, storage_errors, write_atomically
from sentcompress.provenance import Honesty, Record
from sentcompress.recipe import Recipe
from sentcompress.recipe.sections import MeasurementName
from sentcompress.table import Figure
from sentcompress.training.run_folder import BASELINE, COMPLETE, GRAFT, MEMORY, OPPONENT, VAE

SCHEMA_VERSION = 1
FILE = "results.json"
_STAGES = (VAE.name, GRAFT.name, MEMORY.name, BASELINE.name)


class Row(Record):
    """One line of a table."""

    part: MeasurementName
    """The measurement."""
    system: str
    """What was measured."""
    figures: dict[str, Figure]
    note: str = ""
    honesty: Honesty
    """Where the figures come from."""


class Skipped(Record):
    """Something that was asked for and could not be measured."""

    part: str
    """The measurement."""
    what: str
    reason: str


class Curve(Record):
    """A figure of a stage against its steps."""

    stage: str
    name: str
    points: list[tuple[int, float]]


class Sample(Record):
    """What a model wrote after a prompt."""

    system: str
    prompt: str
    text: str
    finish_reason: str


class Results(Record):
    """Everything measured on one folder. The report of a measurement is ``SomeMeasurement.of(results)``."""

    schema_version: int = SCHEMA_VERSION
    title: str
    created: str
    """UTC."""
    rows: list[Row] = []
    skipped: list[Skipped] = []
    curves: list[Curve] = []
    samples: list[Sample] = []
    recipe: dict[str, Any] = {}
    """The resolved recipe."""
    models: dict[str, str] = {}
    """Digests of the weights that were measured, by stage."""
    _reports: BaseModel = PrivateAttr()

    @property
    def reports(self) -> BaseModel:
        """The reports of all measurements, one field each: keys of ``results.json`` beside those above."""
        return self._reports

    @model_validator(mode="wrap")
    @classmethod
    def _with_reports(cls, raw: Any, build: ModelWrapValidatorHandler[Results]) -> Results:
        if not isinstance(raw, dict):
            return build(raw)
        model = _reports_model()
        reports = model.model_validate({key: raw[key] for key in model.model_fields if key in raw})
        results = build({key: value for key, value in raw.items() if key not in model.model_fields})
        results._reports = reports
        return results

    @model_serializer(mode="wrap")
    def _with_reports_inside(
        self, dump: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        written: dict[str, Any] = {}
        for key, value in dump(self).items():
            written[key] = value
            if key == "skipped":
                written |= self._reports.model_dump(mode=info.mode)
        return written

    def rows_of(self, measurement: str) -> list[Row]:
        """Rows of a measurement."""
        return [row for row in self.rows if row.part == measurement]

    def measured(self) -> list[str]:
        """Measurements that have rows, in order."""
        return [measurement.name for measurement in measurements() if self.rows_of(measurement.name)]

    def of_measurements(self, names: Sequence[str]) -> Results:
        """The same with the rows of some measurements only."""
        kept = {
            "rows": [row for row in self.rows if row.part in names],
            "skipped": [entry for entry in self.skipped if entry.part in names],
        }
        return self.model_copy(update=kept)


def _has_report(measurement: Measurement[Any]) -> bool:
    return measurement.report_type is not type(None)


@cache
def _reports_model() -> type[BaseModel]:
    """A field for the report of each measurement."""
    fields: dict[str, Any] = {
        str(m.key): (m.report_type, m.nothing()) for m in measurements() if _has_report(m)
    }
    return create_model("Reports", __base__=Record, **fields)


def read_results(path: Path) -> Results:
    """Read a ``results.json``, or the one in a folder or in its ``bench`` folder.

    Raises:
        InputError: there is none, it is damaged, or a newer version of this program wrote it.
    """
    file = next((p for p in (path, path / FILE, path / "bench" / FILE) if p.is_file()), None)
    if file is None:
        raise InputError(f"no {FILE} at '{path}'", fix=f"measure it first: sentcompress bench all {path}")
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        return parse_results(text)
    except RunError as error:
        raise InputError(f"{file}: {error.message}", fix=error.fix) from None


def parse_results(text: str) -> Results:
    """Check the text of a ``results.json``. Raises RunError saying what is wrong with it."""
    try:
        raw = json.loads(text)
        version = raw["schema_version"]
    except (ValueError, KeyError, TypeError):
        raise RunError("not a results file of sentcompress, or cut short", fix="measure again") from None
    if version != SCHEMA_VERSION:
        raise RunError(
            f"schema version {version}; this version of sentcompress reads {SCHEMA_VERSION}",
            fix="read it with the version of sentcompress that wrote it, or measure again",
        )
    try:
        return Results.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RunError(f"damaged: {where}: {first['msg']}", fix="measure again") from None


def write_results(results: Results, folder: Path) -> None:
    """Write ``results.json`` into a folder, which is made.

    Raises:
        StorageError: it cannot be written.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FILE, results.model_dump_json(indent=1) + "\n")


def earlier_results(target: Path) -> Results | None:
    """What was measured into a folder before; None if nothing was, or not by this version."""
    try:
        return read_results(target / FILE) if (target / FILE).is_file() else None
    except InputError:
        return None  # of another version or damaged: replaced


def merged(old: Results | None, new: Results, measured: Sequence[str]) -> Results:
    """Add to new results what an earlier benchmark of the same folder measured and this one did not.

    Args:
        measured: measurements that were asked for now.
    """
    if old is None or old.models != new.models or old.title != new.title:
        return new
    kept = [m for m in measurements() if m.name not in measured]
    names = {m.name for m in kept}
    new.rows = [row for m in measurements() for row in (old if m.name in names else new).rows_of(m.name)]
    new.skipped += [skipped for skipped in old.skipped if skipped.part in names]
    for measurement in kept:
        # What another measurement required was measured on the way.
        if _has_report(measurement) and not measurement.of(new):
            measurement.put(new, measurement.of(old))
    new.samples = new.samples or old.samples
    return new


def model_digests(stages: Iterable[Path]) -> dict[str, str]:
    """Digests of the weights of model folders, by the folders' names."""
    return {folder.name: folder_digest(folder) for folder in stages}


def is_measured(stage: str) -> bool:
    """Whether the model of a stage is measured, by the stage's name."""
    return stage in _STAGES or stage.startswith(OPPONENT)


def finished_stages(folder: Path) -> list[Path]:
    """Folders of a run's finished stages whose models are measured, the opponents last."""
    opponents = sorted(path.name for path in folder.glob(f"{OPPONENT}*"))
    return [folder / name for name in (*_STAGES, *opponents) if (folder / name / COMPLETE).is_file()]


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
    done = {row.part for row in results.rows} | {skipped.part for skipped in results.skipped}
    return (
        results.recipe == recipe.values()
        and results.models == model_digests(finished_stages(folder))
        and done >= set(recipe.bench.metrics)
    )
