"""Generated text: the same prompts for every system, repeatable draws, a judge that scores every byte once."""

from __future__ import annotations

import math

import pytest
import torch

from sentcompress.benchmark.judge import Judge
from sentcompress.benchmark.measurements.causality import Causality, CausalityCheck, CausalityReport
from sentcompress.benchmark.measurements.text import DIFFERENCES_TITLE, HUMAN, GeneratedText
from sentcompress.benchmark.models import Missing, ModelFolder
from sentcompress.benchmark.report import render_report, tables
from sentcompress.benchmark.results import Results
from sentcompress.benchmark.runner import run_bench
from sentcompress.benchmark.text_writing import TextWriter, first_tokens, text_prompts
from sentcompress.errors import CausalityError, CoverageError, InputError
from sentcompress.recipe import BenchSettings
from sentcompress.testing import tiny_opt
from sentcompress.text.lossless_tokenizer import LosslessTokenizer, lossless

SETTINGS = BenchSettings(prompt_tokens=12, text_new_tokens=16, text_prompts=3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def counter(tokenizer):
    return lossless(tokenizer)


@pytest.fixture(scope="module")
def prompts(bench_models, counter):
    return text_prompts(bench_models.corpus, counter, SETTINGS)


@pytest.fixture
def writer(prompts, tokenizer):
    return TextWriter([p.text for p in prompts], tokenizer, SETTINGS, seed=0, bos_token_id=2)


@pytest.fixture(scope="module")
def uniform_judge(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("judge")
    model = tiny_opt(len(tokenizer))
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def results(run_folder, uniform_judge, tmp_path_factory) -> Results:
    return run_bench(
        ["text"],
        run_folder,
        out=tmp_path_factory.mktemp("text"),
        changes={"text_judge": uniform_judge},
        quiet=True,
    )


def test_prompts_are_beginnings_of_heldout_documents_and_references_how_they_go_on(
    bench_models, prompts, counter
):
    documents = [bench_models.corpus.document_text(number) for number in bench_models.corpus.heldout.tolist()]
    assert 1 < len(prompts) <= 3
    for prompt in prompts:
        whole = next(text for text in documents if text.startswith(prompt.text))
        assert whole.startswith(prompt.text + prompt.reference)
        assert prompt.tokens >= 11  # uncut text may take a token less
        assert len(counter.encode(prompt.reference)) == 16
        # A sentence less would have been too short.
        sentences = bench_models.corpus.document_sentences(
            int(bench_models.corpus.heldout[documents.index(whole)])
        )
        texts = [bench_models.corpus.sentence_text(i) for i in sentences]
        cut = next(n for n in range(len(texts)) if "".join(texts[:n]) == prompt.text)
        assert len(counter.encode("".join(texts[: cut - 1]))) < 12


def test_no_document_long_enough_is_said(bench_models, counter):
    with pytest.raises(Missing, match=r"lower bench\.prompt_tokens"):
        text_prompts(bench_models.corpus, counter, SETTINGS.model_copy(update={"text_new_tokens": 10**6}))


def test_text_is_cut_at_a_token_and_never_inside_a_character(counter):
    text = "the people \U0001f600\U0001f600 中文 see"
    for count in range(1, len(counter.encode(text)) + 2):
        cut = first_tokens(text, counter, count)
        assert text.startswith(cut)
        sure = max(0, count - 4)  # the last character may be spelt by several
        assert counter.encode(cut)[:sure] == counter.encode(text)[:sure]
    assert first_tokens(text, counter, 10**6) == text


def test_every_system_is_given_the_same_bytes_and_writes_as_much(writer, bench_models, counter, monkeypatch):
    from sentcompress.generation import SentenceGenerator

    seen = []
    plain = SentenceGenerator.generate

    def generate(self, prompts, settings=None):
        seen.append(("sentences", list(prompts)))
        assert settings.stop_threshold == 1
        return plain(self, prompts, settings)

    monkeypatch.setattr(SentenceGenerator, "generate", generate)
    lm = bench_models.baseline
    original = lm.generate

    def token_generate(input_ids, attention_mask):
        rows = zip(input_ids.tolist(), attention_mask.tolist(), strict=True)
        texts = [[t for t, real in zip(row, mask, strict=True) if real] for row, mask in rows]
        assert all(row[0] == 2 for row in texts)
        seen.append(("tokens", [counter.backend.decode(row[1:], skip_special_tokens=False) for row in texts]))
        return original(input_ids=input_ids, attention_mask=attention_mask)

    monkeypatch.setattr(lm, "generate", token_generate, raising=False)
    before = lm.generation_config
    for texts in (writer.by_sentences(bench_models.sentence_lm), writer.by_tokens(lm)):
        assert [len(counter.encode(text)) for text in texts] == pytest.approx([16] * len(texts), abs=2)
    assert seen == [("sentences", writer.prompts), ("tokens", writer.prompts)]
    assert lm.generation_config is before


def test_draws_are_repeated_by_their_seed(writer, bench_models, tokenizer):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = writer.by_tokens(bench_models.baseline), writer.by_sentences(bench_models.sentence_lm)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    assert (writer.by_tokens(bench_models.baseline), writer.by_sentences(bench_models.sentence_lm)) == first
    other = TextWriter(writer.prompts, tokenizer, SETTINGS, seed=1, bos_token_id=2)
    assert other.by_tokens(bench_models.baseline) != first[0]
    assert other.by_sentences(bench_models.sentence_lm) != first[1]


def test_nothing_ends_a_text_that_a_model_wants_to_end(tokenizer, counter, writer):
    """A model that all but always draws the end token writes on all the same."""
    lm = tiny_opt(len(tokenizer))
    plain = lm.forward

    def forward(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits[..., tokenizer.eos_token_id] = 100.0
        return output

    lm.forward = forward
    lm.generation_config.eos_token_id = None
    assert all(len(counter.encode(text)) >= 14 for text in writer.by_tokens(lm))


def test_more_text_than_positions_is_said(tokenizer, writer):
    with pytest.raises(Missing, match="has 24 positions"):
        writer.by_tokens(tiny_opt(len(tokenizer), max_position_embeddings=24))


# ---- the judge


def test_a_uniform_judge_pays_log2_v_a_token(uniform_judge, tokenizer, counter, prompts):
    texts = [prompt.reference for prompt in prompts]
    found = Judge(uniform_judge, CPU).score("x", [p.text for p in prompts], texts)
    tokens = sum(len(counter.encode(text)) for text in texts)
    size = sum(len(text.encode("utf-8")) for text in texts)
    assert found.bytes == size  # none of the prompts'
    assert found.targets == tokens
    assert found.bits_per_byte == pytest.approx(tokens * math.log2(len(tokenizer)) / size, rel=1e-6)


def test_a_judge_whose_tokenizer_changes_the_text_is_refused(uniform_judge, monkeypatch):
    judge = Judge(uniform_judge, CPU)
    judge.load()
    monkeypatch.setattr(LosslessTokenizer, "encode", lambda _, text, **_kwargs: [5] * len(text))
    with pytest.raises(CoverageError, match="do not spell"):
        judge.score("x", ["a"], ["b"])


def test_a_judge_that_sees_the_future_is_refused(uniform_judge, monkeypatch):
    from dataclasses import replace

    from sentcompress.benchmark import judge as module

    plain = module.reference_of
    monkeypatch.setattr(module, "reference_of", lambda model: replace(plain(model), leak=0.1))
    with pytest.raises(InputError, match="sees later tokens"):
        Judge(uniform_judge, CPU).load()


def test_a_judge_that_is_not_there_is_named_before_anything_is_measured(run_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for judge in ("no-such-llm", str(tmp_path / "empty"), str(tmp_path / "absent.gguf")):
        with pytest.raises(InputError, match=r"^bench\.text_judge \(--judge\): "):
            run_bench(["text"], run_folder, out=tmp_path / "out", changes={"text_judge": judge}, quiet=True)
    assert not (tmp_path / "out").exists()


# ---- the whole part


def test_all_systems_stand_in_the_table_with_intervals_and_differences(results, uniform_judge):
    report = GeneratedText.of(results)
    assert [score.system for score in report.scores] == [
        "sentence model",
        "baseline, equal data",
        "backbone, as it came",
        HUMAN,
    ]
    assert report.judge == uniform_judge
    assert report.judge_is_backbone is False
    assert len(report.prompts) < report.prompts_asked
    for score in report.scores:
        assert len(score.texts) == len(report.prompts)
        found = score.measures["judge_bits_per_byte"]
        assert found.low <= found.value <= found.high
        for measure in (*score.measures.values(), *score.differences.values()):
            assert math.isfinite(measure.value)
    differences = {score.system: score.differences for score in report.scores}
    assert differences["baseline, equal data"] == {}
    ours, baseline = report.scores[0].measures["words"], report.scores[1].measures["words"]
    assert differences["sentence model"]["words"].value == pytest.approx(ours.value - baseline.value)
    # The tiny run's baseline is its backbone: the same text, and no difference in anything.
    assert report.scores[1].texts == report.scores[2].texts
    assert {d.value for d in differences["backbone, as it came"].values()} == {0.0}
    by_title = {table.title: table for table in tables(results)}
    text = by_title[GeneratedText.title]
    assert {"judge bits/byte", "4-grams repeated %"} <= set(text.columns)
    assert "[" in text.rows[0][1]
    assert [row[0] for row in by_title[DIFFERENCES_TITLE].rows] == [
        "sentence model",
        "backbone, as it came",
        HUMAN,
    ]
    assert Causality.of(results).passed


def test_rows_carry_the_figures(results):
    row = next(row for row in results.rows if row.part == "text")
    assert row.system == "sentence model"
    assert row.honesty.training_tokens == 2000
    assert {"words", "words_low", "words_high", "words_vs_baseline", "loops_vs_baseline_low"} <= set(
        row.figures
    )


def test_the_report_shows_the_texts_escaped(results):
    changed = results.model_copy(deep=True)
    GeneratedText.of(changed).scores[0].texts[0] = "<b>bold</b>"
    html = render_report(changed)
    assert "Texts after the same prompts" in html
    assert "&lt;b&gt;bold&lt;/b&gt;" in html
    assert "<b>bold</b>" not in html


def test_without_a_baseline_and_a_judge_the_rest_is_measured_and_said(run_folder, tmp_path):
    import shutil

    shutil.copytree(run_folder / "graft", tmp_path / "lone")
    found = run_bench(["text"], tmp_path / "lone", quiet=True)
    assert "single model" in {s.what: s.reason for s in found.skipped}["baseline, equal data"]
    assert [s.system for s in GeneratedText.of(found).scores] == [
        "sentence model",
        "backbone, as it came",
        HUMAN,
    ]
    assert not any(score.differences for score in GeneratedText.of(found).scores)
    titles = {table.title: table for table in tables(found)}
    assert DIFFERENCES_TITLE not in titles
    assert {row[1] for row in titles[GeneratedText.title].rows} == {"no judge"}
    assert any("--judge" in note for note in titles[GeneratedText.title].notes)
    assert next(row for row in found.rows if row.part == "text").figures["judge"] == "no judge"


def test_opponents_write_too(run_folder, tmp_path, tokenizer):
    """One that is not there is listed as not measured."""
    import shutil

    out = shutil.copytree(run_folder, tmp_path / "run")
    stage = shutil.copytree(out / "baseline", out / "opponent-small")
    tiny_opt(len(tokenizer), num_hidden_layers=1).save_pretrained(stage)
    (stage / "run.json").write_text('{"stage": "opponent-small", "tokens": 700}', encoding="utf-8")
    recipe = ModelFolder(out).recipe(["opponents={absent: {}, small: {blocks: 1}}"])
    (stage / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
    found = run_bench(["text"], out, recipe, out=tmp_path / "bench", quiet=True)
    report = GeneratedText.of(found)
    systems = [score.system for score in report.scores]
    assert systems[:3] == ["sentence model", "baseline, equal data", "opponent small"]
    assert "opponent absent" in {skipped.what for skipped in found.skipped}
    assert report.scores[2].texts != report.scores[1].texts
    assert report.scores[2].differences
    row = next(row for row in found.rows_of("text") if row.system == "opponent small")
    assert row.honesty.training_tokens == 700


def test_a_judge_that_is_the_backbone_is_said(run_folder, tmp_path):
    backbone = run_bench(["data"], run_folder, out=tmp_path, quiet=True).recipe["backbone"]["model"]
    found = run_bench(["text"], run_folder, out=tmp_path, changes={"text_judge": backbone}, quiet=True)
    assert GeneratedText.of(found).judge_is_backbone
    assert any("not independent" in note for table in tables(found) for note in table.notes)


def test_a_model_that_sees_the_future_writes_nothing(run_folder, tmp_path, monkeypatch):
    from sentcompress.benchmark import causality_checks

    check = CausalityCheck(name="x", kind="future", attention="sdpa", max_delta=1, tolerance=0, passed=False)
    monkeypatch.setattr(causality_checks, "check_causality", lambda *_, **__: CausalityReport(checks=[check]))
    with pytest.raises(CausalityError):
        run_bench(["text"], run_folder, out=tmp_path, quiet=True)
