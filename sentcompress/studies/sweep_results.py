"""``sweep.json``: what a sweep found, run by run, read from the runs' own files. No torch."""

from __future__ import annotations

import json
from operator import not_
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from sentcompress.benchmark.compare import setting_warnings
from sentcompress.benchmark.measurement import BASELINES, OPPONENT_SYSTEM, SENTENCE_MODEL
from sentcompress.benchmark.measurements.quality import Quality
from sentcompress.benchmark.measurements.reconstruct import Reconstruct
from sentcompress.benchmark.measurements.speed import Speed
from sentcompress.benchmark.results import Results, read_results
from sentcompress.errors import InputError
from sentcompress.files import read_json
from sentcompress.provenance import Honesty, Record
from sentcompress.studies.presentation import cost_cautions

SCHEMA_VERSION = 1
FILE = "sweep.json"
BASELINE, BACKBONE = BASELINES


class RunFigures(Record):
    """The figures of a run that a sweep compares; None where they were not measured."""

    mean_sentence_tokens: float | None = None
    """Of the held-out sentences."""
    token_accuracy: float | None = None
    """Share of tokens that come back right by position, free-running."""
    exact_sentences: float | None = None
    forced_perplexity: float | None = None
    bits_per_byte: float | None = None
    """Of the sentence model."""
    backbone_bits_per_byte: float | None = None
    """Of the backbone as it came, on the same bytes."""
    backbone_ratio: float | None = None
    """The model's bits per byte over those of the backbone as it came."""
    baseline_bits_per_byte: float | None = None
    """Of the equal-data baseline, on the same bytes."""
    baseline_ratio: float | None = None
    opponents: dict[str, float] = Field(default={}, exclude_if=not_)
    """Bits per byte of the recipe's opponents, by name, on the same bytes."""
    output_tokens_per_second: float | None = None
    """At the smallest batch that was measured."""
    speed_ratio: float | None = None
    """Over the backbone's own ``generate``, timed side by side."""
    batch_size: int | None = None
    training_seconds: float | None = None
    """Wall-clock seconds of the steps of the SentenceVAE and the graft."""
    training_tokens: int | None = None
    """Of the SentenceVAE and the graft together."""
    parameters: int | None = None
    """Of the grafted model, as saved."""


class SweepRun(Record):
    """The run of one grid point."""

    name: str
    """Also its folder, beside ``sweep.json``."""
    values: list[str]
    """Its value of each field of the grid, as tables show it."""
    overrides: list[str]
    recipe_digest: str
    state: Literal["done", "failed", "waiting"] = "waiting"
    error: str | None = None
    wall_seconds: float | None = None
    """Of all attempts of a sweep together, benchmark included; None for a run started by hand."""
    figures: RunFigures | None = None
    honesty: Honesty | None = None


class SweepResults(Record):
    """A whole sweep, finished or not."""

    schema_version: int = SCHEMA_VERSION
    title: str
    command: str
    created: str
    """UTC."""
    overrides: list[str]
    """The ``--set`` options, the same for all runs."""
    axes: dict[str, list[str]]
    """Fields of the grid and their values, as YAML."""
    cells: list[SweepRun]
    """The runs, in the order of the grid."""
    notes: list[str]
    """Why figures may not be comparable."""

    @property
    def order(self) -> Literal["ratio to the baseline", "bits per byte"]:
        """What runs are ranked by: the ratio where every finished run has one."""
        done = [run.figures for run in self.cells if run.figures is not None]
        by_ratio = bool(done) and all(figures.baseline_ratio is not None for figures in done)
        return "ratio to the baseline" if by_ratio else "bits per byte"

    def ranked(self) -> list[SweepRun]:
        """Runs, best first; those without such a figure come last, in the order of the grid."""
        by_ratio = self.order == "ratio to the baseline"

        def key(run: SweepRun) -> float:
            figures = run.figures or RunFigures()
            value = figures.baseline_ratio if by_ratio else figures.bits_per_byte
            return float("inf") if value is None else value

        return sorted(self.cells, key=key)


