"""Runs to points: finding finished runs, checking that they can be compared, averaging their seeds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import not_
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationError

from sentcompress.benchmark.compare import setting_warnings
from sentcompress.benchmark.measurement import BASELINES, OPPONENT_SYSTEM, SENTENCE_MODEL, stage_of
from sentcompress.benchmark.measurements.quality import DecodingCost, ModelCounts, Quality, QualityScore
from sentcompress.benchmark.results import FILE, Results, read_results
from sentcompress.errors import InputError
from sentcompress.files import read_json
from sentcompress.provenance import Honesty, Record
from sentcompress.recipe import by_dotted_name
from sentcompress.studies.presentation import cost_cautions

BASELINE = BASELINES[0]
SAME_BUDGET = 1.05
"""Runs whose tokens differ by less are one budget: another seed reads other passages."""
EXPECTED = ("name", "description", "seed", "backbone", "bench", "graft.steps", "train_vae.steps")
"""Fields of the recipe in which the runs of one scaling law may differ."""


class SystemPoint(Record):
    """One system of one run."""

    bits_per_byte: float
    parameters: int
    trainable_parameters: int | None
    training_tokens: int
    """Of the graft, or of the baseline or opponent."""
    vae_tokens: int | None = None
    """On top, of the SentenceVAE; None for token-level models, and where they are not known."""
    flops: float
    """Of training, SentenceVAE included: 6 N D, each weight by the tokens it multiplies."""
    cost: DecodingCost | None = None
    """Of writing such text; None in files of versions that did not compute it."""


class RunPoint(Record):
    """One finished run."""

    folder: str
    seed: int
    backbone: str
    """The LLM the recipe names."""
    backbone_parameters: int
    ours: SystemPoint
    """The sentence model."""
    twin: SystemPoint
    """The baseline: the same LLM, trained on the same data."""
    opponents: dict[str, SystemPoint] = Field(default={}, exclude_if=not_)
    """Of those the recipe names, by name."""
    ratio: float
    """Of bits per byte, the sentence model's to the baseline's."""
    honesty: Honesty
    """Of the sentence model's figure."""


class SeedFigures(Record):
    """A figure of each seed of a point, with mean, lowest and highest."""

    mean: float
    low: float
    high: float
    seeds: list[float]


class OpponentFigures(Record):
    """An opponent at a point."""

    bits_per_byte: SeedFigures
    ratio: SeedFigures
    """Of the sentence model's bits per byte to its own."""
    tokens: float
    """Mean over the seeds."""


class Point(Record):
    """One size at one budget, averaged over its seeds."""

    backbone_parameters: int
    budget: int
    """Mean graft tokens of all runs of the budget, whatever their size."""
    folders: list[str]
    seeds: list[int]
    ours: SeedFigures
    twin: SeedFigures
    ratio: SeedFigures
    ours_tokens: float
    """Mean over the seeds."""
    twin_tokens: float
    opponents: dict[str, OpponentFigures] = Field(default={}, exclude_if=not_)
    """Those that every run of the point has, by name."""


class Heldout(Record):
    """The text all runs were scored on."""

    documents: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.bytes:,} bytes of {self.documents} documents"


@dataclass
class Gathered:
    """What :func:`gather` found."""

    runs: list[RunPoint]
    points: list[Point]
    heldout: Heldout
    notes: list[str]


class Earlier(Record):
    """What is read of an earlier ``scaling-law.json``: its runs, whose folders may be gone."""

    model_config = ConfigDict(extra="ignore")
    heldout: Heldout
    runs: list[RunPoint]
    notes: list[str]


