"""Saves in the background, and the best model so far."""

from __future__ import annotations

import errno
import json
import math
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from sentcompress.errors import StorageError
from sentcompress.pipeline import run_job
from sentcompress.training import checkpoints, saving
from sentcompress.training.checkpoints import snapshot
from sentcompress.training.saving import BackgroundWriter


def test_submit_does_not_wait_and_writes_one_thing_at_a_time():
    writer, go, done = BackgroundWriter(True), threading.Event(), []
    writer.submit(lambda: (go.wait(10), done.append(1)))
    writer.check()
    assert not done
    go.set()
    writer.submit(lambda: done.append(2))
    writer.wait()
    assert done == [1, 2]


def test_an_error_is_raised_once():
    writer = BackgroundWriter(True)
    writer.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    writer.wait()
    with pytest.raises(ZeroDivisionError):
        BackgroundWriter(False).submit(lambda: 1 / 0)


def test_copies_do_not_change_and_share_what_was_shared():
    weight = torch.ones(2, 2)
    copies = snapshot({"a": weight, "b": weight, "row": weight[0]})
    weight.zero_()
    assert copies["a"].data_ptr() == copies["b"].data_ptr()
    assert copies["a"].sum() == 4
    assert copies["row"].sum() == 2


def test_a_disk_that_fills_up_in_the_background_ends_the_run(tmp_path, make_recipe, make_job, monkeypatch):
    recipe, real, calls = make_recipe(steps=6, save_every=2), saving.write_tensors, []

    def full(folder, tensors):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(folder, tensors)

    monkeypatch.setattr(saving, "write_tensors", full)
    with pytest.raises(StorageError, match="disk is full"):
        run_job(make_job(recipe), tmp_path / "run", recipe)
    kept = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert [path.name for path in kept] == ["step-000002"]
    assert checkpoints.check_checkpoint(kept[0]) is None
    run_job(make_job(recipe), tmp_path / "run", recipe, resume=True)


def test_the_best_so_far_is_kept_and_remembered(tmp_path, make_recipe, make_job, monkeypatch):
    recipe, folder = (
        make_recipe(steps=8, eval_every=2, save_every=6, keep_best=True, ema=None),
        tmp_path / "run",
    )
    job, figures = make_job(recipe), iter([3.0, 2.0, 4.0, 5.0])
    weights = {}

    def evaluate(_):
        figure = next(figures)
        weights[figure] = snapshot(job.state())
        return {"bits_per_byte": figure}

    monkeypatch.setattr(job, "evaluate", evaluate)
    run_job(job, folder, recipe)
    assert "| bits per byte | 2 |" in (folder / "best" / "README.md").read_text()
    best, last = load_file(folder / "best" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.equal(best[name], weights[2.0][name]) for name in best)
    assert all(torch.equal(last[name], weights[5.0][name]) for name in last)
    state = checkpoints.read_state(folder / "checkpoints" / "step-000006")
    assert state["best"] == 2.0


def test_nan_and_infinity_are_never_the_best_and_never_in_json(tmp_path, make_recipe, make_job, monkeypatch):
    recipe = make_recipe(steps=6, eval_every=2, save_every=2, keep=9, keep_best=True)
    job, figures, folder = make_job(recipe), iter([math.nan, 3.0, math.inf]), tmp_path / "run"
    monkeypatch.setattr(job, "evaluate", lambda _: {"bits_per_byte": next(figures), "sentences": 1.0})
    run_job(job, folder, recipe)
    assert "| bits per byte | 3 |" in (folder / "best" / "README.md").read_text()
    assert [checkpoints.read_state(path)["best"] for path in sorted(folder.glob("checkpoints/step-*"))] == [
        None,
        3.0,
        3.0,
    ]

    def strict(text):
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    lines = [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval"]["bits_per_byte"] for line in lines if "eval" in line] == [None, 3.0, None]
    for path in [folder / "run.json", *folder.rglob("training_state.json")]:
        strict(path.read_text())


def test_waiting_for_saves_is_reported_once(tmp_path, make_recipe, make_job, monkeypatch, capsys):
    recipe, real = make_recipe(steps=4, save_every=1, background_saves=False), saving.write_tensors

    def slow(folder, tensors):
        time.sleep(0.3)
        real(folder, tensors)

    monkeypatch.setattr(saving, "write_tensors", slow)
    run_job(make_job(recipe), tmp_path / "young", recipe)
    assert "waits for saves" not in capsys.readouterr().err
    monkeypatch.setattr(saving, "MIN_RUN_SECONDS", 0.0)
    run_job(make_job(recipe), tmp_path / "old", recipe)
    assert capsys.readouterr().err.count("of the time: raise pretrain.save_every") == 1
    about = json.loads((tmp_path / "old" / "run.json").read_text())
    assert about["saving_seconds"] > 4 * 0.3
