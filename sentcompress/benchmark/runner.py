"""Runs measurements and gathers their rows, each with its provenance. It knows no measurement by name."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from torch import nn
from transformers.utils import logging as transformers_logging

from sentcompress.benchmark.heldout_text import heldout_documents, heldout_lengths
from sentcompress.benchmark.measurement import Measurement, Report, measurements, stage_of
from sentcompress.benchmark.models import Missing, ModelFolder, Models, read_curves
from sentcompress.benchmark.report import provenance_lines, sections, write_report
from sentcompress.benchmark.results import (
    Results,
    Row,
    Skipped,
    earlier_results,
    merged,
    model_digests,
    write_results,
)
from sentcompress.benchmark.text_writing import write_samples
from sentcompress.distributed import processes
from sentcompress.errors import InputError
from sentcompress.files import storage_errors, write_atomically
from sentcompress.provenance import Provenance
from sentcompress.recipe import BenchSettings, Recipe
from sentcompress.table import Figure, as_markdown
from sentcompress.text.progress import Bar
from sentcompress.training.card import with_section

Made = TypeVar("Made")


def run_bench(
    names: Sequence[str] | None,
    folder: Path | ModelFolder | None,
    recipe: Recipe | None = None,
    out: Path | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Results:
    """Measure a run or a model folder; write ``results.json``, ``report.html`` and ``samples.txt``.

    What was measured before and is not asked for now is kept, with its own provenance. Unless the results go elsewhere,
    the models' cards get the tables that belong on them. In several processes, all of them take part in the distributed
    measurements; then the first measures the rest, and writes.

    Args:
        names: measurements to run; None takes the recipe's ``bench.metrics``.
        folder: a run's folder or a model's; None measures random weights, where a measurement can.
        recipe: None takes the one saved in the folder.
        out: where results go; None takes ``bench`` in the folder.
        changes: fields of the recipe's ``bench`` with other values for this call; the results stay the recipe's.

    Raises:
        CausalityError: something was asked for that needs a causal model, and the model sees the future.
        CoverageError: a scorer could not prove that it scored every byte once.
        InputError: the folder, the recipe, the data or a setting cannot be used.
    """
    if isinstance(folder, Path):
        folder = ModelFolder(folder)
    if recipe is None:
        if folder is None:
            raise InputError("neither a folder nor a recipe was given", fix="give one of them")
        recipe = folder.recipe()
    wanted = _checked(names if names is not None else recipe.bench.metrics, changes or {})
    target = out or (folder.path / "bench" if folder else Path("out") / "bench")
    transformers_logging.disable_progress_bar()  # one for every small model would hide ours
    first = processes().is_main_process
    settings = BenchSettings.model_validate(recipe.bench.model_dump() | dict(changes or {}))
    bench = Bench(Models(recipe, folder, target), settings, quiet=quiet or not first)
    for name in wanted:
        bench.measurements[name].prepare(bench)
    if any(bench.measurements[name].reads_corpus for name in wanted):
        bench.read_corpus()
    earlier, results = earlier_results(target), bench.results
    if processes().num_processes > 1:
        wanted = distributed_first(wanted)
    if not first:
        for name in wanted:
            if bench.measurements[name].distributed:
                bench.measure(name)
        return results
    if folder is not None:
        results.curves = read_curves(folder)
        results.models = model_digests(folder.stages())
    for number, name in enumerate(wanted, 1):
        bench.measure(name)
        # Keep what is measured if a later measurement is killed; `is_current` does not take it for the whole.
        write_results(merged(earlier, results.model_copy(deep=True), wanted[:number]), target)
    headlines = {m.name for m in measurements() if m.headline}
    writes_samples = names is None and recipe.memory is None and recipe.graft.split is None
    if folder is not None and (writes_samples or headlines <= set(wanted)):
        bench.attempt("samples", "samples", bench.write_samples)
    results = merged(earlier, results, wanted)
    with storage_errors(target):
        write_report(results, target / "report.html")
        samples = "\n\n".join(f"{sample.prompt}|{sample.text}" for sample in results.samples)
        write_atomically(target / "samples.txt", samples + "\n")
    if folder is not None and target == folder.path / "bench":
        _write_on_cards([bench.measurements[name] for name in wanted], results, folder)
    write_results(results, target)  # last: it marks the end
    return results


def _checked(names: Sequence[str], changes: Mapping[str, Any]) -> list[str]:
    """The measurements in order. Raises InputError for an unknown one, and for a change that none of them reads."""
    known = {measurement.name: measurement for measurement in measurements()}
    for name in names:
        if name not in known:
            raise InputError(f"no measurement is called '{name}'", fix=f"use {', '.join(known)}")
    for measurement in measurements():
        for flag in measurement.flags:
            if flag.field in changes and measurement.name not in names:
                raise InputError(
                    f"{flag.name} (bench.{flag.field}) only concerns {measurement.name}, which is not measured",
                    fix=f"add {measurement.name} to bench.metrics",
                )
    return [name for name in known if name in names]


def _write_on_cards(measured: Sequence[Measurement[Any]], results: Results, folder: ModelFolder) -> None:
    """Put the tables that belong there on the cards of the models that were measured."""
    for measurement in measured:
        own = results.of_measurements([measurement.name])
        if not measurement.on_cards or not own.rows:
            continue
        table = sections(own)[measurement.name][0].table
        parts = ["\n".join(as_markdown(table.columns, table.rows)), *table.notes, *provenance_lines(own)]
        for stage in filter(None, {stage_of(row.system) for row in own.rows}):
            with suppress(Missing), storage_errors(folder.path):
                card = folder.stage(stage) / "README.md"
                if card.is_file():
                    text = with_section(card.read_text(encoding="utf-8"), table.title, "\n\n".join(parts))
                    write_atomically(card, text)


def distributed_first(names: Sequence[str]) -> list[str]:
    """What all processes measure together comes first, so that nobody waits for what one does alone."""
    together = {measurement.name for measurement in measurements() if measurement.distributed}
    return sorted(names, key=lambda name: name not in together)


class Bench:
    """One benchmark under way: the models, the settings, and the results so far.

    Args:
        settings: how to measure: the recipe's ``bench``, changed for this call.
        quiet: show no progress.
    """

    def __init__(self, models: Models, settings: BenchSettings, *, quiet: bool) -> None:
        self.models, self.recipe, self.settings = models, models.recipe, settings
        self.measurements = {m.name: type(m)() for m in measurements()}
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self.provenance = Provenance(self.recipe, models.device, "float32")
        self.results = Results(
            title=self.recipe.name,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            recipe=self.recipe.values(),
        )
        self._done: set[str] = set()
        self._shared: dict[Any, Any] = {}

    # ---- for the runner

    def measure(self, name: str) -> None:
        """Run a measurement and store its report."""
        began = time.monotonic()
        self.console.print(f"bench: {name} ...", markup=False)
        self.attempt(name, name, partial(self.report, type(self.measurements[name])))
        self.console.print(f"bench: {name}: {time.monotonic() - began:.0f} s", markup=False)

    def read_corpus(self) -> None:
        """From here on, rows say how long the held-out sentences are."""
        self.provenance.mean_sentence_tokens = float(heldout_lengths(self.models.corpus).mean())

    def write_samples(self) -> None:
        """Have the sentence model continue the beginnings of held-out documents, for the report."""
        documents = heldout_documents(self.models.corpus, self.settings)[: self.settings.samples]
        texts = [document.texts for document in documents]
        model, tokenizer = self.models.sentence_lm, self.models.tokenizer
        self.results.samples += write_samples(model, tokenizer, texts, self.recipe.seed)

    # ---- for measurements

    def report(self, kind: type[Measurement[Report]]) -> Report:
        """The report of a measurement, which is measured now unless it was before."""
        if kind.name not in self._done:
            report = self.measurements[kind.name].measure(self)
            if report is not None:
                kind.put(self.results, report)
            self._done.add(kind.name)
            return report
        return kind.of(self.results)

    def attempt(self, name: str, what: str, call: Callable[[], Made]) -> Made | None:
        """Measure; if something that it needs is not there, note that in the results and return None."""
        try:
            return call()
        except Missing as missing:
            self.skip(name, what, str(missing))
            return None

    def skip(self, name: str, what: str, reason: str) -> None:
        """Note what was not measured, and why."""
        self.results.skipped.append(Skipped(part=name, what=what, reason=reason))
        self.console.print(f"bench: {name}: {what} not measured: {reason}", markup=False)

    def row(
        self,
        name: str,
        system: str,
        figures: Mapping[str, Figure],
        stages: Sequence[str] = (),
        note: str = "",
        model: nn.Module | tuple[str, str] | None = None,
    ) -> None:
        """Add a row to the results.

        Args:
            name: of the measurement.
            stages: those the system was trained in; none for weights that learned nothing in this run.
            model: what was measured, or its dtype and where it lay (:meth:`Models.describe`) if it is gone already.
        """
        tokens = None
        if self.models.folder is not None and stages:
            tokens = self.models.folder.training_tokens(*stages)
        elif not stages:
            tokens = 0
        honesty = self.provenance.honesty(tokens)
        if model is not None:
            honesty.dtype, where = self.models.describe(model) if isinstance(model, nn.Module) else model
            honesty.device = "; ".join(filter(None, (honesty.device, where)))
        self.results.rows.append(
            Row(part=name, system=system, figures=dict(figures), note=note, honesty=honesty)
        )

    def shared(self, make: Callable[[Models], Made]) -> Made:
        """What several measurements need, made once."""
        if make not in self._shared:
            self._shared[make] = make(self.models)
        return self._shared[make]

    def bar(self, what: str, total: int) -> Bar:
        """A progress bar on the terminal."""
        return Bar(f"bench: {what}", total, enabled=not self.quiet)

    @property
    def graft_stages(self) -> tuple[str, ...]:
        """Stages the sentence model was trained in."""
        return ("vae", "graft") if self.recipe.trains_vae else ("graft",)