def gather(sources: Sequence[Path]) -> Gathered:
    """Read runs and average them to points, smallest size and budget first.

    Args:
        sources: folders of a finished run each, or of several runs (a sweep); a ``scaling-law.json`` adds the runs
            of an earlier law.

    Raises:
        InputError: naming the folder that has no results, no baseline, NaN or infinite figures, other held-out text, or
            the same size, budget and seed as another; or there are fewer than two points.
    """
    earlier = [(path, _earlier(path)) for path in sources if path.is_file()]
    found, notes = _find([path for path in sources if not path.is_file()])
    read = [(folder, read_results(folder)) for folder in found]
    runs = [_run(folder, results) for folder, results in read]
    texts = [(path, law.heldout) for path, law in earlier]
    if read:
        texts.append((read[0][0], _same_text(read)))
    heldout = texts[0][1]
    for path, text in texts:
        if text != heldout:
            raise InputError(
                f"not scored on the same held-out text: '{texts[0][0]}' ({heldout}), '{path}' ({text})",
                fix="measure the folders with the limits of the earlier runs, or leave one of the two out",
            )
    for _, law in earlier:
        runs += law.runs
        notes += [note for note in law.notes if note not in notes]
    points = _points(runs)
    if len(points) < 2:
        raise InputError(
            f"'{runs[0].folder}' and the other runs make one point (one size, one budget); a law needs several",
            fix="give runs of at least three budgets or sizes, such as the folder of: "
            "sentcompress sweep RECIPE --grid graft.steps=100,300,900",
        )
    notes += _missing_opponents(runs)
    notes += _differences([results.recipe for _, results in read])
    if earlier and read:
        notes.append(
            "recipes of folders and of an earlier scaling-law.json were not compared with each other"
        )
    if any(results.recipe.get("backbone", {}).get("init") != "random" for _, results in read):
        notes.append(
            "the backbones were pretrained: token counts leave that out, and the exponents are those of fine-tuning"
        )
    notes += setting_warnings([_quality_only(results) for _, results in read])
    notes += cost_cautions([results for _, results in read])
    return Gathered(runs, points, heldout, notes)


def _earlier(path: Path) -> Earlier:
    raw = read_json(path)
    if not isinstance(raw, dict) or "runs" not in raw:
        raise InputError(
            f"'{path}' is not a scaling-law.json", fix="give one, or folders of finished runs or of sweeps"
        )
    try:
        return Earlier.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{path}: {where}: {first['msg']}",
            fix="write it again: sentcompress bench scaling-law FOLDER ...",
        ) from None


