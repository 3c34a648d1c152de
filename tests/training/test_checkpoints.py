"""Checkpoints by themselves: random states, wholeness, damage, how many are kept."""

from __future__ import annotations

import errno
import json
import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sentcompress.errors import ModelFolderError, StorageError
from sentcompress.files import manifest, storage_errors, whole_folder, write_atomically
from sentcompress.pipeline import run_job
from sentcompress.training import checkpoints
from sentcompress.training.checkpoints import (
    MANIFEST,
    STATE,
    TENSORS,
    CheckpointStore,
    check_checkpoint,
    load_random_tensors,
    random_tensors,
)


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(())),
    ]


def test_random_states_survive_a_file(tmp_path):
    draw()  # leaves half of a pair of normal numbers waiting in python and numpy
    save_file(random_tensors(), tmp_path / "random.safetensors")
    expected = [draw() for _ in range(3)]
    load_random_tensors(checkpoints.load_file(tmp_path / "random.safetensors"))
    assert [draw() for _ in range(3)] == expected


def write_model(folder: Path) -> None:
    (folder / "model").write_text("weights")


def write_state(folder: Path) -> None:
    checkpoints.write_tensors(folder, {"a/b": torch.ones(2)})


def store(folder: Path, keep: int = 2) -> CheckpointStore:
    found = CheckpointStore(folder, keep)
    for step in (1, 2, 3):
        found.save(step, write_model, write_state, {"step": step, "tokens": 0})
    return found


def test_only_the_newest_are_kept(tmp_path):
    assert store(tmp_path).steps() == [2, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_a_kill_while_deleting_leaves_no_broken_checkpoint(tmp_path, monkeypatch):
    def killed(path: Path, **_: object) -> None:
        if Path(path).is_dir():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            store(tmp_path)
    assert all(checkpoints.check_checkpoint(path) is None for path in tmp_path.glob("step-*"))
    store(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage):
    found = store(tmp_path)
    newest = found.path(3)
    tensors = newest / checkpoints.TENSORS
    data = tensors.read_bytes()
    if damage == "truncate":
        tensors.write_bytes(data[:-1])
    elif damage == "flip":
        tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "delete":
        tensors.unlink()
    else:
        (newest / checkpoints.MANIFEST).write_text("{")
    warnings: list[str] = []
    assert found.latest(warnings.append) == found.path(2)
    assert len(warnings) == 1
    assert str(newest) in warnings[0]


def test_all_damaged_is_an_error_that_names_them(tmp_path):
    found = store(tmp_path)
    for step in (2, 3):
        (found.path(step) / "model").write_text("")
    with pytest.raises(ModelFolderError, match=r"(?s)step-000003: model has 0 bytes.*step-000002"):
        found.latest(lambda _: None)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    found = store(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(StorageError, match="disk is full") as caught:
        found.save(4, lambda _: None, write_state, {})
    assert str(tmp_path) in caught.value.message
    assert found.steps() == [2, 3]
    assert found.latest(pytest.fail) == found.path(3)
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_recognised_in_safetensors_errors(tmp_path):
    # Its writer makes a sibling and renames it, so /dev/full cannot stand in (it would be replaced).
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(StorageError, match="disk is full"), storage_errors(tmp_path):
        raise error
    with pytest.raises(SafetensorError), storage_errors(tmp_path):
        raise SafetensorError("another matter")


def test_other_safetensors_errors_are_reported(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(StorageError, match="cannot be written: File too large"), storage_errors(tmp_path):
            save_file({"a": torch.zeros(10_000)}, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_saved_files_are_as_readable_as_their_folder(tmp_path):
    with whole_folder(tmp_path / "target") as folder:
        save_file({"a": torch.zeros(2)}, folder / "a.safetensors")
        (folder / "text").write_text("x")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "target").iterdir()}
    assert modes == {(tmp_path / "target").stat().st_mode & 0o666}


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "target"

    def fill() -> None:
        with whole_folder(target) as folder:
            (folder / "file").write_text("half")
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        fill()
    assert not any(tmp_path.iterdir())
    with whole_folder(target) as folder:
        (folder / "file").write_text("whole")
        assert not target.exists()
    assert (target / "file").read_text() == "whole"


def test_an_atomic_write_replaces_whole_or_fails_with_the_place(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(StorageError, match="cannot be written"):
        write_atomically(tmp_path / "missing" / "b.json", "x")


def tampered(folder: Path, **values: object) -> None:
    """Other values in the state, with a manifest that agrees; "gone" takes one out."""
    state = json.loads((folder / STATE).read_text()) | values
    (folder / STATE).write_text(json.dumps({name: value for name, value in state.items() if value != "gone"}))
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).write_text(json.dumps({"step": 6, "files": manifest(folder)}))


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"step": 10**9}, "step: 1000000000 differs from the folder's name"),
        ({"step": -5}, "step: "),
        ({"step": "abc"}, "step: "),
        ({"tokens": "gone"}, "tokens: "),
        ({"precision": "fp8"}, "precision: "),
        ({"seconds": "x"}, "seconds: "),
        ({"next_batch": -7}, "next_batch: "),
        ({"recent_losses": ["x"]}, "recent_losses.0: "),
        ({"best": "x"}, "best: "),
    ],
)
def test_an_impossible_state_is_named_and_the_checkpoint_before_it_used(
    tmp_path, make_recipe, make_job, capsys, values, field
):
    recipe, folder = make_recipe(save_every=2, keep=3), tmp_path / "run"
    figures = run_job(make_job(recipe), folder, recipe)
    (folder / "config.json").unlink()
    newest = folder / "checkpoints" / "step-000006"
    tampered(newest, **values)
    assert run_job(make_job(recipe), folder, recipe, resume=True) == figures
    assert f"damaged checkpoint skipped: {newest}: {STATE}: {field}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[" * 200_000, '{"files": {"config.json": [1]}}', '{"files": {}}'])
def test_an_impossible_manifest_is_damage(tmp_path, make_recipe, make_job, text):
    recipe, folder = make_recipe(), tmp_path / "run"
    run_job(make_job(recipe), folder, recipe)
    (saved,) = (folder / "checkpoints").glob("step-*")
    (saved / MANIFEST).write_text(text)
    assert MANIFEST in check_checkpoint(saved) or "manifest" in check_checkpoint(saved)


@pytest.mark.parametrize("kind", ["shape", "name", "random"])
def test_tensors_that_do_not_fit_are_an_error_that_names_the_folder(tmp_path, make_recipe, make_job, kind):
    recipe, folder = make_recipe(), tmp_path / "run"
    run_job(make_job(recipe), folder, recipe)
    (folder / "config.json").unlink()
    (saved,) = (folder / "checkpoints").glob("step-*")
    tensors = load_file(saved / TENSORS)
    name = next(n for n in tensors if n.startswith("optimizer/exp_avg/") and tensors[n].ndim == 2)
    if kind == "shape":
        tensors[name] = tensors[name][:, :1].contiguous()
    elif kind == "name":
        tensors["optimizer/exp_avg/nosuch"] = tensors.pop(name)
    else:
        del tensors["random/0/python"]
    save_file(tensors, saved / TENSORS)
    tampered(saved)
    with pytest.raises(ModelFolderError, match="step-000006: its training state cannot be restored"):
        run_job(make_job(recipe), folder, recipe, resume=True)
