"""Measures the parts of a benchmark and gathers rows, each with its honesty line."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging as transformers_logging

from sentcompress.benchmark import rows as make_rows
from sentcompress.benchmark.breakdown import Places, chosen
from sentcompress.benchmark.counts import model_counts
from sentcompress.benchmark.heldout import ByteCounter, heldout_documents, same_bytes
from sentcompress.benchmark.judge import Judge
from sentcompress.benchmark.measurements.causality import check_causality, require_causal
from sentcompress.benchmark.measurements.data import draw_lengths, heldout_lengths, measure_data
from sentcompress.benchmark.measurements.quality import score_sentence_model, score_token_model, score_unigram
from sentcompress.benchmark.measurements.reconstruct import heldout_sentences, measure_reconstruction
from sentcompress.benchmark.measurements.segments import regex_presets, score_segmenters
from sentcompress.benchmark.measurements.text import BASELINE, measure_text
from sentcompress.benchmark.memory_meter import measure_memory
from sentcompress.benchmark.models import Folder, Missing, Parts, read_curves
from sentcompress.benchmark.records import (
    PARTS,
    By,
    CausalityReport,
    Part,
    QualityScore,
    Results,
    Row,
    Skipped,
    Throughput,
)
from sentcompress.benchmark.results import earlier_results, merged, model_digests, write_results
from sentcompress.benchmark.samples import write_samples
from sentcompress.benchmark.speed_runs import measure_speed
from sentcompress.benchmark.throughput import measure_throughput
from sentcompress.benchmark.timing import SpeedModels, speed_models
from sentcompress.distributed import processes
from sentcompress.errors import InputError
from sentcompress.estimate.roofline import decoding_cost
from sentcompress.files import storage_errors, write_atomically
from sentcompress.generation.output_head import ShortlistHead, make_shortlist_head
from sentcompress.provenance import Provenance
from sentcompress.recipe import Recipe
from sentcompress.table import Figure
from sentcompress.text.progress import Bar

DRAWN_LENGTHS = 64
"""Sentence lengths drawn for the speed runs."""


def run_bench(
    parts: Sequence[str] | None,
    folder: Path | Folder | None,
    recipe: Recipe | None = None,
    out: Path | None = None,
    *,
    by: Sequence[str] | None = None,
    judge: str | None = None,
    quiet: bool = False,
) -> Results:
    """Measure parts of a run or model folder; write ``results.json``, ``report.html`` and ``samples.txt``.

    Parts that were measured before and are not asked for now are kept, with their own honesty lines. In several
    processes each scores its share of the held-out documents, and all write texts at the same time; then the first
    measures the rest, and writes.

    Args:
        parts: names of :data:`PARTS`; None takes the recipe's ``bench.metrics``.
        folder: a run's folder or a model's; None measures speed and memory with random weights.
        recipe: None takes the one saved in the folder.
        out: where results go; None takes ``bench`` in the folder.
        by: what quality is broken down by; None takes the recipe's ``bench.by``.
        judge: the LLM that scores generated text; None takes the recipe's ``bench.text_judge``.

    Raises:
        CausalityError: quality or text was asked for, and the model sees the future.
        CoverageError: a scorer could not prove that it charged every byte once.
        InputError: the folder, the recipe, the data or the judge cannot be used.
    """
    from sentcompress.benchmark.report import write_report

    place = Folder(folder) if isinstance(folder, Path) else folder
    if recipe is None:
        if place is None:
            raise InputError("neither a folder nor a recipe was given")
        recipe = place.recipe()
    wanted = _checked(parts if parts is not None else recipe.bench.metrics)
    if by and "quality" not in wanted:
        raise InputError("only quality is broken down, and it is not measured", fix="add it to bench.metrics")
    target = out or (place.path / "bench" if place else Path("out") / "bench")
    transformers_logging.disable_progress_bar()  # a bar for every small model hides what counts
    first = processes().is_main_process
    bench = _Bench(
        Parts(recipe, place, target), quiet or not first, chosen(recipe.bench.by if by is None else by)
    )
    if "text" in wanted and (judge := judge or recipe.bench.text_judge):
        bench.judge = Judge(judge, bench.parts.device)  # one that does not exist is said now, not in an hour
    if set(wanted) - {"causality", "segments"}:
        bench.know_the_text()
    earlier, results = earlier_results(target), bench.results
    if processes().num_processes > 1:
        wanted = together_first(wanted)
    if not first:
        if "quality" in wanted:
            bench.measure("quality")
        if "speed" in wanted:
            bench.attempt("speed", "throughput", bench.throughput)
        return results
    if place is not None:
        results.curves = read_curves(place)
        results.models = model_digests(place.stages())
    for number, part in enumerate(wanted, 1):
        bench.measure(part)
        # What is measured is kept, should a later part be killed; it is not taken for the whole.
        write_results(merged(earlier, results.model_copy(deep=True), wanted[:number]), target)
    if place is not None and (parts is None or set(wanted) >= {"quality", "speed"}):
        bench.attempt("samples", "samples", bench.samples)
    results = merged(earlier, results, wanted)
    with storage_errors(target):
        write_report(results, target / "report.html")
        write_atomically(
            target / "samples.txt", "\n\n".join(f"{s.prompt}|{s.text}" for s in results.samples) + "\n"
        )
    write_results(results, target)  # last: it marks the end
    return results


def _checked(parts: Sequence[str]) -> list[Part]:
    for part in parts:
        if part not in PARTS:
            raise InputError(f"no part of the benchmark is called '{part}'", fix=f"use {', '.join(PARTS)}")
    return [part for part in PARTS if part in parts]


def together_first(parts: Sequence[Part]) -> list[Part]:
    """What all processes measure together comes first: nobody waits for what one does alone."""
    return sorted(parts, key=lambda part: part not in ("causality", "quality", "speed"))


class _Bench:
    """One benchmark under way."""

    def __init__(self, parts: Parts, quiet: bool, by: Sequence[By]) -> None:
        self.parts, self.recipe, self.by = parts, parts.recipe, by
        self.settings = parts.recipe.bench
        self.judge: Judge | None = None
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self.provenance = Provenance(self.recipe, parts.device, "float32")
        self.results = Results(
            title=self.recipe.name,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            recipe=self.recipe.model_dump(mode="json"),
        )

    def measure(self, part: Part) -> None:
        began = time.monotonic()
        self.console.print(f"bench: {part} ...", markup=False)
        self.attempt(part, part, getattr(self, part))
        self.console.print(f"bench: {part}: {time.monotonic() - began:.0f} s", markup=False)

    def attempt(self, part: str, what: str, call: Callable[[], Any]) -> Any:
        """Measure; what cannot be, because something is not there, is written down instead."""
        try:
            return call()
        except Missing as missing:
            self.skip(part, what, str(missing))
            return None

    def skip(self, part: str, what: str, reason: str) -> None:
        self.results.skipped.append(Skipped(part=part, what=what, reason=reason))
        self.console.print(f"bench: {part}: {what} not measured: {reason}", markup=False)

    def row(
        self,
        part: Part,
        system: str,
        figures: dict[str, Figure],
        stages: Sequence[str] = (),
        note: str = "",
        about: tuple[str, str] | None = None,
    ) -> None:
        """Add a row; ``stages`` are what the system was trained in, ``about`` is of the model that was measured."""
        tokens = None
        if self.parts.folder is not None and stages:
            tokens = self.parts.folder.training_tokens(*stages)
        elif not stages:
            tokens = 0
        honesty = self.provenance.honesty(tokens)
        if about is not None:
            honesty.dtype, where = about
            honesty.device = "; ".join(filter(None, (honesty.device, where)))
        self.results.rows.append(Row(part=part, system=system, figures=figures, note=note, honesty=honesty))

    def know_the_text(self) -> None:
        """From here on, rows say how long the held-out sentences are."""
        self.provenance.mean_sentence_tokens = float(heldout_lengths(self.parts.corpus).mean())

    @property
    def trained_in(self) -> tuple[str, ...]:
        """Stages the sentence model was trained in."""
        return ("graft",) if self.recipe.graft.vae else ("vae", "graft")

    # ---- parts

    def causality(self) -> CausalityReport:
        if self.results.causality is None:
            report = check_causality(self.parts.sentence_lm, seed=self.recipe.seed)
            self.results.causality = report
            for check in report.checks:
                self.row(
                    "causality",
                    f"{check.name} ({check.attention})",
                    make_rows.causality(check),
                    self.trained_in,
                    about=self.parts.about(self.parts.sentence_lm),
                )
        return self.results.causality

    def quality(self) -> None:
        model = self.parts.sentence_lm
        causality = self.causality()
        documents = heldout_documents(self.parts.corpus, self.settings)
        counter = ByteCounter(self.parts.tokenizer)
        places = Places(self.by, documents, counter) if self.by else None
        bos = self.parts.bos_token_id
        # Longer passages than it was trained on would measure something else.
        context = self.settings.context_sentences or self.recipe.graft.max_sentences
        scores: list[QualityScore] = []

        def sentence_model(
            candidate: Any, system: str, advance: Callable[[], None], shortlist: ShortlistHead | None = None
        ) -> QualityScore:
            return score_sentence_model(
                candidate,
                documents,
                counter,
                causality=causality,
                context_sentences=context,
                system=system,
                places=places,
                shortlist=shortlist,
                progress=advance,
            )

        def token_model(candidate: Any, system: str, advance: Callable[[], None]) -> QualityScore:
            return score_token_model(
                candidate,
                documents,
                counter,
                bos,
                system=system,
                context_tokens=self.settings.context_tokens,
                places=places,
                progress=advance,
            )

        jobs: list[tuple[str, Callable[[], Any], Callable[..., QualityScore], tuple[str, ...]]] = [
            ("sentence model", lambda: model, sentence_model, self.trained_in),
            ("baseline, equal data", lambda: self.parts.baseline, token_model, ("baseline",)),
            ("backbone, as it came", lambda: self.parts.as_it_came, token_model, ()),
            ("sentence model, untrained", self.parts.untrained, sentence_model, ()),
        ]
        approximate = ""
        if model.shortlist is not None:
            head = make_shortlist_head(model, self.settings.shortlist_tokens)
            approximate = f"sentence model, shortlist of {head.tokens:,}"
            score_short = partial(sentence_model, shortlist=head)
            jobs.insert(1, (approximate, lambda: model, score_short, self.trained_in))
        for system, load, score, stages in jobs:
            with Bar(f"bench: quality: {system}", len(documents), enabled=not self.quiet) as bar:
                if (candidate := self.attempt("quality", system, load)) is None:
                    continue
                found = score(candidate, system, partial(bar.advance, 1))
            sentence = self.provenance.mean_sentence_tokens or 1.0
            middle = found.baseline_tokens / len(found.documents) / 2
            if system != approximate:  # the cost is computed for the full head
                found.cost = decoding_cost(candidate, middle, sentence)
            found.counts = model_counts(candidate, self.parts, stages, sentence)
            scores.append(found)
            note = _context_note(system, found)
            self.row("quality", system, make_rows.quality(found), stages, note, self.parts.about(candidate))
            candidate = None  # so that it need not lie beside the next one
        vocab_size = model.config.vae_config.vocab_size
        unigram = score_unigram(self.parts.corpus, documents, counter, vocab_size, bos, places)
        note = "frequencies of the training documents, add one"
        self.row("quality", "unigram", make_rows.quality(unigram), (), note)
        scores.append(unigram)
        same_bytes(scores)
        self.results.quality = scores

    def text(self) -> None:
        require_causal(self.causality())
        abouts: dict[str, tuple[str, str]] = {}
        report = measure_text(
            self.parts,
            self.judge,
            self.attempt,
            lambda system, model: abouts.update({system: self.parts.about(model)}),
            quiet=self.quiet,
        )
        self.results.text = report
        stages = {"sentence model": self.trained_in, BASELINE: ("baseline",)}
        for score in report.scores:
            figures, trained = make_rows.text(score, report), stages.get(score.system, ())
            self.row("text", score.system, figures, trained, about=abouts.get(score.system))

    def reconstruct(self) -> None:
        system, vae = self.parts.vae
        report = measure_reconstruction(
            vae,
            self.parts.tokenizer,
            heldout_sentences(self.parts.corpus, self.settings.max_sentences),
            system=system,
            extra_metrics=self.settings.extra_metrics,
        )
        self.results.reconstruction = report
        stages = ("vae",) if system == "SentenceVAE" else self.trained_in
        note = "" if stages == ("vae",) else "the graft trained it for prediction, not for reconstruction"
        self.row("reconstruct", system, make_rows.reconstruction(report), stages, note, self.parts.about(vae))

    @cached_property
    def _timed(self) -> SpeedModels:
        return speed_models(self.parts)

    def _lengths(self) -> list[int]:
        return draw_lengths(self.parts.corpus, DRAWN_LENGTHS, self.recipe.seed)

    def throughput(self) -> list[Throughput]:
        """What all processes write together; each must call it."""
        return measure_throughput(self._timed, self._lengths(), self.settings)

    def speed(self) -> None:
        timed = self._timed
        together = self.throughput() if processes().num_processes > 1 else []
        report = measure_speed(
            timed.model,
            timed.backbone,
            sentences=timed.sentences,
            sentence_lengths=self._lengths(),
            settings=self.settings,
            trained=timed.trained,
            bos_token_id=timed.bos_token_id,
        )
        report.throughput = together
        self.results.speed = report
        self.results.skipped += report.skipped
        why = "forced lengths drawn from held-out text" + ("" if timed.trained else "; untrained weights")
        why += f"; head {report.head}"
        why += "" if self.settings.cache == "full" else f"; cache {self.settings.cache}"
        why += "; compiled" if self.settings.compile else ""
        if report.quantized:
            why += f"; 8 bits: {', '.join(report.quantized)}"
        for run in report.runs:
            ours = run.system == "sentence model"
            note = "; ".join(filter(None, (why if ours else "", run.note)))
            self.row(
                "speed",
                run.system,
                make_rows.speed(run),
                self.trained_in if timed.trained and ours else (),
                note,
                self.parts.about(timed.model if ours else timed.backbone),
            )

    def memory(self) -> None:
        timed = self._timed
        self.results.memory = measure_memory(
            timed.model,
            timed.backbone,
            sentences=timed.sentences,
            sentence_lengths=self._lengths(),
            new_tokens=self.settings.new_tokens,
            bos_token_id=timed.bos_token_id,
            budget=self.settings.memory_budget_bytes,
            cache=self.settings.cache,
        )
        for report in self.results.memory:
            ours = report.system == "sentence model"
            stages = self.trained_in if timed.trained and ours else ()
            about = self.parts.about(timed.model if ours else timed.backbone)
            self.row("memory", report.system, make_rows.memory(report), stages, about=about)

    def data(self) -> None:
        tokenizer = self.parts.tokenizer
        self.results.data = measure_data(self.parts.corpus, self.recipe, tokenizer.pad_token_id)
        self.row("data", self.recipe.data.name, make_rows.data(self.results.data))

    def segments(self) -> None:
        for scored in score_segmenters(regex_presets()):
            self.row("segments", scored["segmenter"], make_rows.segments(scored))

    def samples(self) -> None:
        texts = [
            d.texts for d in heldout_documents(self.parts.corpus, self.settings)[: self.settings.samples]
        ]
        model, tokenizer = self.parts.sentence_lm, self.parts.tokenizer
        self.results.samples += write_samples(model, tokenizer, texts, self.recipe.seed)


def _context_note(system: str, score: QualityScore) -> str:
    untrained = "weights drawn from the seed; " if system.endswith("untrained") else ""
    return f"{untrained}left context: up to {score.context}"
