"""How much of held-out sentences their latents keep. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sentcompress.benchmark.measurement import Measurement, Section
from sentcompress.benchmark.paper import vae_note
from sentcompress.provenance import Record
from sentcompress.table import Table, number, percent

if TYPE_CHECKING:
    from sentcompress.benchmark.results import Results
    from sentcompress.benchmark.runner import Bench


class ReconstructionReport(Record):
    """Free-running reconstruction of held-out sentences."""

    system: str
    sentences: int
    tokens: int
    token_accuracy: float
    exact_sentences: float
    teacher_forced_perplexity: float
    """The paper's number."""
    teacher_forced_exact: float
    """Sentences whose every token is the likeliest when the ones before it are given: flatters, for contrast."""
    extra: dict[str, float] = {}
    """Metric plugins, by ``name.figure``."""
    examples: list[tuple[str, str]] = []
    """Pairs of a sentence and what came back."""


class Reconstruct(Measurement[ReconstructionReport | None]):
    """Reconstruct held-out sentences from their latents, free-running."""

    title = "Reconstruction of held-out sentences"
    key = "reconstruction"
    order = 40
    compared = ("token_accuracy", "exact_sentences", "teacher_forced_perplexity")
    examples = ("sentcompress bench reconstruct out/quickstart/vae",)

    def measure(self, bench: Bench) -> ReconstructionReport:
        from sentcompress.benchmark.reconstruction import measure_reconstruction, spaced_sentences

        system, vae = bench.models.vae
        report = measure_reconstruction(
            vae,
            bench.models.tokenizer,
            spaced_sentences(bench.models.corpus, bench.settings.max_sentences),
            system=system,
            extra_metrics=bench.settings.extra_metrics,
        )
        figures = {
            "token_accuracy": report.token_accuracy,
            "exact_sentences": report.exact_sentences,
            "teacher_forced_perplexity": report.teacher_forced_perplexity,
            "teacher_forced_exact": report.teacher_forced_exact,
            "sentences": report.sentences,
            "tokens": report.tokens,
            **report.extra,
        }
        stages: tuple[str, ...] = ("vae",)
        note = ""
        if system != "SentenceVAE":
            stages = bench.graft_stages
            note = "the graft trained it for prediction, not for reconstruction"
        bench.row(self.name, system, figures, stages, note, vae)
        return report

    def sections(self, results: Results) -> list[Section]:
        lines = []
        for row in results.rows_of(self.name):
            figures = row.figures
            lines.append(
                [
                    row.system,
                    percent(figures["token_accuracy"]),
                    percent(figures["exact_sentences"]),
                    number(figures["teacher_forced_perplexity"]),
                    percent(figures["teacher_forced_exact"]),
                    number(figures["sentences"]),
                    row.note,
                ]
            )
        columns = ["system", "tokens right", "sentences exact", "forced perplexity", "forced exact"]
        notes = [
            "Tokens right by position and whole sentences right: greedy and free-running. The rest is teacher-forced."
        ]
        report = self.of(results)
        if report and report.extra:
            extra = (f"{name} {number(value, 4)}" for name, value in report.extra.items())
            notes.append("Metric plugins: " + ", ".join(extra))
        notes += vae_note(results.recipe)
        found = [Section(Table(self.title, [*columns, "sentences", "note"], lines, notes))]
        if report:
            pairs = [[repr(a)[1:-1], repr(b)[1:-1] if b != a else "the same"] for a, b in report.examples]
            table = Table("Reconstructed sentences", ["held-out sentence", "what came back"], pairs)
            found.append(Section(table, terminal=False))
        return found

    def tiles(self, results: Results) -> list[tuple[str, str]]:
        report = self.of(results)
        if report is None:
            return []
        return [(percent(report.exact_sentences), "held-out sentences reconstructed exactly")]
