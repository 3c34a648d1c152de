"""Anomalies: steps that are skipped, runs that go back to a checkpoint, spikes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from sentcompress.errors import InputError, NumericsError
from sentcompress.files import file_digest
from sentcompress.pipeline import run_job
from sentcompress.recipe import TrainingSettings
from sentcompress.training.anomalies import MIN_RECENT_LOSSES, LossWatch
from sentcompress.training.monitor import read_metrics


def break_batches(job, *broken: int) -> list[int]:
    """Make the loss of some micro-batches NaN; return the list of those that were used, as it grows."""
    inner, make = job.loss, job.batch
    used: list[int] = []

    def batch(index):
        return {**make(index), "number": torch.tensor(index)}

    def loss(model, tensors, part):
        used.append(int(tensors.pop("number")))
        output = inner(model, tensors, part)
        if used[-1] in broken:
            output.loss = output.loss * float("nan")
        return output

    job.batch, job.loss = batch, loss
    return used


def weights(folder: Path) -> str:
    return file_digest(folder / "model.safetensors")


def test_a_bad_step_can_be_skipped(tmp_path, make_recipe, make_job, capsys):
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


def test_after_a_rollback_training_continues_with_later_data(tmp_path, make_recipe, make_job):
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

    def loss(model, batch, part):
        if len(used) == 11:  # in step 5 of the second time
            os.kill(os.getpid(), signal.SIGINT)
        return inner(model, batch, part)

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
def test_rollbacks_are_limited(tmp_path, make_recipe, make_job, settings, broken, message):
    recipe = make_recipe(on_anomaly="rollback", **settings)
    job = make_job(recipe)
    break_batches(job, *broken)
    with pytest.raises(NumericsError, match=message):
        run_job(job, tmp_path / "run", recipe)


def test_a_checkpoint_that_fails_again_is_deleted_for_the_one_before(tmp_path, make_recipe, make_job, capsys):
    recipe = make_recipe(on_anomaly="rollback", save_every=2, steps=8, keep=4)
    job, folder = make_job(recipe), tmp_path / "run"
    used = break_batches(job, *range(8, 12))  # step 5, and again the first step after going back to step 4
    run_job(job, folder, recipe)
    shown = capsys.readouterr().err
    assert "step-000004 fails too: checkpoint deleted" in shown
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


def test_rollback_needs_save_every(make_recipe):
    with pytest.raises(InputError, match=r"on_anomaly: rollback .* set save_every"):
        make_recipe(on_anomaly="rollback")


def test_no_checkpoint_is_saved_at_a_skipped_step(tmp_path, make_recipe, make_job):
    recipe = make_recipe(on_anomaly="skip", save_every=2, keep=9)
    job = make_job(recipe)
    break_batches(job, 2, 6)  # steps 2 and 4
    run_job(job, tmp_path / "run", recipe)
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved == ["step-000003", "step-000005", "step-000006"]


def test_skipped_steps_are_limited(tmp_path, make_recipe, make_job):
    recipe = make_recipe(on_anomaly="skip", steps=100)
    job = make_job(recipe)
    break_batches(job, *range(2, 1000))
    with pytest.raises(NumericsError, match="25 steps skipped in a row"):
        run_job(job, tmp_path / "run", recipe)


def test_a_spike_is_a_loss_far_above_the_recent_ones():
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