def _find(folders: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Folders with results, each once, and what was passed over."""
    found: dict[Path, Path] = {}
    notes = []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"no folder '{folder}'", fix="give folders of finished runs or of sweeps")
        inside = [folder] if _measured(folder) else sorted(p for p in folder.iterdir() if _measured(p))
        if not inside:
            raise InputError(
                f"no results in '{folder}': neither bench/{FILE} nor a run folder with one",
                fix=f"measure it first: sentcompress bench quality {folder}; or give another folder",
            )
        found |= {path.resolve(): path for path in inside if path.resolve() not in found}
        if not _measured(folder):
            waiting = [p for p in folder.iterdir() if (p / "recipe.yaml").is_file() and not _measured(p)]
            notes += [f"'{path}' has no results yet and was left out" for path in sorted(waiting)]
    return list(found.values()), notes


def _measured(folder: Path) -> bool:
    return (folder / FILE).is_file() or (folder / "bench" / FILE).is_file()


def _run(folder: Path, results: Results) -> RunPoint:
    ours, baseline = (_score(folder, results, system) for system in (SENTENCE_MODEL, BASELINE))
    rows = [row for row in results.rows if row.part == "quality" and row.system == SENTENCE_MODEL]
    if not rows:
        raise InputError(
            f"'{folder}': its {FILE} has no row of the {SENTENCE_MODEL}", fix=_measure_again(folder)
        )
    others = [_score(folder, results, system) for system in _opponents(results)]
    systems = {score.system: _system(folder, score) for score in (ours, baseline, *others)}
    assert ours.counts is not None
    return RunPoint(
        folder=str(folder),
        seed=rows[0].honesty.seed,
        backbone=str(results.recipe.get("backbone", {}).get("model", "")),
        backbone_parameters=ours.counts.backbone_parameters,
        ours=systems[SENTENCE_MODEL],
        twin=systems[BASELINE],
        opponents={s.system.removeprefix(OPPONENT_SYSTEM): systems[s.system] for s in others},
        ratio=ours.bits_per_byte / baseline.bits_per_byte,
        honesty=rows[0].honesty,
    )


def _opponents(results: Results) -> list[str]:
    """The opponents that were measured, as systems."""
    return [score.system for score in Quality.of(results) if score.system.startswith(OPPONENT_SYSTEM)]


def _missing_opponents(runs: Sequence[RunPoint]) -> list[str]:
    """Notes on runs without figures of an opponent that other runs have."""
    notes = []
    for name in dict.fromkeys(name for run in runs for name in run.opponents):
        if without := [f"'{run.folder}'" for run in runs if name not in run.opponents]:
            notes.append(f"{OPPONENT_SYSTEM}{name} was not measured in {', '.join(without)}")
    return notes


def _measure_again(folder: Path) -> str:
    return f"measure it again: sentcompress bench quality {folder}"


def _score(folder: Path, results: Results, system: str) -> QualityScore:
    score = next((score for score in Quality.of(results) if score.system == system), None)
    if score is None:
        why = next((f": {s.reason}" for s in results.skipped if s.what == system), "")
        fix = f"measure it: sentcompress bench quality {folder}"
        if system == BASELINE:
            recipe = folder / "recipe.yaml"
            fix = (
                f"train it, then measure again: sentcompress baseline {recipe} --set baseline.enabled=true --out "
                f"{folder} && sentcompress bench quality {folder} --set baseline.enabled=true"
            )
        raise InputError(f"'{folder}' has no figures for the {system}{why}", fix=fix)
    if not (math.isfinite(score.bits_per_byte) and score.bits_per_byte > 0):
        raise InputError(
            f"'{folder}': bits per byte of the {system} are {score.bits_per_byte}, which cannot be fitted",
            fix=f"{_measure_again(folder)}; if that does not change them, the training failed: leave the run out",
        )
    return score


def _system(folder: Path, score: QualityScore) -> SystemPoint:
    counts, stage = score.counts, stage_of(score.system)
    assert stage is not None
    if counts is None:
        raise InputError(
            f"'{folder}' was measured by a version that did not count parameters and tokens",
            fix=_measure_again(folder),
        )
    tokens = counts.training_tokens.get(stage, 0)
    if tokens <= 0:
        raise InputError(
            f"'{folder}': it is not known on how many tokens the {score.system} was trained "
            f"({stage}/run.json does not say)",
            fix=f"train the stage {stage} with this version of sentcompress, then {_measure_again(folder)}",
        )
    return SystemPoint(
        bits_per_byte=score.bits_per_byte,
        parameters=counts.parameters,
        trainable_parameters=counts.trainable_parameters,
        training_tokens=tokens,
        vae_tokens=counts.training_tokens.get("vae"),
        flops=flops(counts, tokens),
        cost=score.cost,
    )


def flops(counts: ModelCounts, tokens: int) -> float:
    """Floating-point operations of training, 6 for each product of a weight and a state: 2 forward and 4 backward.

    The backbone of a sentence model reads one position for many tokens; its SentenceVAE was trained without it. Lookup
    tables multiply nothing. As usual, attention over positions is left out; frozen weights count like trained ones.
    """
    from sentcompress.estimate.roofline import products_per_token, training_flops  # imports torch

    around = counts.parameters - counts.table_parameters - counts.backbone_parameters
    per_token = products_per_token(around, counts.backbone_parameters, counts.tokens_per_position)
    return training_flops(per_token * tokens + around * counts.training_tokens.get("vae", 0))


def _same_text(read: Sequence[tuple[Path, Results]]) -> Heldout:
    texts = []
    for folder, results in read:
        scores = {score.system: score for score in Quality.of(results)}
        systems = [SENTENCE_MODEL, BASELINE, *_opponents(results)]
        keys = {tuple((d.source, d.covered_bytes) for d in scores[system].documents) for system in systems}
        if len(keys) > 1:
            raise InputError(
                f"'{folder}': the {' and the '.join(systems)} were scored on different bytes",
                fix=_measure_again(folder),
            )
        texts.append((folder, keys.pop()))
    common = Counter(text for _, text in texts).most_common(1)[0][0]
    others = [(folder, text) for folder, text in texts if text != common]
    if others:
        named = "; ".join(f"'{folder}' ({_heldout(text)})" for folder, text in others)
        like = next(folder for folder, text in texts if text == common)
        raise InputError(
            f"not scored on the same held-out text as '{like}' ({_heldout(common)}): {named}",
            fix="measure all with the same data, segmenter and limits (sentcompress bench quality FOLDER --set "
            "bench.max_documents=N), or leave these folders out",
        )
    return _heldout(common)


def _heldout(text: tuple[tuple[str, int], ...]) -> Heldout:
    return Heldout(documents=len(text), bytes=sum(size for _, size in text))


def _points(runs: list[RunPoint]) -> list[Point]:
    groups: dict[tuple[int, int], list[RunPoint]] = {}
    for budget, members in _budgets(runs):
        for run in members:
            groups.setdefault((run.backbone_parameters, budget), []).append(run)
    points = []
    for (size, budget), group in sorted(groups.items()):
        for seed, count in Counter(run.seed for run in group).items():
            if count > 1:
                first, second = [run.folder for run in group if run.seed == seed][:2]
                raise InputError(
                    f"'{first}' and '{second}' have the same size, budget and seed ({seed})",
                    fix="give only one of them: only runs that differ in the seed alone are averaged",
                )
        points.append(
            Point(
                backbone_parameters=size,
                budget=budget,
                folders=[run.folder for run in group],
                seeds=[run.seed for run in group],
                ours=_over_seeds([run.ours.bits_per_byte for run in group]),
                twin=_over_seeds([run.twin.bits_per_byte for run in group]),
                ratio=_over_seeds([run.ratio for run in group]),
                ours_tokens=_mean([run.ours.training_tokens for run in group]),
                twin_tokens=_mean([run.twin.training_tokens for run in group]),
                opponents={
                    name: _opponent_figures(name, group)
                    for name in group[0].opponents
                    if all(name in run.opponents for run in group)
                },
            )
        )
    return points


def _opponent_figures(name: str, group: Sequence[RunPoint]) -> OpponentFigures:
    pairs = [(run.ours, run.opponents[name]) for run in group]
    return OpponentFigures(
        bits_per_byte=_over_seeds([theirs.bits_per_byte for _, theirs in pairs]),
        ratio=_over_seeds([ours.bits_per_byte / theirs.bits_per_byte for ours, theirs in pairs]),
        tokens=_mean([theirs.training_tokens for _, theirs in pairs]),
    )


def _budgets(runs: list[RunPoint]) -> Iterator[tuple[int, list[RunPoint]]]:
    """Mean tokens and the runs of each budget, smallest first; ``runs`` is sorted by them."""
    runs.sort(key=lambda run: run.ours.training_tokens)
    start = 0
    for end in range(1, len(runs) + 1):
        first = runs[start].ours.training_tokens
        if end == len(runs) or runs[end].ours.training_tokens > SAME_BUDGET * first:
            members = runs[start:end]
            yield round(_mean([run.ours.training_tokens for run in members])), members
            start = end


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _over_seeds(values: list[float]) -> SeedFigures:
    return SeedFigures(mean=_mean(values), low=min(values), high=max(values), seeds=values)


def _differences(recipes: Sequence[dict[str, Any]]) -> list[str]:
    """Notes on what the recipes differ in, besides size, budget and seed."""
    flat = [by_dotted_name(recipe) for recipe in recipes]
    fields = dict.fromkeys(field for recipe in flat for field in recipe)
    notes = []
    for field in fields:
        values = {str(recipe.get(field, "(absent)")) for recipe in flat}
        if len(values) > 1 and not any(field == name or field.startswith(f"{name}.") for name in EXPECTED):
            notes.append(f"the recipes differ in {field}: {', '.join(sorted(values))}")
    return notes


def _quality_only(results: Results) -> Results:
    rows = [row for row in results.rows if row.part == "quality" and stage_of(row.system)]
    return results.model_copy(update={"rows": rows})
