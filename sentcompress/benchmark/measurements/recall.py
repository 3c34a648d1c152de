"""Exact retrieval from a sentence memory: needles planted in held-out text. No torch but in ``measure``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sentcompress.benchmark.measurement import Measurement, Section
from sentcompress.benchmark.measurements.text import BootstrapInterval
from sentcompress.provenance import Record
from sentcompress.table import Figure, Table

if TYPE_CHECKING:
    from sentcompress.benchmark.results import Results
    from sentcompress.benchmark.runner import Bench


class NeedleAnswer(Record):
    """Whether one needle's answer was written exactly."""

    kind: str
    length: int
    """Tokens of the text."""
    depth: float
    """Share of the text before the needle."""
    found: bool


class RecallScore(Record):
    """What an LLM with one memory finds."""

    system: str
    answers: list[NeedleAnswer]
    found: BootstrapInterval
    """Share of needles whose answers are right."""
    of_full: BootstrapInterval | None
    """Of the needles that the same LLM finds with everything in its cache, the share that it finds with this memory;
    None where there are none."""


class Recall(Measurement[list[RecallScore]]):
    """Share of planted facts that an LLM with a sentence memory finds.

    Facts, numbers, quotations, key-value pairs and several numbers at once are planted in held-out text of
    bench.text_lengths tokens, at depths from its beginning to its end, and asked for behind it. LLM is an alias, hub
    name, folder or GGUF file of an LLM, or the folder of a run that trained one for a memory.
    """

    title = "Exact recall"
    order = 91
    plain_llm = True
    compared = ("found", "of_full")
    options = ("device", "dtype", "text_lengths", "recall_tasks")
    examples = ("sentcompress bench recall smollm2-135m --text-lengths 1000 --recall-tasks 4 --dtype bf16",)

    def measure(self, bench: Bench) -> list[RecallScore]:
        from sentcompress.benchmark.memory_scoring import memory_systems, require_room
        from sentcompress.benchmark.needles import answered, encode_task, heldout_texts, make_tasks
        from sentcompress.text.lossless_tokenizer import lossless

        models, settings = bench.models, bench.settings
        systems = bench.shared(memory_systems)
        require_room(systems[0].model, settings.text_lengths)
        tokenizer = lossless(models.tokenizer)
        tasks = make_tasks(
            heldout_texts(models.corpus),
            tokenizer,
            lengths=settings.text_lengths,
            tasks=settings.recall_tasks,
            seed=bench.recipe.seed,
        )
        scores: list[RecallScore] = []
        for system in systems:
            answers: list[NeedleAnswer] = []
            with bench.bar(f"{self.name}: {system.name}", len(tasks)) as bar:
                for task in tasks:
                    encoded = encode_task(task, tokenizer, models.bos_token_id)
                    right = answered(system.model, encoded, system.scoring_cache())
                    answers += [
                        NeedleAnswer(kind=task.kind, length=task.length, depth=needle.depth, found=found)
                        for needle, found in zip(task.needles, right, strict=True)
                    ]
                    bar.advance(1)
            score = score_answers(
                system.name, answers, scores[0].answers if scores else answers, bench.recipe.seed
            )
            scores.append(score)
            bench.row(self.name, system.name, _figures(score), system.stages, model=system.model)
        return scores

    def sections(self, results: Results) -> list[Section]:
        scores = self.of(results)
        lengths = sorted({answer.length for score in scores for answer in score.answers})
        kinds = list(dict.fromkeys(answer.kind for score in scores for answer in score.answers))
        depths = [(0.0, 0.34, "first third"), (0.34, 0.67, "middle"), (0.67, 1.01, "last third")]
        groups: list[tuple[str, Callable[[NeedleAnswer], bool]]] = [
            *((f"{length:,} tokens", lambda a, length=length: a.length == length) for length in lengths),
            *((kind, lambda a, kind=kind: a.kind == kind) for kind in kinds),
            *((name, lambda a, low=low, high=high: low <= a.depth < high) for low, high, name in depths),
        ]
        lines = [
            [
                score.system,
                _with_interval(score.found),
                _with_interval(score.of_full),
                *(_share([a for a in score.answers if chosen(a)]) for _, chosen in groups),
            ]
            for score in scores
        ]
        columns = ["attends to", "found %", "of everything's", *(name for name, _ in groups)]
        return [Section(Table(self.title, columns, lines, _notes(scores)))]


def score_answers(
    system: str, answers: Sequence[NeedleAnswer], full: Sequence[NeedleAnswer], seed: int
) -> RecallScore:
    """Shares of the answers that are right, with their intervals.

    Args:
        full: the same needles with everything in the cache.
        seed: of the bootstrap.
    """
    from sentcompress.benchmark.text_measures import interval

    def share(found: Sequence[bool]) -> BootstrapInterval | None:
        values = np.array(found, dtype=np.float64)
        return interval(values, float(values.mean()), seed) if len(values) else None

    found = share([answer.found for answer in answers])
    assert found is not None
    of_full = share([mine.found for mine, theirs in zip(answers, full, strict=True) if theirs.found])
    return RecallScore(system=system, answers=list(answers), found=found, of_full=of_full)


def _figures(score: RecallScore) -> dict[str, Figure]:
    figures: dict[str, Figure] = {"needles": len(score.answers)}
    for name, value in (("found", score.found), ("of_full", score.of_full)):
        if value is not None:
            figures |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
    for length in sorted({answer.length for answer in score.answers}):
        right = [answer.found for answer in score.answers if answer.length == length]
        figures[f"found_{length}"] = sum(right) / len(right)
    return figures


def _with_interval(share: BootstrapInterval | None) -> str:
    if share is None or share.low is None or share.high is None:
        return "-"
    return f"{100 * share.value:.0f} [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def _share(answers: Sequence[NeedleAnswer]) -> str:
    return f"{sum(answer.found for answer in answers)} of {len(answers)}" if answers else "-"


def _notes(scores: Sequence[RecallScore]) -> list[str]:
    if not scores:
        return []
    return [
        f"{len(scores[0].answers)} needles, the same for all. An answer counts if greedy decoding writes exactly its "
        "tokens. In brackets: 95% bootstrap interval over needles. Of everything's: of the needles that the same LLM "
        "finds with everything in its cache, the share that it finds with this memory."
    ]
