"""Quality by position, length and index: buckets add up to the whole, and a byte counts where it lies."""

from __future__ import annotations

import contextlib
import io
import json
import math

import numpy as np
import pytest
import torch

from sentcompress.benchmark import scoring, sentence_scoring
from sentcompress.benchmark.breakdown import (
    BY,
    BY_TITLES,
    STARTS,
    Breakdown,
    TokenScores,
    chosen,
    compare_buckets,
    labels,
    nats_per_byte,
)
from sentcompress.benchmark.drawing import svg
from sentcompress.benchmark.heldout_text import HeldoutDocument, heldout_documents
from sentcompress.benchmark.measurements.causality import CausalityCheck, CausalityReport
from sentcompress.benchmark.measurements.quality import Quality
from sentcompress.benchmark.report import sections, tables
from sentcompress.benchmark.results import Results, parse_results, read_results
from sentcompress.benchmark.runner import run_bench
from sentcompress.benchmark.scoring import score_sentence_model, score_token_model
from sentcompress.cli import main
from sentcompress.errors import CoverageError, InputError
from sentcompress.recipe import BenchSettings
from sentcompress.testing import tiny_opt, tiny_sentence_lm
from sentcompress.text.lossless_tokenizer import lossless

CAUSAL = CausalityReport(
    checks=[CausalityCheck(name="x", kind="future", attention="sdpa", max_delta=0, tolerance=0, passed=True)]
)


@pytest.fixture(scope="module")
def counter(tokenizer):
    return lossless(tokenizer)


@pytest.fixture(scope="module")
def documents(bench_models):
    return heldout_documents(bench_models.corpus, BenchSettings(max_bytes_per_document=1500))


@pytest.fixture(scope="module")
def breakdown(documents, counter):
    return Breakdown(BY, documents, counter)


def document(texts, counter, **changes):
    sentences = [counter.encode(text) for text in texts]
    return HeldoutDocument(
        **{"number": 0, "source": "x", "sentences": sentences, "texts": texts, "whole": True} | changes
    )


def assert_whole(score):
    assert set(score.by) == set(BY)
    for buckets in score.by.values():
        assert sum(bucket.bytes for bucket in buckets) == score.bytes
        assert math.fsum(bucket.nats for bucket in buckets) == pytest.approx(score.nats, rel=1e-12)


# ---- models whose answer is known


def test_a_uniform_sentence_model_pays_log2_v_a_token_in_every_bucket(documents, counter, breakdown):
    model = tiny_sentence_lm(len(counter.backend.get_vocab()))
    torch.nn.init.zeros_(model.vae.lm_head.weight)
    # Windows of 6 sentences: every document is put together from several.
    found = score_sentence_model(
        model, documents, counter, causality=CAUSAL, context_sentences=6, breakdown=breakdown
    )
    assert_whole(found)
    plain = score_sentence_model(model, documents, counter, causality=CAUSAL, context_sentences=6)
    assert plain.by == {}
    assert plain.model_copy(update={"by": found.by}) == found
    log_v = math.log(model.config.vae_config.vocab_size)
    sentences = [ids for d in documents for ids in d.sentences[1:]]
    keys = {
        "position": [p for ids in sentences for p in range(len(ids))],
        "length": [len(ids) for ids in sentences for _ in ids],
        "index": [i for d in documents for i, ids in enumerate(d.sentences) for _ in ids if i],
    }
    (inside,) = [buckets for by, buckets in found.by.items() if by == "bytes"]
    assert [bucket.label for bucket in inside if bucket.bytes] == ["0-999", "1000-1999"]
    for by, values in keys.items():
        tokens = np.bincount(np.searchsorted(STARTS[by], values, side="right") - 1)
        expected = {labels(by)[n]: count * log_v for n, count in enumerate(tokens) if count}
        got = {bucket.label: bucket.nats for bucket in found.by[by] if bucket.bytes}
        assert got == pytest.approx(expected, rel=1e-6)
        marks = {bucket.label: bucket.nats for bucket in found.by[by] if not bucket.bytes}
        assert marks == pytest.approx({k: found.breakdown[k] for k in ("end marks", "stop decisions")})
        of_sentences = sum(bucket.mark_nats for bucket in found.by[by])
        assert of_sentences == pytest.approx(0 if by == "position" else sum(marks.values()))


