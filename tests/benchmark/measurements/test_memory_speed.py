"""Speed with sentence memories: every system writes the same number of tokens, and bytes are those of the tensors."""

from __future__ import annotations

import pytest

from sentcompress.benchmark.measurements.memory_speed import MemoryRun, MemorySpeed
from sentcompress.benchmark.memory_runs import CachedSystem
from sentcompress.benchmark.memory_scoring import EVERYTHING, MemorySystem
from sentcompress.benchmark.runner import run_bench
from sentcompress.benchmark.timing import Prompt
from sentcompress.recipe import ComponentSpec, build_recipe

BYTES = 2 * 2 * 2 * 8 * 4
"""Of keys and values of a token in the tiny Llama: blocks, heads, width, fp32."""
WINDOW = "window (recent_sentences 1)"


@pytest.fixture(scope="module")
def runs(llm_folder, text_files, tmp_path_factory) -> list[MemoryRun]:
    bench = {
        "metrics": ["memory_speed"],
        "memories": [{"name": "window", "options": {"recent_sentences": 1}}, "window+recall"],
        "text_lengths": [150],
        "batch_sizes": [1, 2],
        "new_tokens": 8,
        "repeats": 2,
        "largest_batch": True,
        "memory_budget_bytes": 4 * 160 * BYTES,
    }
    data = {"name": "text", "options": {"paths": [str(text_files)], "heldout_documents": 4}}
    raw = {"name": "plain", "backbone": {"model": str(llm_folder)}, "data": data, "bench": bench}
    results = run_bench(
        None, None, build_recipe(raw, [], "tests"), tmp_path_factory.mktemp("out"), quiet=True
    )
    assert {entry.what.partition(", batch")[0] for entry in results.skipped} <= {
        f"{EVERYTHING}, quantized cache"
    }
    return MemorySpeed.of(results)


def test_every_system_is_timed_at_every_batch_size(runs):
    alone = [run.system for run in runs if run.batch_size == 1 and not run.note]
    for name in (
        EVERYTHING,
        f"{EVERYTHING}, static cache",
        f"{EVERYTHING}, prompt lookup",
        WINDOW,
        "window+recall",
    ):
        assert name in alone
    assert all(run.ratio == 1 for run in runs if run.system == EVERYTHING)
    assert all(run.output_tokens_per_second > 0 for run in runs)


def test_bytes_are_exact_and_the_largest_batch_follows_from_them(runs):
    everything, window = (next(run for run in runs if run.system == name) for name in (EVERYTHING, WINDOW))
    assert everything.device_bytes_per_token == BYTES
    assert everything.largest_batch == 4 * 160 // 157
    assert window.device_bytes_per_token < BYTES / 2
    assert window.largest_batch >= 8
    largest = {run.system: run for run in runs if run.note}
    assert largest[EVERYTHING].batch_size == everything.largest_batch
    assert largest[WINDOW].batch_size == window.largest_batch
    assert f"{EVERYTHING}, static cache" in largest


def test_shares_are_those_of_a_memory(runs):
    for run in runs:
        if run.note or run.system.startswith(EVERYTHING):
            assert run.boundaries_share is None
        else:
            assert 0 < run.boundaries_share + run.recall_share < 1


def test_a_window_of_everything_writes_what_the_llm_writes(llm, tokenizer):
    prompts = [Prompt([list(range(5, 40))])]
    wide = MemorySystem(
        "all", llm, tokenizer, ComponentSpec(name="window", options={"recent_sentences": 999})
    )
    caches = [
        CachedSystem(system, 2).run(prompts, 6).cache
        for system in (MemorySystem(EVERYTHING, llm, tokenizer), wide)
    ]
    assert [cache.get_seq_length() for cache in caches] == [41, 41]
