"""The loop: what it writes, that resuming changes nothing, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sentcompress.errors import InputError, NumericsError, OutOfMemoryError, StorageError, TerminatedError
from sentcompress.files import file_digest
from sentcompress.pipeline import run_job
from sentcompress.training import checkpoints, loop
from sentcompress.training.checkpoints import CheckpointStore, check_checkpoint
from sentcompress.training.monitor import read_heartbeat, read_metrics

MODEL_FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "recipe.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
}
CHECKPOINT_FILES = MODEL_FILES | {"manifest.json", "training_state.json", "training_state.safetensors"}


def interrupt_at(job, call: int) -> None:
    """Ctrl-C during the given call of ``job.loss`` (0 is the first)."""
    inner, calls = job.loss, iter(range(10**6))

    def loss(model, batch, part):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(model, batch, part)

    job.loss = loss


def weights(folder: Path) -> str:
    return file_digest(folder / "model.safetensors")


@pytest.fixture
def whole(tmp_path, make_recipe, make_job):
    """An uninterrupted run."""
    recipe = make_recipe()
    folder = tmp_path / "whole"
    return recipe, folder, run_job(make_job(recipe), folder, recipe)


def test_train_inspect_resume(tmp_path, whole, make_recipe, make_job, capsys):
    """Stopped in the middle and gone on with, it ends with the same weights, bit by bit."""
    recipe, uninterrupted, figures = whole
    folder = tmp_path / "stopped"
    job = make_job(recipe)
    interrupt_at(job, call=6)  # the first micro-batch of step 4
    with pytest.raises(KeyboardInterrupt):
        run_job(job, folder, recipe)
    assert "continue with: " in capsys.readouterr().err
    assert {p.name for p in folder.iterdir()} == {
        "checkpoints",
        "heartbeat.json",
        "metrics.jsonl",
        "run.json",
    }
    checkpoint = folder / "checkpoints" / "step-000004"
    assert [p.name for p in checkpoint.parent.iterdir()] == [checkpoint.name]
    assert {p.name for p in checkpoint.iterdir()} == CHECKPOINT_FILES
    assert check_checkpoint(checkpoint) is None
    state = json.loads((checkpoint / "training_state.json").read_text())
    assert (state["step"], state["next_batch"]) == (4, 8)

    # Other settings of what is shown and kept change nothing, and nor does the state of this process.
    torch.rand(7)
    resumed = make_recipe(eval_every=5, save_every=5, keep=1)
    job = make_job(resumed)
    measure = job.evaluate
    job.evaluate = lambda model: measure(model) if torch.rand(3).sum() else {}  # measuring may draw numbers
    assert run_job(job, folder, resumed, resume=True) == figures
    assert weights(folder) == weights(uninterrupted)
    assert {p.name for p in folder.iterdir()} > MODEL_FILES
    assert [p.name for p in checkpoint.parent.iterdir()] == ["step-000006"]

    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "eval" in line] == [5, 6]
    losses = [[line["loss"] for line in read_metrics(f / "metrics.jsonl") if "loss" in line]
              for f in (folder, uninterrupted)]  # fmt: skip
    assert losses[0] == losses[1]


def test_the_folder_is_an_ordinary_model_with_the_averaged_weights(whole):
    recipe, folder, figures = whole
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Fellow citizens", return_tensors="pt").input_ids
    assert model(input_ids=ids).logits.shape[-1] == len(tokenizer) == 400
    state = checkpoints.load_file(folder / "checkpoints/step-000006/training_state.safetensors")
    name = "model.decoder.layers.0.fc1.weight"
    saved = model.state_dict()[name]
    assert torch.equal(saved, state[f"average/lm.{name}"])
    assert not torch.equal(saved, state[f"weights/lm.{name}"])
    card = (folder / "README.md").read_text()
    assert recipe.digest() in card
    assert f"{figures['bits_per_byte']:.6g}" in card
    assert "pytest" in card  # the command
    code = card.split("```python\n")[1].split("```")[0]
    exec(code, shown := {})
    assert torch.equal(shown["model"].state_dict()[name], saved)


def test_a_line_of_metrics_has_what_reports_need(whole):
    _, folder, figures = whole
    *_, line, last = read_metrics(folder / "metrics.jsonl")
    assert set(line) == {
        "step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "padding", "wait", "tokens",
        "seconds",
    }  # fmt: skip
    assert line["tokens"] == 6 * 2 * 4 * 32
    assert last == {"step": 6, "eval": figures}


def test_a_finished_stage_is_recognised(whole, make_job):
    recipe, folder, figures = whole
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert run_job(make_job(recipe), folder, recipe) == figures
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_a_changed_recipe_is_refused_field_by_field(whole, make_recipe, make_job):
    _, folder, _ = whole
    other = make_recipe(learning_rate=0.5, steps=7)
    with pytest.raises(InputError) as caught:
        run_job(make_job(other), folder, other, resume=True)
    assert "pretrain.learning_rate: 0.001 there, 0.5 now" in caught.value.message
    assert "pretrain.steps: 6 there, 7 now" in caught.value.message
    assert "vocab_size" not in caught.value.message


def test_an_unfinished_run_needs_resume_or_overwrite(tmp_path, make_recipe, make_job):
    recipe = make_recipe()
    job = make_job(recipe)
    interrupt_at(job, call=0)
    with pytest.raises(KeyboardInterrupt):
        run_job(job, tmp_path / "run", recipe)
    with pytest.raises(InputError, match="unfinished run"):
        run_job(make_job(recipe), tmp_path / "run", recipe)
    run_job(make_job(recipe), tmp_path / "run", recipe, overwrite=True)
    assert [path.name for path in tmp_path.glob(".*")] == [".run.lock"]
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 7


def test_overwriting_keeps_the_old_run_until_the_new_one_has_taken_a_step(whole, make_job):
    recipe, folder, _ = whole
    before = weights(folder)
    job = make_job(recipe)

    def broken(*_):
        raise RuntimeError("broken from the start")

    job.loss = broken
    with pytest.raises(RuntimeError, match="broken from the start"):
        run_job(job, folder, recipe, overwrite=True)
    assert weights(folder) == before
    # Killed while it replaced the folder: the old run is found beside it and comes back.
    folder.rename(folder.with_name(f".{folder.name}.previous"))
    folder.mkdir()
    shutil.copy(folder.with_name(f".{folder.name}.previous") / "run.json", folder)
    run_job(make_job(recipe), folder, recipe)
    assert weights(folder) == before
    assert [path.name for path in folder.parent.glob(".*")] == [".whole.lock"]


def test_a_folder_of_other_files_is_never_changed(tmp_path, make_recipe, make_job):
    (tmp_path / "thesis.txt").write_text("years of work")
    recipe = make_recipe()
    for overwrite in (False, True):
        with pytest.raises(InputError, match="left unchanged"):
            run_job(make_job(recipe), tmp_path, recipe, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_nan_stops_with_step_batch_and_last_good_checkpoint(tmp_path, make_recipe, make_job):
    recipe = make_recipe(save_every=2)
    job = make_job(recipe)
    inner, calls = job.loss, iter(range(100))

    def loss(model, batch, part):
        output = inner(model, batch, part)
        if next(calls) == 7:
            output.loss = output.loss * float("nan")
        return output

    job.loss = loss
    with pytest.raises(NumericsError, match=r"step 4: loss nan.*at batch 7; .*step-000002"):
        run_job(job, tmp_path / "run", recipe)
    assert CheckpointStore(tmp_path / "run" / "checkpoints", 2).steps() == [2]


def test_a_run_continues_after_a_full_disk(tmp_path, whole, make_recipe, make_job, monkeypatch):
    _, uninterrupted, _ = whole
    recipe, folder = make_recipe(save_every=2), tmp_path / "run"
    real, calls = checkpoints.save_file, iter(range(10))

    def save_file(*arguments):
        if next(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(checkpoints, "save_file", save_file)
    with pytest.raises(StorageError, match="checkpoints: the disk is full"):
        run_job(make_job(recipe), folder, recipe)
    assert CheckpointStore(folder / "checkpoints", 2).steps() == [2]
    run_job(make_job(recipe), folder, recipe, resume=True)
    assert weights(folder) == weights(uninterrupted)


def test_a_damaged_checkpoint_costs_only_the_steps_after_the_one_before(
    tmp_path, whole, make_recipe, make_job, capsys
):
    _, uninterrupted, _ = whole
    recipe, folder = make_recipe(save_every=2), tmp_path / "run"
    job = make_job(recipe)
    interrupt_at(job, call=9)
    with pytest.raises(KeyboardInterrupt):
        run_job(job, folder, recipe)
    damaged = folder / "checkpoints" / "step-000005" / "training_state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    run_job(make_job(recipe), folder, recipe, resume=True)
    shown = capsys.readouterr().err
    assert "damaged checkpoint skipped" in shown
    assert "continuing from" in shown
    assert "step-000004" in shown
    assert weights(folder) == weights(uninterrupted)


def test_gradient_checkpointing_gives_the_same_weights(tmp_path, make_recipe, make_job):
    results = []
    for on in (False, True):
        recipe = make_recipe(steps=2, gradient_checkpointing=on)
        run_job(make_job(recipe), tmp_path / str(on), recipe)
        results.append(weights(tmp_path / str(on)))
    assert results[0] == results[1]


def test_gradient_checkpointing_is_refused_where_the_model_cannot(tmp_path, make_recipe, make_job):
    recipe = make_recipe(gradient_checkpointing=True)
    job = make_job(recipe)
    job.model.lm.supports_gradient_checkpointing = False
    with pytest.raises(InputError, match=r"pretrain\.gradient_checkpointing: TokenLM does not support it"):
        run_job(job, tmp_path / "run", recipe)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
)
def test_out_of_memory_names_the_settings_that_lower_it(tmp_path, make_recipe, make_job, error):
    recipe = make_recipe()
    job = make_job(recipe)

    def loss(*_):
        raise error

    job.loss = loss
    with pytest.raises(OutOfMemoryError, match="too little memory") as caught:
        run_job(job, tmp_path / "run", recipe)
    assert "pretrain.sequences_per_batch" in caught.value.fix
    assert "pretrain.gradient_checkpointing=true" in caught.value.fix


def test_bf16_trains_and_its_weights_are_saved_in_fp32(tmp_path, make_recipe, make_job):
    recipe = make_recipe(steps=1, precision="bf16", gradient_accumulation=1)
    run_job(make_job(recipe), tmp_path / "run", recipe)
    saved = checkpoints.load_file(tmp_path / "run" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    # The next job of this process may have another precision.
    recipe = make_recipe(steps=1)
    run_job(make_job(recipe), tmp_path / "next", recipe)


def test_broken_data_ends_the_run_with_its_own_error(tmp_path, make_recipe, make_job):
    recipe = make_recipe()
    job = make_job(recipe)
    job.batch = lambda index: {}[index]
    with pytest.raises(KeyError):
        run_job(job, tmp_path / "run", recipe)


def test_sigterm_saves_and_the_run_can_be_continued(tmp_path, make_recipe, make_job):
    recipe = make_recipe()
    run_job(make_job(recipe), tmp_path / "whole", recipe)
    job, folder = make_job(recipe), tmp_path / "run"
    inner, calls = job.loss, iter(range(100))

    def loss(model, batch, part):
        if next(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(model, batch, part)

    job.loss = loss
    with pytest.raises(TerminatedError, match="step-000004") as raised:
        run_job(job, folder, recipe)
    assert raised.value.exit_code == 75
    sign = read_heartbeat(folder)
    assert (sign["state"], sign["step"], sign["error"]) == ("stopped", 4, "")
    run_job(make_job(recipe), folder, recipe, resume=True)
    assert weights(folder) == weights(tmp_path / "whole")
    assert read_heartbeat(folder) is None  # done


def test_sigterm_after_ctrl_c_is_ignored(tmp_path, make_recipe, make_job):
    recipe, folder = make_recipe(), tmp_path / "run"
    job = make_job(recipe)
    inner, calls = job.loss, iter(range(100))

    def loss(model, batch, part):
        if next(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(model, batch, part)

    job.loss = loss
    with pytest.raises(KeyboardInterrupt):
        run_job(job, folder, recipe)
    assert (folder / "checkpoints" / "step-000004").is_dir()


def test_sigterm_before_training_exits_with_75(tmp_path, make_recipe):
    path = tmp_path / "recipe.yaml"
    path.write_text(make_recipe().dump())
    asks_itself = (
        "import os, signal, sys\n"
        "from sentcompress.text import corpus\n"
        "corpus.choose_heldout = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "from sentcompress.cli import main\n"
        f"main(['run', {str(path)!r}, '--out', {str(tmp_path / 'out')!r}])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", asks_itself],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SENTCOMPRESS_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 75, done.stderr
    assert "stopped by SIGTERM" in done.stderr
    assert not [path for path in (tmp_path / "cache").rglob("*.tmp") if path.is_dir()]


def test_seeds_reach_every_generator():
    draws = []
    for _ in range(2):
        loop.seed_everything(5)
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert draws[0] == draws[1]
