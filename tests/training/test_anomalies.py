"""Anomalies, signals, heartbeats, and two runs in one folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sentcompress.errors import InputError, NumericsError, TerminatedError
from sentcompress.files import file_digest
from sentcompress.pipeline import run_job, run_recipe
from sentcompress.recipe import TrainingSettings
from sentcompress.training.anomalies import MIN_RECENT_LOSSES, LossWatch
from sentcompress.training.monitor import read_heartbeat, read_metrics
from sentcompress.training.run_folder import PRETRAIN, StageFolder


def break_batches(job, *broken: int) -> list[int]:
    """Make the loss of some micro-batches NaN; return the list of those that were used, as it grows."""
    inner, make = job.loss, job.batch
    used: list[int] = []

    def batch(index):
        return {**make(index), "number": torch.tensor(index)}

    def loss(model, tensors):
        used.append(int(tensors.pop("number")))
        output = inner(model, tensors)
        if used[-1] in broken:
            output.loss = output.loss * float("nan")
        return output

    job.batch, job.loss = batch, loss
    return used


def holder(stage: Path) -> subprocess.Popen[str]:
    """A process that holds a stage's folder; it says so."""
    code = (
        "import sys, time, pathlib\n"
        "from sentcompress.training.run_folder import PRETRAIN, StageFolder\n"
        f"with StageFolder(pathlib.Path({str(stage)!r}), PRETRAIN, {{}}).locked():\n"
        "    print('held', flush=True); time.sleep(600)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def weights(folder: Path) -> str:
    return file_digest(folder / "model.safetensors")


def test_a_bad_step_can_be_left_out(tmp_path, make_recipe, make_job, capsys):
    recipe, folder = make_recipe(on_anomaly="skip", tensorboard=True), tmp_path / "run"
    job = make_job(recipe)
    used = break_batches(job, 7)
    run_job(job, folder, recipe)
    assert used == list(range(12))  # six steps of two micro-batches
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 5, 6]
    (event,) = [line for line in lines if "event" in line]
    assert event == {"step": 4, "event": "step 4: loss nan, gradient norm nan at batch 7"}
    assert "step 4: loss nan, gradient norm nan at batch 7; step not taken" in capsys.readouterr().err


def test_a_bad_step_can_be_gone_back_from_and_the_data_goes_on(tmp_path, make_recipe, make_job):
    recipe = make_recipe(on_anomaly="rollback", save_every=2)
    job, folder = make_job(recipe), tmp_path / "run"
    used = break_batches(job, 7)
    figures = run_job(job, folder, recipe)
    # Steps 1 to 3, the bad one, then steps 3 to 6 again with what comes after it.
    assert used == list(range(16))
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    (event,) = [line for line in lines if "event" in line]
    assert event == {"step": 2, "event": "step 4: loss nan, gradient norm nan at batch 7"}

    # Stopped and resumed after that, it still knows where in the data it was.
    job, again = make_job(recipe), tmp_path / "again"
    used = break_batches(job, 7)
    inner = job.loss

    def loss(model, batch):
        if len(used) == 11:  # in step 5 of the second time
            os.kill(os.getpid(), signal.SIGINT)
        return inner(model, batch)

    job.loss = loss
    with pytest.raises(KeyboardInterrupt):
        run_job(job, again, recipe)
    job = make_job(recipe)
    rest = break_batches(job)
    assert run_job(job, again, recipe, resume=True) == figures
    assert used + rest == list(range(16))
    assert weights(again) == weights(folder)


@pytest.mark.parametrize(
    ("settings", "broken", "message"),
    [
        ({"save_every": 4}, [3], "there is no checkpoint to go back to"),
        ({"save_every": 1}, range(2, 100), "after 5 rollbacks"),
    ],
)
def test_going_back_ends_somewhere(tmp_path, make_recipe, make_job, settings, broken, message):
    recipe = make_recipe(on_anomaly="rollback", **settings)
    job = make_job(recipe)
    break_batches(job, *broken)
    with pytest.raises(NumericsError, match=message):
        run_job(job, tmp_path / "run", recipe)


def test_a_checkpoint_that_leads_nowhere_is_left_for_the_one_before(tmp_path, make_recipe, make_job, capsys):
    recipe = make_recipe(on_anomaly="rollback", save_every=2, steps=8, keep=4)
    job, folder = make_job(recipe), tmp_path / "run"
    used = break_batches(job, *range(8, 12))  # step 5, and again the first step after going back to step 4
    run_job(job, folder, recipe)
    shown = capsys.readouterr().err
    assert "step-000004 too: deleted" in shown
    assert f"back to {folder / 'checkpoints' / 'step-000002'}" in shown
    assert used == list(range(24))  # five steps, one more, and those from the third on
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line] == list(
        range(1, 9)
    )


def test_rollbacks_are_counted_between_checkpoints(tmp_path, make_recipe, make_job):
    recipe = make_recipe(on_anomaly="rollback", save_every=1, steps=20)
    job = make_job(recipe)
    break_batches(job, *range(2, 30, 4))  # seven times, a good step between
    run_job(job, tmp_path / "run", recipe)


def test_going_back_needs_something_to_go_back_to(make_recipe):
    with pytest.raises(InputError, match=r"on_anomaly: rollback .* set save_every"):
        make_recipe(on_anomaly="rollback")


def test_nothing_is_saved_while_steps_are_left_out(tmp_path, make_recipe, make_job):
    recipe = make_recipe(on_anomaly="skip", save_every=2, keep=9)
    job = make_job(recipe)
    break_batches(job, 2, 6)  # steps 2 and 4
    run_job(job, tmp_path / "run", recipe)
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved == ["step-000003", "step-000005", "step-000006"]


