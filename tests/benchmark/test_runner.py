"""The whole benchmark on a run folder of tiny models."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from sentcompress.benchmark.compare import compare, compare_results, warnings
from sentcompress.benchmark.measurement import measurements
from sentcompress.benchmark.measurements.quality import Quality
from sentcompress.benchmark.measurements.reconstruct import Reconstruct
from sentcompress.benchmark.measurements.text import GeneratedText
from sentcompress.benchmark.models import ModelFolder
from sentcompress.benchmark.results import SCHEMA_VERSION, Results, is_current, parse_results, read_results
from sentcompress.benchmark.runner import distributed_first, run_bench
from sentcompress.errors import InputError, ModelFolderError, RunError
from sentcompress.provenance import commit

OLD_RUN = Path(__file__).resolve().parent.parent / "fixtures" / "1e44d12" / "whole"
NAMES = [measurement.name for measurement in measurements()]


@pytest.fixture(scope="module")
def results(run_folder, tmp_path_factory) -> tuple[Results, object]:
    out = tmp_path_factory.mktemp("bench")
    return run_bench(None, run_folder, out=out, quiet=True), out


def test_everything_is_measured(results):
    found, out = results
    assert found.measured() == [m.name for m in measurements() if not m.plain_llm]
    assert [score.system for score in Quality.of(found)] == [
        "sentence model",
        "sentence model, shortlist of 100",
        "baseline, equal data",
        "backbone, as it came",
        "sentence model, without its LLM",
        "sentence model, untrained",
        "unigram",
    ]
    assert {path.name for path in out.iterdir()} == {"results.json", "report.html", "samples.txt"}
    assert read_results(out) == found
    assert found.samples
    assert Reconstruct.of(found).extra == {"exact-match.sentences": Reconstruct.of(found).exact_sentences}


def test_figures_keep_the_names_that_older_results_have(results):
    """``bench compare`` and everybody's scripts find them by name: those of 1e44d12 are all there."""

    def names(found):
        return {
            row.part: {n for r in found.rows if r.part == row.part for n in r.figures} for row in found.rows
        }

    now, before = names(results[0]), names(read_results(OLD_RUN))
    assert now.keys() == before.keys()
    for part, figures in before.items():
        assert figures <= now[part], part


def test_every_row_is_honest(results):
    found, _ = results
    for row in found.rows:
        honesty = row.honesty
        assert honesty.command
        assert re.fullmatch(r"unknown|[0-9a-f]{12}(\+dirty)?", honesty.commit)
        assert honesty.recipe_digest
        assert honesty.device.startswith("cpu")
        assert honesty.dtype == "float32"
        assert honesty.threads >= 1
        assert honesty.packages["torch"]
        assert honesty.mean_sentence_tokens
    tokens = {row.system: row.honesty.training_tokens for row in found.rows if row.part == "quality"}
    assert tokens["sentence model"] == 2000
    assert tokens["baseline, equal data"] == 1000
    assert tokens["sentence model, untrained"] == 0


def test_the_report_is_whole_and_needs_no_network(results):
    _, out = results
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "tiny &lt;b&gt;run&lt;/b&gt;" in html
    assert "<b>run</b>" not in html
    assert html.count("data:image/svg+xml;base64,") == 5
    assert not re.search(r"""(src|href)=["'](?!data:)""", html)
    assert "<script" not in html
    assert "training tokens in this run 2,000" in html


def test_one_part_is_measured_again_and_the_others_are_kept(results, run_folder, tmp_path):
    found, out = results
    shutil.copytree(out, tmp_path / "bench")
    again = run_bench(["data"], run_folder, out=tmp_path / "bench", quiet=True)
    assert again.measured() == found.measured()
    assert Quality.of(again) == Quality.of(found)
    assert GeneratedText.of(again) == GeneratedText.of(found)
    assert again.samples == found.samples


