"""A pretrained LLM with sentence memories: quality against bytes of cache. No torch but in ``measure``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sentcompress.benchmark.breakdown import compare_buckets
from sentcompress.benchmark.drawing import BACKBONE_COLOR
from sentcompress.benchmark.measurement import BASELINES, Measurement, Section
from sentcompress.benchmark.measurements.quality import QualityScore
from sentcompress.benchmark.measurements.recall import Recall
from sentcompress.provenance import Record
from sentcompress.table import Figure, Table, number, percent

if TYPE_CHECKING:
    from sentcompress.benchmark.results import Results
    from sentcompress.benchmark.runner import Bench


class MemoryScore(Record):
    """One LLM with one memory on all held-out documents."""

    system: str
    quality: QualityScore
    text_tokens: float
    """Mean length of what was read at once."""
    device_bytes_per_token: float
    """Exact: bytes of the cache's tensors at the end of the texts, a memory's index included, over their tokens."""
    storage_bytes_per_token: float
    """The same, in slow storage."""
    attended_share: float
    """Share of a text's tokens that its last one attended to, a mean of blocks, heads and texts."""


class Memories(Measurement[list[MemoryScore]]):
    """Bits per byte of an LLM with sentence memories, and their bytes.

    LLM is an alias, hub name, folder or GGUF file of an LLM, which needs no training, or the folder of a run that
    trained one for a memory. The same bytes are scored with everything in the cache and with each of bench.memories,
    in effect from the first token.
    """

    title = "Sentence memories"
    order = 90
    distributed = True
    plain_llm = True
    compared = ("bits_per_byte", "device_bytes_per_token")
    options = ("device", "dtype", "max_documents", "max_bytes_per_document")
    examples = (
        "sentcompress bench memories smollm2-135m",
        "sentcompress bench memories smollm2-135m --dtype bf16 --set 'bench.memories=[window, window+recall]'",
    )

    def measure(self, bench: Bench) -> list[MemoryScore]:
        from sentcompress.benchmark.breakdown import Breakdown
        from sentcompress.benchmark.heldout_text import heldout_documents
        from sentcompress.benchmark.memory_scoring import memory_systems, score_memory
        from sentcompress.benchmark.scoring import require_same_bytes
        from sentcompress.text.lossless_tokenizer import lossless

        models = bench.models
        systems = bench.shared(memory_systems)
        documents = heldout_documents(models.corpus, bench.settings)
        tokenizer = lossless(models.tokenizer)
        breakdown = Breakdown(["bytes"], documents, tokenizer)
        scores: list[MemoryScore] = []
        for system in systems:
            with bench.bar(f"{self.name}: {system.name}", len(documents)) as bar:
                advance = partial(bar.advance, 1)
                found = score_memory(system, documents, tokenizer, models.bos_token_id, breakdown, advance)
            scores.append(found)
        for system, score in zip(systems, scores, strict=True):
            bench.row(self.name, system.name, _figures(score, scores), system.stages, model=system.model)
        require_same_bytes([score.quality for score in scores])
        return scores

    def sections(self, results: Results) -> list[Section]:
        scores = self.of(results)
        lines = [
            [
                row.system,
                number(row.figures["bits_per_byte"], 4),
                number(row.figures["ratio"], 4),
                number(row.figures["device_bytes_per_token"], 0),
                percent(row.figures["device_share"]),
                number(row.figures["storage_bytes_per_token"], 0),
                percent(row.figures["attended_share"]),
            ]
            for row in results.rows_of(self.name)
        ]
        columns = [
            "attends to",
            "bits/byte",
            "ratio",
            "device B/token",
            "of everything",
            "stored B/token",
            "attended",
        ]
        table = Table(self.title, columns, lines, _notes(scores))
        _, buckets = compare_buckets([score.quality for score in scores], "bytes")
        by_position = Table(
            "Sentence memories by bytes of the document before",
            ["bytes", "scored", *(score.system for score in scores)],
            [
                [row.label, number(row.bytes), *(number(row.bits.get(s.system), 4) for s in scores)]
                for row in buckets
            ],
        )
        recalls = {score.system: score.found.value for score in Recall.of(results)}
        return [
            Section(table, partial(_draw, scores, recalls) if scores else None, (7.6, 3.6)),
            Section(by_position),
        ]


def _reference(scores: Sequence[MemoryScore]) -> MemoryScore:
    """What the others are compared with: the equal-data baseline with everything, else the LLM as it came."""
    return next((score for score in scores if score.system == BASELINES[0]), scores[0])


def _figures(score: MemoryScore, scores: Sequence[MemoryScore]) -> dict[str, Figure]:
    return {
        **score.quality.figures(),
        "ratio": score.quality.bits_per_byte / _reference(scores).quality.bits_per_byte,
        "text_tokens": score.text_tokens,
        "device_bytes_per_token": score.device_bytes_per_token,
        "device_share": score.device_bytes_per_token / scores[0].device_bytes_per_token,
        "storage_bytes_per_token": score.storage_bytes_per_token,
        "attended_share": score.attended_share,
    }


def _notes(scores: Sequence[MemoryScore]) -> list[str]:
    if not scores:
        return []
    first = scores[0]
    return [
        f"The same {first.quality.bytes:,} bytes of {len(first.quality.documents)} held-out documents for all: each "
        "byte was scored exactly once. Bytes are those of the cache's tensors after texts of "
        f"{first.text_tokens:,.0f} tokens (mean), over these tokens; on the device, with a memory's index. "
        "Attended: share of a text's tokens that its last one looks at, a mean of blocks and heads. Ratio: "
        f"of bits per byte, to '{_reference(scores).system}'."
    ]


def _draw(scores: Sequence[MemoryScore], recalls: dict[str, float], figure: Any) -> None:
    """Bits per byte, and the share of needles found, against bytes on the device."""
    panels = [("Bits per byte (lower is better)", {s.system: s.quality.bits_per_byte for s in scores})]
    if recalls:
        panels.append(("Needles found (higher is better)", recalls))
    for axes, (title, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for order, score in enumerate(scores):
            if score.system not in values:
                continue
            color = f"C{order - 1}" if order else BACKBONE_COLOR
            size = score.device_bytes_per_token / 1024
            axes.plot(size, values[score.system], "o", color=color, label=score.system)
        axes.set_title(title)
        axes.set_xlabel("KiB on the device per token of text")
        axes.margins(0.1, 0.15)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8
    )