def test_a_uniform_token_model_pays_in_proportion_to_its_tokens(documents, counter, breakdown, tokenizer):
    uniform = tiny_opt(len(tokenizer))
    torch.nn.init.zeros_(uniform.get_output_embeddings().weight)
    found = score_token_model(
        uniform, documents, counter, 2, system="uniform", context_tokens=40, breakdown=breakdown
    )
    assert_whole(found)
    assert not any(
        bucket.mark_nats or not bucket.bytes for buckets in found.by.values() for bucket in buckets
    )


def test_a_model_that_pays_by_position_shows_it(counter):
    """Nats equal to 1 + the position in its sentence, from a token-level model that cuts as the sentences do."""
    texts = ["Given.", " One of the people.", " Peace and order have seen men."]
    doc = document(texts, counter)
    counts = [len(ids) for ids in doc.sentences[1:]]
    scored = counter.encode(doc.scored_text)
    assert scored == [token for ids in doc.sentences[1:] for token in ids]
    nats = torch.tensor([1.0 + p for n in counts for p in range(n)], dtype=torch.float64)

    def nll(ids):
        return torch.cat([torch.zeros(len(ids) - 1 - len(nats), dtype=torch.float64), nats])

    breakdown = Breakdown(["position", "index"], [doc], counter)
    found = scoring.score_tokens(nll, [doc], counter, 2, "known", "none", lambda: None, breakdown)
    assert list(found.by) == ["position", "index"]
    by_label = {bucket.label: bucket.nats for bucket in found.by["position"]}
    assert by_label["0"] == pytest.approx(2.0)
    assert by_label["1"] == pytest.approx(4.0)
    assert by_label["4-5"] == pytest.approx(sum(1 + p for n in counts for p in (4, 5) if p < n))
    totals = {bucket.label: bucket.nats for bucket in found.by["index"]}
    assert totals == pytest.approx({str(i + 1): n * (n + 1) / 2 for i, n in enumerate(counts)})


def test_a_token_over_a_border_is_split_by_bytes(counter):
    """A token of 4 bytes, 3 in one sentence and 1 in the next, pays a quarter in the second."""
    doc = document(["Given. ", "abc", "defg"], counter)
    breakdown = Breakdown(["index", "position"], [doc], counter)
    scores = TokenScores(np.array([8.0, 3.0]), np.array([4, 3]))
    found = breakdown.split("straddling", [scores], 11.0)
    assert [(b.label, b.bytes, b.nats) for b in found["index"]] == [("1", 3, 6.0), ("2", 4, 5.0)]
    assert sum(bucket.nats for bucket in found["position"]) == 11.0


def test_nats_of_a_token_without_bytes_are_not_lost():
    assert nats_per_byte(np.array([1.0, 4.0, 2.0]), np.array([0, 2, 0])).tolist() == [3.0, 4.0]
    with pytest.raises(CoverageError):
        nats_per_byte(np.array([1.0]), np.array([0]))


# ---- refusals


def test_buckets_that_are_not_the_whole_are_refused(counter):
    doc = document(["Given. ", "abc", "defg"], counter)
    breakdown = Breakdown(["length"], [doc], counter)
    with pytest.raises(CoverageError, match="nats"):
        breakdown.split("x", [TokenScores(np.array([8.0]), np.array([7]))], 8.1)
    with pytest.raises(CoverageError, match="6 of 7 bytes"):
        breakdown.split("x", [TokenScores(np.array([8.0]), np.array([6]))], 8.0)