def read_figures(folder: Path) -> tuple[RunFigures, Results]:
    """The figures of a finished run, and the results they come from.

    Raises:
        InputError: it has no results.
    """
    results = read_results(folder)
    figures = RunFigures()
    lengths = [row.honesty.mean_sentence_tokens for row in results.rows]
    figures.mean_sentence_tokens = next((n for n in lengths if n is not None), None)
    if report := Reconstruct.of(results):
        figures.token_accuracy = report.token_accuracy
        figures.exact_sentences = report.exact_sentences
        figures.forced_perplexity = report.teacher_forced_perplexity
    scores = {score.system: score.bits_per_byte for score in Quality.of(results)}
    ours = figures.bits_per_byte = scores.get(SENTENCE_MODEL)
    figures.backbone_bits_per_byte = scores.get(BACKBONE)
    figures.baseline_bits_per_byte = scores.get(BASELINE)
    figures.opponents = {
        system.removeprefix(OPPONENT_SYSTEM): score
        for system, score in scores.items()
        if system.startswith(OPPONENT_SYSTEM)
    }
    if ours is not None:
        figures.backbone_ratio = _ratio(ours, scores.get(BACKBONE))
        figures.baseline_ratio = _ratio(ours, scores.get(BASELINE))
    speed = Speed.of(results)
    runs = [run for run in speed.runs if run.system == SENTENCE_MODEL] if speed else []
    if runs:
        run = min(runs, key=lambda run: run.batch_size)
        figures.output_tokens_per_second, figures.speed_ratio = run.output_tokens_per_second, run.ratio
        figures.batch_size = run.batch_size
    trained = [read_json(folder / stage / "run.json") or {} for stage in ("vae", "graft")]
    figures.training_seconds = sum(float(about.get("seconds", 0)) for about in trained)
    figures.training_tokens = sum(int(about.get("tokens", 0)) for about in trained)
    figures.parameters = count_parameters(folder / "graft")
    return figures, results


def _ratio(ours: float, theirs: float | None) -> float | None:
    return ours / theirs if theirs else None


def honesty_of(results: Results) -> Honesty | None:
    """The provenance of the sentence model's figures, or of any."""
    rows = [row for row in results.rows if row.system == SENTENCE_MODEL] or results.rows
    return rows[0].honesty if rows else None


def count_parameters(folder: Path) -> int | None:
    """Weights in a folder's safetensors files, from their headers; None without such a file."""
    total, found = 0, False
    for path in folder.glob("*.safetensors"):
        found = True
        with open(path, "rb") as file:
            header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            size = 1
            for length in entry["shape"]:
                size *= length
            total += size
    return total if found else None


def comparison_notes(done: list[tuple[SweepRun, Results]]) -> list[str]:
    """Why the figures of these runs may not be comparable, and by how much."""
    notes = setting_warnings([results for _, results in done])
    notes += cost_cautions([results for _, results in done])
    scored = [scores[0] for _, results in done if (scores := Quality.of(results))]
    texts = {tuple((d.source, d.bytes) for d in score.documents) for score in scored}
    figures = [run.figures.backbone_bits_per_byte for run, _ in done if run.figures]
    reference = [value for value in figures if value is not None]
    if len(texts) > 1:
        sizes = sorted(sum(size for _, size in text) for text in texts)
        found = (
            f": the backbone as it came has {min(reference):.4f} to {max(reference):.4f}" if reference else ""
        )
        notes.append(
            f"the runs were not scored on the same bytes ({sizes[0]:,} to {sizes[-1]:,}): the segmenter decides where "
            "a document's first sentence ends, and its last one that is scored. Compare ratios rather than bits per "
            f"byte{found}"
        )
    return notes


def read_sweep(folder: Path) -> SweepResults | None:
    """The sweep written in a folder before; None where there is none.

    Raises:
        InputError: its file is of another version of this program.
    """
    raw = read_json(folder / FILE)
    if not isinstance(raw, dict):
        return None
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            f"{folder / FILE} has schema version {raw.get('schema_version')}; this version of sentcompress reads "
            f"{SCHEMA_VERSION}",
            fix="use another --out",
        )
    try:
        return SweepResults.model_validate(raw)
    except ValidationError:
        return None  # damaged: it is written again from the runs' own files
