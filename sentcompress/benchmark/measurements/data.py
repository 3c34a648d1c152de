"""The corpus as the models see it: sentence lengths, padding, the tokens that cutting costs. No torch."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from sentcompress.benchmark.drawing import BASELINE_COLOR, SENTENCE_COLOR
from sentcompress.benchmark.measurement import Measurement, Section
from sentcompress.provenance import Record
from sentcompress.table import Figure, Table, number, percent

if TYPE_CHECKING:
    from sentcompress.benchmark.results import Results
    from sentcompress.benchmark.runner import Bench
    from sentcompress.recipe import Recipe
    from sentcompress.text.corpus import Corpus

BATCHES = 20
"""Batches looked at for the share of padding."""


class DataReport(Record):
    """The corpus the recipe names."""

    summary: dict[str, Any]
    heldout_documents: int
    mean_sentence_tokens: float
    """Of the held-out documents."""
    histogram: list[tuple[int, int]]
    """Tokens of a held-out sentence, and how many there are."""
    padding: dict[str, float]
    """Share of padding a sampler's batches have."""
    cutting_overhead: float
    """Tokens of the sentences over tokens of the uncut text, less 1, on the held-out documents."""


class Data(Measurement[DataReport | None]):
    """Sentence lengths, padding in batches, extra tokens from splitting."""

    title = "Data"
    order = 70
    one_line = True
    compared = ("heldout_mean_sentence_tokens", "cutting_overhead")
    examples = ("sentcompress bench data out/quickstart",)

    def measure(self, bench: Bench) -> DataReport:
        models = bench.models
        report = measure_data(models.corpus, bench.recipe, models.tokenizer.pad_token_id)
        figures: dict[str, Figure] = {
            name: value for name, value in report.summary.items() if isinstance(value, int | float)
        }
        figures |= {
            "heldout_mean_sentence_tokens": report.mean_sentence_tokens,
            "cutting_overhead": report.cutting_overhead,
        }
        figures |= {f"padding: {name}": share for name, share in report.padding.items()}
        bench.row(self.name, bench.recipe.data.name, figures)
        return report

    def sections(self, results: Results) -> list[Section]:
        lines = []
        for row in results.rows_of(self.name):
            for name, value in row.figures.items():
                share = name.startswith("padding") or name == "cutting_overhead"
                lines.append([name.replace("_", " "), percent(value) if share else number(value)])
        table = Table(self.title, ["figure", "value"], lines)
        report = self.of(results)
        if report is None:
            return [Section(table)]
        return [Section(table, lambda figure: _draw(report, figure), (7.6, 2.7))]


def measure_data(corpus: Corpus, recipe: Recipe, pad_token_id: int) -> DataReport:
    """Summarize a recipe's corpus."""
    from sentcompress.benchmark.heldout_text import heldout_lengths
    from sentcompress.text.sampling import PassageSampler, SentenceSampler

    lengths = heldout_lengths(corpus)
    texts = [corpus.document_text(number) for number in corpus.heldout.tolist()]
    uncut = sum(map(len, map(corpus.tokenizer.encode, texts)))
    sentences = SentenceSampler(
        corpus, corpus.train, recipe.train_vae.sentences_per_batch, recipe.seed, pad_token_id
    )
    passages = PassageSampler(
        corpus,
        corpus.train,
        recipe.graft.passages_per_batch,
        recipe.graft.max_sentences,
        recipe.graft.overlap_sentences,
        recipe.seed,
        pad_token_id,
        start=recipe.graft.start_latent,
    )
    return DataReport(
        summary=corpus.summary(),
        heldout_documents=len(corpus.heldout),
        mean_sentence_tokens=float(lengths.mean()),
        histogram=sorted(Counter(lengths.tolist()).items()),
        padding={  # keys of results.json: they stay as they are
            "SentenceVAE batch": _padding(sentences, "attention_mask"),
            "graft batch as a rectangle (only real tokens are computed)": _padding(
                passages, "attention_mask"
            ),
            "rows of sentences the backbone reads": _padding(passages, "passage_ids"),
        },
        cutting_overhead=float(lengths.sum()) / uncut - 1,
    )


def _padding(sampler: Any, field: str) -> float:
    """Share of positions that hold nothing, over the first batches."""
    total = real = 0
    for index in range(min(BATCHES, sampler.batches_per_epoch)):
        values = sampler.batch(index)[field]
        total += values.numel()
        real += int((values > 0).sum() if field == "attention_mask" else (values >= 0).sum())
    return 1 - real / total


def _draw(report: DataReport, figure: Any) -> None:
    """Histogram of sentence lengths."""
    axes = figure.subplots()
    lengths, counts = zip(*report.histogram, strict=True)
    axes.bar(lengths, counts, width=0.85, color=SENTENCE_COLOR)
    mean = report.mean_sentence_tokens
    axes.axvline(mean, color=BASELINE_COLOR, linewidth=1.4)
    position = {"xytext": (5, -4), "textcoords": "offset points"}
    axes.annotate(f"mean {mean:.1f}", (mean, max(counts)), color=BASELINE_COLOR, **position)
    axes.set_title("Tokens of a held-out sentence")
    axes.set_xlabel("tokens")
    axes.set_ylabel("sentences")
    axes.grid(axis="x", visible=False)