def test_a_model_that_scores_in_another_order_is_refused(documents, counter, monkeypatch):
    model = tiny_sentence_lm(len(counter.backend.get_vocab()))
    plain = sentence_scoring.Recorder.__call__

    def reversed_(self, hidden_states, weight, targets):
        plain(self, hidden_states.flip(0), weight, targets.flip(0))
        return super(sentence_scoring.Recorder, self).__call__(hidden_states, weight, targets)

    monkeypatch.setattr(sentence_scoring.Recorder, "__call__", reversed_)
    arguments = (model, documents[:1], counter)
    assert score_sentence_model(*arguments, causality=CAUSAL).by == {}
    with pytest.raises(CoverageError, match="order"):
        score_sentence_model(*arguments, causality=CAUSAL, breakdown=Breakdown(BY, documents[:1], counter))


def test_names_are_taken_in_any_form_and_a_typo_is_answered():
    assert chosen(["bytes,index,position", " length"]) == list(BY)
    assert chosen(["length", "length"]) == ["length"]
    assert chosen([]) == []
    with pytest.raises(InputError, match="Did you mean 'position'"):
        chosen(["length,positon"])
    assert labels("position")[3:6] == ["3", "4-5", "6-7"]
    assert labels("index")[-1] == "257+"


# ---- the whole way


@pytest.fixture(scope="module")
def measured(run_folder, tmp_path_factory) -> tuple[Results, str, str]:
    """Results, what was printed, and the report, of the command as it is typed."""
    out = tmp_path_factory.mktemp("by")
    line = [
        "bench",
        "quality",
        str(run_folder),
        "--by",
        "bytes,index,length",
        "--by",
        "position",
        "--out",
        str(out),
    ]
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as exit_:
        main(line)
    assert not exit_.value.code
    return read_results(out), printed.getvalue(), (out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def broken_down(measured) -> Results:
    return measured[0]


def test_every_system_is_broken_down_and_gaps_add_up(broken_down):
    assert len(Quality.of(broken_down)) == 7
    for score in Quality.of(broken_down):
        assert_whole(score)
    by_name = {score.system: score for score in Quality.of(broken_down)}
    ours, baseline = by_name["sentence model"], by_name["baseline, equal data"]
    for by in BY:
        baseline_name, rows = compare_buckets(Quality.of(broken_down), by)
        assert baseline_name == baseline.system
        *buckets, whole = rows
        assert whole.label == "all"
        assert whole.bits == pytest.approx({s.system: s.bits_per_byte for s in Quality.of(broken_down)})
        assert whole.gap == pytest.approx(ours.bits_per_byte - baseline.bits_per_byte)
        assert sum(row.gap for row in buckets) == pytest.approx(whole.gap)
        assert sum(row.share for row in buckets) == pytest.approx(1)
        assert whole.ratio == pytest.approx(ours.bits_per_byte / baseline.bits_per_byte)


def test_terminal_and_report_show_each_breakdown(measured):
    results, printed, html = measured
    lines = [line.rstrip() for line in printed.splitlines()]
    for title in BY_TITLES.values():
        assert title in lines
        assert f"<h2>{title}</h2><img" in html
    assert printed.count("100.0%") >= 3
    for table in tables(results):
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_without_a_baseline_there_is_no_gap(broken_down):
    alone = [score for score in Quality.of(broken_down) if score.system == "sentence model"]
    baseline_name, rows = compare_buckets(alone, "length")
    assert baseline_name is None
    assert all(row.gap is None and row.ratio is None for row in rows)
    lone = broken_down.model_copy(deep=True)
    Quality.put(lone, alone)
    assert all("gap" not in table.columns for table in tables(lone))
    drawn = {section.table.title: section.draw for section in sections(lone)["quality"]}
    assert "<svg" in svg(drawn[BY_TITLES["length"]], (4, 3))
    assert compare_buckets([score.model_copy(update={"by": {}}) for score in alone], "length") == (None, [])


def test_results_from_before_breakdowns_can_be_read(broken_down):
    raw = json.loads(broken_down.model_dump_json())
    for score in raw["quality"]:
        del score["by"]
    assert all(score.by == {} for score in Quality.of(parse_results(json.dumps(raw))))


def test_only_quality_can_be_broken_down(run_folder, tmp_path):
    with pytest.raises(InputError, match="only concerns quality"):
        run_bench(["data"], run_folder, out=tmp_path, changes={"by": ["length"]}, quiet=True)