def test_leaving_out_ends_somewhere(tmp_path, make_recipe, make_job):
    recipe = make_recipe(on_anomaly="skip", steps=100)
    job = make_job(recipe)
    break_batches(job, *range(2, 1000))
    with pytest.raises(NumericsError, match="25 steps skipped in a row"):
        run_job(job, tmp_path / "run", recipe)


def test_a_spike_is_a_loss_far_above_the_usual():
    watch = LossWatch(TrainingSettings(spike=2.0))
    assert all(watch.anomaly(8.0, 1.0, scaled=False) is None for _ in range(MIN_RECENT_LOSSES - 1))
    assert watch.anomaly(90.0, 1.0, scaled=False) is None  # too few to compare with
    assert watch.anomaly(15.9, 1.0, scaled=False) is None
    assert watch.anomaly(16.1, 1.0, scaled=False) == "loss 16.1 is a spike, 8 is usual"
    assert 16.1 not in watch.recent
    again = LossWatch(TrainingSettings(spike=2.0))
    again.recent.extend(watch.recent)
    assert again.anomaly(16.1, 1.0, scaled=False)
    low = LossWatch(TrainingSettings(spike=2.0))
    low.recent.extend([0.01] * 30)
    assert low.anomaly(0.4, 1.0, scaled=False) is None
    assert LossWatch(TrainingSettings()).anomaly(1e9, 1.0, scaled=False) is None


def test_sigterm_saves_and_says_that_it_can_go_on(tmp_path, make_recipe, make_job):
    recipe = make_recipe()
    run_job(make_job(recipe), tmp_path / "whole", recipe)
    job, folder = make_job(recipe), tmp_path / "run"
    inner, calls = job.loss, iter(range(100))

    def loss(model, batch):
        if next(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(model, batch)

    job.loss = loss
    with pytest.raises(TerminatedError, match="step-000004") as raised:
        run_job(job, folder, recipe)
    assert raised.value.exit_code == 75
    sign = read_heartbeat(folder)
    assert (sign["state"], sign["step"], sign["error"]) == ("stopped", 4, "")
    run_job(make_job(recipe), folder, recipe, resume=True)
    assert weights(folder) == weights(tmp_path / "whole")
    assert read_heartbeat(folder) is None  # done


def test_signs_of_life(tmp_path, make_recipe, make_job, monkeypatch):
    monkeypatch.setattr("sentcompress.training.monitor.HEARTBEAT_SECONDS", 0)
    recipe, folder = make_recipe(), tmp_path / "run"
    job = make_job(recipe)
    inner, seen = job.loss, []

    def loss(model, batch):
        seen.append(read_heartbeat(folder))
        if len(seen) == 9:
            raise ValueError("a broken batch\nwith details")
        return inner(model, batch)

    job.loss = loss
    with pytest.raises(ValueError, match="a broken batch"):
        run_job(job, folder, recipe)
    assert seen[0]["state"] == "starting"
    assert [(s["state"], s["step"]) for s in seen[2:4]] == [("training", 1), ("training", 1)]
    assert (seen[4]["steps"], seen[4]["pid"]) == (6, os.getpid())
    assert seen[4]["loss"] > 0
    assert 0 <= seen[4]["age"] < 60
    last = read_heartbeat(folder)
    assert (last["state"], last["step"], last["error"]) == ("failed", 4, "a broken batch")
    (folder / "heartbeat.json").write_text('{"state": "tr')
    assert read_heartbeat(folder) is None


def test_a_second_run_in_the_folder_is_refused_and_a_dead_ones_is_not(tmp_path, make_recipe, make_job):
    recipe, folder = make_recipe(), tmp_path / "run"
    process = holder(folder)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another run is writing here"):
            run_job(make_job(recipe), folder, recipe)
        folder.mkdir()
        (folder / "heartbeat.json").write_text(json.dumps({"pid": 17, "host": "node3", "time": 0}))
        with pytest.raises(InputError, match="process 17 on node3"):
            run_job(make_job(recipe), folder, recipe)
        (folder / "heartbeat.json").unlink()
        process.kill()  # as a machine that loses power: nothing tidies up
        process.wait()
        run_job(make_job(recipe), folder, recipe)
    finally:
        process.kill()
        process.wait()
    assert StageFolder(folder, PRETRAIN, {}).finished


def test_ctrl_c_and_then_sigterm_is_still_one_wish_to_end(tmp_path, make_recipe, make_job):
    recipe, folder = make_recipe(), tmp_path / "run"
    job = make_job(recipe)
    inner, calls = job.loss, iter(range(100))

    def loss(model, batch):
        if next(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(model, batch)

    job.loss = loss
    with pytest.raises(KeyboardInterrupt):
        run_job(job, folder, recipe)
    assert (folder / "checkpoints" / "step-000004").is_dir()


def test_sigterm_before_training_ends_with_the_code_to_start_again(tmp_path, make_recipe):
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


def test_a_refused_run_touches_nothing(tmp_path, make_recipe):
    first, second, out = make_recipe(), make_recipe(steps=9), tmp_path / "out"
    run_recipe(first, out)
    before = (out / "recipe.yaml").read_text()
    with holder(out / "pretrain") as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another run is writing here"):
            run_recipe(second, out, overwrite=True)
        process.kill()
    assert (out / "recipe.yaml").read_text() == before
