"""Where the sentence model is faster and where it is not: batch size x length of the prompt x length of sentences."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel
from transformers import PreTrainedModel

from sentcompress.benchmark.measurements.speed import LOOKUP_TOKENS, quiet, require_positions
from sentcompress.benchmark.systems import (
    LOOKUP,
    System,
    TokenSystem,
    alternate,
    both_systems,
    make_prompts,
)
from sentcompress.errors import InputError
from sentcompress.files import storage_errors, write_atomically
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.recipe import BenchSettings
from sentcompress.table import Table

FILE = "speed-sweep.json"


class Cell(BaseModel):
    """One batch size, prompt and sentence length; whole runs, the reading of the prompt included."""

    batch_size: int
    prompt_tokens: int
    sentence_tokens: int
    ratio: float
    """Time of the backbone over ours: median over pairs measured side by side."""
    lowest: float
    highest: float
    tokens_per_second: float
    lookup_ratio: float | None = None
    """Time of the backbone over its own with prompt lookup, at batch 1."""


class SpeedSweep(BaseModel):
    """A grid of cells."""

    new_tokens: int
    repeats: int
    cells: list[Cell]


def sweep_speed(
    model: SentenceLM,
    backbone: PreTrainedModel,
    *,
    sentences: Sequence[Sequence[int]],
    settings: BenchSettings,
    bos_token_id: int,
    prompt_tokens: Sequence[int],
    sentence_tokens: Sequence[int],
) -> SpeedSweep:
    """Time both models at every point of the grid; batch sizes, new tokens and repeats are those of ``settings``.

    Raises:
        InputError: a prompt does not fit, or a sentence is longer than the model writes.
    """
    longest = model.config.vae_config.max_sentence_tokens
    if max(sentence_tokens) > longest:
        raise InputError(
            f"sentences of {max(sentence_tokens)} tokens are over the model's {longest}",
            fix=f"give lengths of at most {longest}",
        )
    for prompt in prompt_tokens:
        require_positions(backbone, prompt, settings.new_tokens)
    plain, ours = both_systems(model, backbone, sentence_tokens[:1], settings, bos_token_id)
    cells = []
    with quiet():
        for size in settings.batch_sizes:
            for prompt in prompt_tokens:
                prompts = make_prompts(sentences, prompt, size)
                systems: list[System] = [plain, *(ours.with_lengths([n]) for n in sentence_tokens)]
                if size == 1:
                    systems.append(
                        TokenSystem(LOOKUP, backbone, bos_token_id, prompt_lookup_num_tokens=LOOKUP_TOKENS)
                    )
                for system in systems[:2]:
                    system.write(prompts, settings.new_tokens)
                times = alternate(systems, prompts, settings.new_tokens, settings.repeats)
                lookup = statistics.median(t[0] / t[-1] for t in times) if size == 1 else None
                for column, length in enumerate(sentence_tokens, 1):
                    ratios = [t[0] / t[column] for t in times]
                    took = statistics.median(t[column] for t in times)
                    cells.append(
                        Cell(
                            batch_size=size,
                            prompt_tokens=prompt,
                            sentence_tokens=length,
                            ratio=statistics.median(ratios),
                            lowest=min(ratios),
                            highest=max(ratios),
                            tokens_per_second=size * settings.new_tokens / took,
                            lookup_ratio=lookup,
                        )
                    )
    return SpeedSweep(new_tokens=settings.new_tokens, repeats=settings.repeats, cells=cells)


def table(sweep: SpeedSweep) -> Table:
    """Ratios, a row a batch size and prompt, a column a sentence length; what to choose where."""
    lengths = sorted({c.sentence_tokens for c in sweep.cells})
    found = {(c.batch_size, c.prompt_tokens, c.sentence_tokens): c for c in sweep.cells}
    rows = [
        [str(size), str(prompt), *(f"{found[size, prompt, n].ratio:.2f}x" for n in lengths)]
        for size, prompt in dict.fromkeys((c.batch_size, c.prompt_tokens) for c in sweep.cells)
    ]
    notes = [
        "Time of the backbone's own generate over the sentence model's: whole runs with "
        f"{sweep.new_tokens} new tokens, median of {sweep.repeats} alternating runs; a column a sentence length.",
        *advice(sweep),
    ]
    columns = ["batch", "prompt tokens", *(f"{n} a sentence" for n in lengths)]
    return Table("Speed beside the backbone", columns, rows, notes)


def advice(sweep: SpeedSweep) -> list[str]:
    """Where the break-even is, and what to choose on the other side of it."""
    losing = [c for c in sweep.cells if c.ratio < 1]
    places = "; ".join(
        f"batch {c.batch_size}, prompt {c.prompt_tokens}, sentences of {c.sentence_tokens}: {c.ratio:.2f}x"
        for c in losing
    )
    lines = [f"Slower at {places}." if losing else "Break-even: none in this grid, it is faster everywhere."]
    if losing:
        lines.append(
            "There, take the backbone with 8-bit weights (they help most at small batches) or speculative decoding, "
            "which keep its output."
            if min(c.batch_size for c in losing) < 8
            else "There, take the backbone itself: at large batches arithmetic is the limit, not reading."
        )
    better = [c for c in sweep.cells if c.lookup_ratio is not None and c.lookup_ratio > c.ratio]
    if better:
        worst = max(better, key=lambda c: (c.lookup_ratio or 0) / c.ratio)
        lines.append(
            f"Prompt lookup is faster at batch 1, prompt {worst.prompt_tokens}, sentences of {worst.sentence_tokens}: "
            f"{worst.lookup_ratio:.2f}x against {worst.ratio:.2f}x, and keeps the backbone's output."
        )
    return lines


def write(sweep: SpeedSweep, folder: Path) -> Path:
    """Keep the figures; return the file."""
    path = folder / FILE
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, sweep.model_dump_json(indent=1) + "\n")
    return path
