"""All stages of a recipe: resumed, recognised as done, refused; interrupted and distributed in real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sentcompress.cli import main
from sentcompress.errors import InputError
from sentcompress.files import file_digest
from sentcompress.pipeline import run_recipe, stages_of
from sentcompress.recipe import Recipe, build_recipe


def write(recipe: Recipe, folder: Path) -> str:
    path = folder / "recipe.yaml"
    path.write_text(recipe.dump())
    return str(path)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def test_a_run_is_recognised_as_done_and_resaves_nothing(tmp_path, make_recipe, capsys):
    recipe, out = make_recipe(steps=1), tmp_path / "out"
    figures = run_recipe(recipe, out)
    assert set(figures) == {"pretrain"}
    assert (out / "recipe.yaml").read_text() == recipe.dump()
    capsys.readouterr()
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run_recipe(recipe, out) == figures
    assert "everything is done" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times


def test_another_recipe_in_the_same_folder_is_refused_before_anything_is_built(tmp_path, make_recipe):
    out = tmp_path / "out"
    run_recipe(make_recipe(steps=1), out)
    (out / "pretrain" / "config.json").unlink()  # not finished: killed at the very end
    before = (out / "recipe.yaml").read_text()
    with pytest.raises(InputError, match=r"pretrain\.vocab_size: 400 there, 401 now"):
        run_recipe(make_recipe(steps=1, vocab_size=401), out)
    assert (out / "recipe.yaml").read_text() == before


@pytest.fixture
def grafting(tmp_path, make_recipe) -> Recipe:
    """A recipe with all stages and the quickest benchmark, on a tiny backbone."""
    run_recipe(make_recipe(steps=1), tmp_path / "backbone")
    small = {"steps": 1, "precision": "fp32", "eval_batches": 1}
    raw = make_recipe().model_dump(include={"name", "segmenter", "data"}) | {
        "backbone": {"model": str(tmp_path / "backbone" / "pretrain")},
        "train_vae": small | {"sentences_per_batch": 4},
        "graft": small | {"passages_per_batch": 1, "max_sentences": 4},
        "bench": {"metrics": ["data"]},
    }
    return build_recipe(raw, [], "test")


def test_python_and_the_command_line_run_the_same_stages(tmp_path, grafting, capsys):
    """The benchmark is the last stage of both, and is recognised as done by both."""
    out = tmp_path / "out"
    assert stages_of(grafting) == ["vae", "graft", "baseline", "bench"]
    assert set(run_recipe(grafting, out)) == {"vae", "graft", "baseline"}
    measured = (out / "bench" / "results.json").read_text()
    assert f"done: {out}" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["run", write(grafting, tmp_path), "--out", str(out)])
    assert end.value.code == 0
    shown = capsys.readouterr()
    for name in stages_of(grafting):
        assert f"{name}: already done ({out / name})" in shown.err
    assert f"report: {out / 'bench' / 'report.html'}" in shown.out
    assert (out / "bench" / "results.json").read_text() == measured
    run_recipe(grafting, out, stages=["bench"])
    assert "everything is done" in capsys.readouterr().err


def test_a_stage_without_steps_replaces_an_older_run_too(tmp_path, grafting):
    grafting.train_vae.steps = 0
    run_recipe(grafting, tmp_path / "out", stages=["vae"])
    grafting.train_vae.kl_weight = 0.5
    run_recipe(grafting, tmp_path / "out", stages=["vae"], overwrite=True)
    record = json.loads((tmp_path / "out" / "vae" / "run.json").read_text())
    assert record["fields"]["train_vae.kl_weight"] == 0.5
    assert [path.name for path in (tmp_path / "out").glob(".*")] == [".vae.lock"]


def test_a_recipe_without_measurements_has_no_benchmark(grafting, make_recipe):
    grafting.bench.metrics = []
    assert "bench" not in stages_of(grafting)
    assert stages_of(make_recipe()) == ["pretrain"]


def test_a_misspelt_stage_is_named(tmp_path, make_recipe):
    with pytest.raises(InputError, match="Did you mean 'pretrain'"):
        run_recipe(make_recipe(), tmp_path, stages=["pretrian"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hiden_size": 8}, r"pretrain\.config\.hiden_size: .*Did you mean 'hidden_size'"),
        ({"vocab_size": 8}, r"pretrain\.config\.vocab_size: is set by the tokenizer"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "4 does not divide hidden_size 30"),
        ({"max_position_embeddings": 16}, r"pretrain\.sequence_length: 32 is over max_position_embeddings"),
    ],
)
def test_an_impossible_configuration_is_named(tmp_path, make_recipe, config, message):
    with pytest.raises(InputError, match=message):
        run_recipe(make_recipe(config=config), tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
def test_ctrl_c_saves_shows_how_to_continue_and_exits_with_130(tmp_path, make_recipe):
    recipe, out = make_recipe(steps=400, eval_batches=1), tmp_path / "out"
    arguments = command("sentcompress", "run", write(recipe, tmp_path), "--out", str(out))
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    try:
        metrics = out / "pretrain" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, shown
    assert f"continue with: python -m sentcompress run {tmp_path}/recipe.yaml --out {out}" in shown
    assert "Traceback" not in shown
    (checkpoint,) = (out / "pretrain" / "checkpoints").iterdir()

    assert checkpoint.name in shown
    assert not (out / "pretrain" / "config.json").exists()


def test_two_processes_train_what_one_does_with_twice_the_micro_batches(tmp_path, make_recipe, cache):
    """Same batches, same gradients: the weights agree to rounding, and only rank 0 prints and saves."""
    plain = make_recipe().pretrain.config | {"dropout": 0.0}
    one = make_recipe(steps=3, gradient_accumulation=2, config=plain)
    run_recipe(one, tmp_path / "one")
    two = make_recipe(steps=3, gradient_accumulation=1, config=plain)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SENTCOMPRESS_CACHE": str(cache)}
    launcher = command("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sentcompress")
    done = subprocess.run(
        [*launcher, "run", write(two, tmp_path), "--out", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("pretrain: done: ") == 1
    results = [load_file(tmp_path / name / "pretrain" / "model.safetensors") for name in ("one", "two")]
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    random = load_file(tmp_path / "two/pretrain/checkpoints/step-000003/training_state.safetensors")
    assert not torch.equal(random["random/0/torch"], random["random/1/torch"])
    assert file_digest(tmp_path / "two" / "recipe.yaml") != file_digest(tmp_path / "one" / "recipe.yaml")
