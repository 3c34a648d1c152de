"""What a run records: heartbeats, the log of metrics, TensorBoard and W&B."""

from __future__ import annotations

import errno
import io
import os

import pytest

from sentcompress.errors import InputError, StorageError
from sentcompress.pipeline import run_job
from sentcompress.training.monitor import MetricsLog, read_heartbeat


def test_the_heartbeat_follows_the_run_and_keeps_the_error(tmp_path, make_recipe, make_job, monkeypatch):
    monkeypatch.setattr("sentcompress.training.monitor.HEARTBEAT_SECONDS", 0)
    recipe, folder = make_recipe(), tmp_path / "run"
    job = make_job(recipe)
    inner, seen = job.loss, []

    def loss(model, batch, part):
        seen.append(read_heartbeat(folder))
        if len(seen) == 9:
            raise ValueError("a broken batch\nwith details")
        return inner(model, batch, part)

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


def test_tensorboard_events_are_written(tmp_path, make_recipe, make_job):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    recipe = make_recipe(steps=2, tensorboard=True)
    run_job(make_job(recipe), tmp_path / "run", recipe)
    (events,) = (tmp_path / "run" / "tensorboard").glob("events.*")
    data = events.read_bytes()
    assert b"train/tokens_per_second" in data
    assert b"eval/bits_per_byte" in data


def test_wandb_gets_the_same_figures(tmp_path, make_recipe, make_job, monkeypatch):
    pytest.importorskip("wandb", reason="W&B is not installed (extra 'wandb')")
    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe = make_recipe(steps=2, wandb=True)
    run_job(make_job(recipe), tmp_path / "run", recipe)
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    data = file.read_bytes()
    assert b"tokens_per_second" in data
    assert b"bits_per_byte" in data


@pytest.mark.parametrize(("tracker", "name"), [("tensorboard", "TensorBoard"), ("wandb", "Weights & Biases")])
def test_a_missing_tracker_is_an_error(tmp_path, make_recipe, make_job, monkeypatch, tracker, name):
    monkeypatch.setattr(f"accelerate.utils.is_{tracker}_available", lambda: False)
    recipe = make_recipe(steps=2, **{tracker: True})
    with pytest.raises(InputError, match=f"{tracker}: true, but {name} is not installed"):
        run_job(make_job(recipe), tmp_path / "run", recipe)


@pytest.mark.parametrize("refused", ["r", "w", "a"])
def test_a_log_that_is_refused_is_a_storage_error(tmp_path, monkeypatch, refused):
    """refused 90 of 309: "OSError: [Errno 30] Read-only file system: 'metrics.jsonl'" when a stage began."""
    MetricsLog(tmp_path, 0, tensorboard=False).close()
    opened = io.open

    def refuse(file, mode="r", *arguments, **named):
        if mode.strip("bt") == refused:
            raise OSError(errno.EROFS, "Read-only file system", str(file))
        return opened(file, mode, *arguments, **named)

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(io, "open", refuse)
    with pytest.raises(StorageError, match="cannot be written: Read-only file system"):
        MetricsLog(tmp_path, 0, tensorboard=False)
