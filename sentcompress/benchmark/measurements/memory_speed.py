"""Speed of an LLM with sentence memories, by length of the text. No torch but in ``measure``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from sentcompress.benchmark.measurement import Measurement, Section
from sentcompress.provenance import Record
from sentcompress.table import Figure, Table, byte_size, number, percent

if TYPE_CHECKING:
    from sentcompress.benchmark.results import Results
    from sentcompress.benchmark.runner import Bench


class MemoryRun(Record):
    """An LLM with one cache, after texts of one length, at one batch size; medians over the repeats."""

    system: str
    text_tokens: int
    """Of each prompt, a start token included."""
    batch_size: int
    first_token_seconds: float | None
    """Reading the text and writing one token; None where the text was read before."""
    prefill_tokens_per_second: float | None
    output_tokens_per_second: float
    """After the first token, of all texts together."""
    ratio: float
    """Of output speed to that with everything in the ordinary cache, run by run."""
    first_ratio: float | None
    """The same for the time to the first token; above 1 is faster."""
    device_bytes_per_token: float | None
    """Exact, at the end, an index included; None for caches whose tensors cannot be counted."""
    storage_bytes_per_token: float
    largest_batch: int | None
    """Texts of this length whose caches fit into ``bench.memory_budget_bytes``, by these bytes."""
    boundaries_share: float | None
    """Share of the time after the first token that finding sentences took; None without a memory."""
    recall_share: float | None
    """The same for looking up, fetching and storing sentences."""
    note: str = ""


class MemorySpeed(Measurement[list[MemoryRun]]):
    """Speed of an LLM with sentence memories beside transformers' caches.

    At each of bench.text_lengths and bench.batch_sizes: time to the first token, output tokens per second, bytes of
    cache, and what finding sentences and recalling them cost. Beside them stand generate with its dynamic, static and
    quantized cache, and prompt lookup. LLM is an alias, hub name, folder or GGUF file of an LLM, or the folder of a run
    that trained one for a memory.
    """

    title = "Speed with sentence memories"
    order = 92
    plain_llm = True
    compared = ("output_tokens_per_second", "ratio", "largest_batch")
    options = ("device", "dtype", "text_lengths", "batch_sizes", "new_tokens", "repeats")
    examples = (
        "sentcompress bench memory-speed smollm2-135m --dtype bf16 --text-lengths 1000,4000 --batch-sizes 1",
        "sentcompress bench memory-speed smollm2-135m --set bench.largest_batch=true --set bench.repeats=3",
    )

    def measure(self, bench: Bench) -> list[MemoryRun]:
        from sentcompress.benchmark.heldout_text import heldout_sentences
        from sentcompress.benchmark.memory_runs import time_memories
        from sentcompress.benchmark.memory_scoring import memory_systems, require_room
        from sentcompress.benchmark.timing import HELDOUT_SENTENCES, quiet_transformers

        models, settings = bench.models, bench.settings
        systems = bench.shared(memory_systems)
        require_room(systems[0].model, settings.text_lengths, settings.new_tokens)
        stages = {system.name: system.stages for system in systems}
        sentences = heldout_sentences(models.corpus, HELDOUT_SENTENCES)
        repeats = len(settings.text_lengths) * len(settings.batch_sizes) * settings.repeats
        runs: list[MemoryRun] = []
        with quiet_transformers(), bench.bar(self.name, repeats) as bar:
            skip, advance = partial(bench.skip, self.name), partial(bar.advance, 1)
            for run in time_memories(systems, sentences, models.bos_token_id, settings, skip, advance):
                runs.append(run)
                figures: dict[str, Figure] = run.model_dump(exclude={"system", "note"})
                trained = stages.get(run.system, ())
                bench.row(self.name, run.system, figures, trained, run.note, model=systems[0].model)
        return runs

    def sections(self, results: Results) -> list[Section]:
        runs = self.of(results)
        lines = [
            [
                run.system,
                number(run.text_tokens),
                number(run.batch_size),
                number(run.first_token_seconds, 2),
                number(run.output_tokens_per_second, 1),
                number(run.ratio, 2),
                number(run.device_bytes_per_token, 0),
                number(run.storage_bytes_per_token, 0),
                number(run.largest_batch),
                percent(run.boundaries_share),
                percent(run.recall_share),
                run.note,
            ]
            for run in runs
        ]
        columns = ["attends to", "text", "batch", "first token s", "output tok/s", "ratio", "device B/token"]
        columns += ["stored B/token", "fits", "boundaries", "recall", "note"]
        budget = results.recipe.get("bench", {}).get("memory_budget_bytes")
        notes = [
            "Medians; systems take turns. Ratio: output speed over that with everything in the ordinary cache, run by "
            f"run. Fits: texts of this length whose caches fit into {byte_size(budget)}. Boundaries and recall: shares "
            "of the time after the first token."
        ]
        return [Section(Table(self.title, columns, lines, notes))]