def test_a_single_model_folder_says_what_it_lacks(run_folder, tmp_path):
    shutil.copytree(run_folder / "graft", tmp_path / "lone")
    found = run_bench(["quality", "reconstruct"], tmp_path / "lone", quiet=True)
    assert (tmp_path / "lone" / "bench" / "results.json").is_file()
    reasons = {skipped.what: skipped.reason for skipped in found.skipped}
    assert "single model" in reasons["baseline, equal data"]
    assert Reconstruct.of(found).system == "encoder and decoder of the grafted model"
    assert {score.system for score in Quality.of(found)} >= {
        "sentence model",
        "backbone, as it came",
        "unigram",
    }


def test_a_lone_vae_has_no_quality_but_reconstructs(run_folder, tmp_path):
    shutil.copytree(run_folder / "vae", tmp_path / "lone")
    found = run_bench(["causality", "quality", "reconstruct"], tmp_path / "lone", quiet=True)
    assert found.measured() == ["reconstruct"]
    assert {skipped.part for skipped in found.skipped} == {"causality", "quality"}


def test_a_stage_folder_stands_for_its_run(run_folder):
    assert ModelFolder(run_folder / "graft").path == run_folder


def test_folders_that_hold_nothing_are_refused(tmp_path, run_folder):
    with pytest.raises(ModelFolderError):
        ModelFolder(tmp_path)
    with pytest.raises(ModelFolderError):
        ModelFolder(tmp_path / "absent")
    with pytest.raises(InputError, match="no measurement"):
        run_bench(["speeed"], run_folder)


def test_results_of_another_version_or_damaged_are_refused(results, tmp_path):
    text = results[0].model_dump_json()
    newer = json.loads(text) | {"schema_version": SCHEMA_VERSION + 1}
    for broken in (text[:100], json.dumps(newer), json.dumps(json.loads(text) | {"rows": 3}), "[]"):
        with pytest.raises(RunError):
            parse_results(broken)
    (tmp_path / "results.json").write_text(text[:50])
    with pytest.raises(InputError, match=r"results\.json"):
        read_results(tmp_path)
    with pytest.raises(InputError, match="bench all"):
        read_results(tmp_path / "absent")


def test_compare(results):
    found, out = results
    names, rows = compare([out, out / "results.json"])
    assert len(names) == 2
    assert all(row.values[0] == row.values[1] for row in rows)
    assert ("quality", "sentence model", "bits_per_byte") in {(r.part, r.system, r.figure) for r in rows}
    with pytest.raises(InputError):
        compare([out])
    changed = found.model_copy(deep=True)
    changed.rows = [row for row in changed.rows if row.part != "memory"]
    changed.rows[0].honesty.threads += 1
    Quality.of(changed)[0].documents[0].bytes += 1
    assert any(row.part == "memory" and row.values[1] is None for row in compare_results([found, changed]))
    GeneratedText.of(changed).prompts[0] += " and more"
    GeneratedText.of(changed).judge = "another"
    assert len(warnings([found, changed])) == 4
    assert not warnings([found, found])


def test_commit_is_unknown_outside_a_checkout(tmp_path):
    assert commit(tmp_path) == "unknown"


def test_results_are_current_until_recipe_or_weights_change(results, run_folder, tmp_path):
    _, out = results
    recipe = ModelFolder(run_folder).recipe()
    assert is_current(out, run_folder, recipe)
    assert not is_current(tmp_path, run_folder, recipe)
    assert not is_current(out, run_folder, recipe.model_copy(update={"seed": 5}))
    changed = tmp_path / "changed"
    shutil.copytree(run_folder, changed)
    (changed / "baseline" / "config.json").unlink()
    assert not is_current(out, changed, recipe)
    partial = tmp_path / "partial"
    run_bench(["data"], run_folder, out=partial, quiet=True)
    assert not is_current(partial, run_folder, recipe)


def test_results_of_other_weights_are_not_kept(results, run_folder, tmp_path):
    _, out = results
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / "baseline" / "config.json").unlink()
    shutil.copytree(out, tmp_path / "bench")
    found = run_bench(["data"], tmp_path / "run", out=tmp_path / "bench", quiet=True)
    assert found.measured() == ["data"]


def test_what_processes_measure_together_comes_before_what_one_does_alone():
    assert distributed_first(NAMES)[:3] == ["causality", "quality", "speed"]
    assert distributed_first(["data", "text", "speed"]) == ["speed", "data", "text"]
