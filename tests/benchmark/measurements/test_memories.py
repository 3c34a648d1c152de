"""Sentence memories of a plain LLM: the same bytes for all, a uniform model at log2(V) a token, exact sizes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import LlamaForCausalLM

from sentcompress.benchmark.breakdown import Breakdown
from sentcompress.benchmark.heldout_text import heldout_documents
from sentcompress.benchmark.measurements.memories import Memories
from sentcompress.benchmark.measurements.recall import NeedleAnswer, Recall, score_answers
from sentcompress.benchmark.memory_scoring import EVERYTHING, MemorySystem, label, read, score_memory
from sentcompress.benchmark.models import ModelFolder, Models, is_llm
from sentcompress.benchmark.results import read_results
from sentcompress.benchmark.runner import run_bench
from sentcompress.benchmark.scoring import score_token_model
from sentcompress.cli import main
from sentcompress.errors import SentCompressError
from sentcompress.recipe import ComponentSpec, build_recipe
from sentcompress.sentence_memory.sentence_cache import SentenceMemory
from sentcompress.text.lossless_tokenizer import lossless

MEMORIES = [
    {"name": "window", "options": {"recent_sentences": 1}},
    {"name": "window+recall", "options": {"recent_sentences": 2, "recall": 1}},
]
NAMES = [EVERYTHING, "window (recent_sentences 1)", "window+recall (recent_sentences 2, recall 1)"]


@pytest.fixture(scope="module")
def recipe(llm_folder, text_files):
    bench = {
        "metrics": ["memories", "recall"],
        "max_documents": 4,
        "memories": MEMORIES,
        "text_lengths": [500],
        "recall_tasks": 1,
    }
    data = {"name": "text", "options": {"paths": [str(text_files)], "heldout_documents": 4}}
    raw = {"name": "plain", "backbone": {"model": str(llm_folder)}, "data": data, "bench": bench}
    return build_recipe(raw, [], "tests")


@pytest.fixture(scope="module")
def measured(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return run_bench(None, None, recipe, out, quiet=True), out


@pytest.fixture(scope="module")
def documents(recipe):
    return heldout_documents(Models(recipe, None).corpus, recipe.bench)


def test_everything_and_each_memory_are_measured(measured):
    results, out = measured
    scores = Memories.of(results)
    assert [score.system for score in scores] == [score.system for score in Recall.of(results)] == NAMES
    assert not results.skipped
    assert read_results(out) == results
    assert len({score.quality.bytes for score in scores}) == 1
    everything, window, recall = scores
    assert (
        window.storage_bytes_per_token
        == everything.storage_bytes_per_token
        == 0
        < recall.storage_bytes_per_token
    )
    assert window.device_bytes_per_token < everything.device_bytes_per_token
    assert window.attended_share < recall.attended_share < everything.attended_share == 1
    assert "Sentence memories" in (out / "report.html").read_text(encoding="utf-8")
    assert [len(score.answers) for score in Recall.of(results)] == [8, 8, 8]


def test_prompts_read_in_full_are_scored_as_the_memory_has_them(llm, tokenizer, documents):
    ids = torch.tensor(tokenizer.encode("".join(documents[0].texts))[:300])
    spec = ComponentSpec(name="window", options={"recent_sentences": 1})
    full = ComponentSpec(name="window", options={**spec.options, "full_prompts": True})
    losses = [
        read(MemorySystem("", llm, tokenizer, memory), ids)[0]
        for memory in (spec, full, ComponentSpec(name="window", options={"recent_sentences": 999}))
    ]
    assert torch.equal(losses[0], losses[1])
    assert not torch.allclose(losses[0], losses[2])


def test_a_uniform_model_pays_log2_v_a_token(llm, tokenizer, documents):
    uniform = LlamaForCausalLM(llm.config).eval()
    SentenceMemory(uniform, tokenizer)  # proven to attend through it while it still can
    torch.nn.init.zeros_(uniform.lm_head.weight)
    exact = lossless(tokenizer)
    breakdown = Breakdown(["bytes"], documents, exact)
    for memory in (None, ComponentSpec(name="window+recall")):
        system = MemorySystem("uniform", uniform, tokenizer, memory)
        quality = score_memory(system, documents, exact, 2, breakdown).quality
        tokens = quality.baseline_tokens
        assert quality.bits_per_byte == pytest.approx(tokens * math.log2(len(tokenizer)) / quality.bytes)
        assert sum(bucket.nats for bucket in quality.by["bytes"]) == pytest.approx(quality.nats)


def test_everything_scores_as_the_llm_alone(llm, tokenizer, documents):
    exact = lossless(tokenizer)
    alone = score_token_model(llm, documents, exact, 2, system="alone")
    breakdown = Breakdown(["bytes"], documents, exact)
    all_recent = ComponentSpec(name="window", options={"recent_sentences": 10_000})
    for memory in (None, all_recent):
        found = score_memory(MemorySystem("all", llm, tokenizer, memory), documents, exact, 2, breakdown)
        assert found.quality.nats == pytest.approx(alone.nats, rel=1e-5)
        blocks, heads, size = 2, 2, 8
        assert found.device_bytes_per_token >= 2 * blocks * heads * size * 4


def test_bytes_are_those_after_the_last_token(llm, tokenizer):
    nll, sizes = read(MemorySystem("all", llm, tokenizer), torch.arange(3, 43))
    assert nll.shape == (39,)
    assert (sizes.tokens, sizes.device, sizes.storage) == (40, 40 * 2 * 2 * 2 * 8 * 4, 0)


def test_what_full_attention_misses_is_no_fault_of_a_memory():
    def answers(*found):
        return [NeedleAnswer(kind="fact", length=500, depth=0.5, found=right) for right in found]

    score = score_answers("x", answers(True, True, False, False), answers(True, False, True, False), 0)
    assert (score.found.value, score.of_full.value) == (0.5, 0.5)
    assert 0 <= score.found.low <= 0.5 <= score.found.high <= 1
    assert score_answers("x", answers(False), answers(False), 0).of_full is None


def test_a_run_without_a_trained_memory_is_skipped(run_folder, tmp_path):
    results = run_bench(["memories", "recall"], run_folder, out=tmp_path, quiet=True)
    assert [entry.part for entry in results.skipped] == ["memories", "recall"]
    assert all("memory" in entry.reason for entry in results.skipped)


def test_a_run_that_trained_one_has_its_baseline_beside_it(recipe, llm, tokenizer, tmp_path):
    memory = {
        "memory": "window",
        "options": {"recent_sentences": 1, "sinks": 4},
        "segmenter": {"name": "regex", "options": {}, "state": {}},
        "max_sentence_tokens": 64,
        "recall_blocks": [],
    }
    for stage in ("memory", "baseline"):
        llm.save_pretrained(tmp_path / stage)
        tokenizer.save_pretrained(tmp_path / stage)
        (tmp_path / stage / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
        (tmp_path / stage / "run.json").write_text(
            json.dumps({"stage": stage, "tokens": 7}), encoding="utf-8"
        )
    (tmp_path / "memory" / "memory.json").write_text(json.dumps(memory), encoding="utf-8")
    for path in (tmp_path, tmp_path / "memory"):
        assert not is_llm(str(path))
    assert ModelFolder(tmp_path / "memory").stage("memory") == tmp_path / "memory"
    results = run_bench(["memories"], tmp_path, quiet=True)
    names = [score.system for score in Memories.of(results)]
    trained = "trained for its memory"
    assert names == [*NAMES, "baseline, equal data", trained, *(f"{trained}, {name}" for name in NAMES[1:])]
    rows = {row.system: row for row in results.rows}
    assert rows[trained].honesty.training_tokens == 7
    assert rows[EVERYTHING].honesty.training_tokens == 0
    assert rows["baseline, equal data"].figures["ratio"] == 1


def test_the_command_takes_an_llm_by_name(llm_folder, text_files, tmp_path, capsys):
    line = ["bench", "memories", str(llm_folder), "--data", str(text_files), "--out", str(tmp_path)]
    line += ["--max-bytes-per-document", "600", "--set", "bench.memories=[window]"]
    with pytest.raises(SystemExit) as exit_:
        main([*line, "--set", "data.options.heldout_documents=4"])
    assert not exit_.value.code
    assert "everything" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("bench.memories=[windo]", "windo"),
        ("bench.memories=[{name: window, options: {recnt: 1}}]", "recnt"),
        ("bench.text_lengths=[5000]", "text_lengths"),
    ],
)
def test_bad_settings_are_refused(recipe, tmp_path, change, message):
    changed = build_recipe(recipe.model_dump(mode="json"), [change], "tests")
    with pytest.raises(SentCompressError, match=message):
        run_bench(["recall"], None, changed, tmp_path, quiet=True)


def test_labels_say_the_options():
    assert label(ComponentSpec(name="window")) == "window"
    assert label(ComponentSpec(name="window+recall", options={"recall": 8})) == "window+recall (recall 8)"
