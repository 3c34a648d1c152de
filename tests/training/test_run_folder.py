"""The folder of a stage: who may write there, which runs may continue in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sentcompress.errors import InputError
from sentcompress.pipeline import run_job, run_recipe
from sentcompress.recipe import Recipe
from sentcompress.training.run_folder import NOT_COMPARED, PRETRAIN, RUN, StageFolder, stage_record


def holder(stage: Path) -> subprocess.Popen[str]:
    """A process that holds the lock of a stage's folder, and prints a line then."""
    code = (
        "import sys, time, pathlib\n"
        "from sentcompress.training.run_folder import PRETRAIN, StageFolder\n"
        f"with StageFolder(pathlib.Path({str(stage)!r}), PRETRAIN, {{}}).locked():\n"
        "    print('held', flush=True); time.sleep(600)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def folder_of(path: Path, recipe: Recipe, **changes: object) -> StageFolder:
    """A folder with the ``run.json`` of a recipe, some of its fields changed."""
    record = stage_record(PRETRAIN, recipe, {})
    path.mkdir(exist_ok=True)
    fields = record | {f"pretrain.{name}": value for name, value in changes.items()}
    (path / RUN).write_text(json.dumps({"stage": "pretrain", "fields": fields}))
    return StageFolder(path, PRETRAIN, record)


def test_settings_that_do_not_affect_the_weights_are_not_recorded(make_recipe):
    record = stage_record(PRETRAIN, make_recipe(on_anomaly="skip", spike=2.0), {"corpus": "1"})
    assert not {f"pretrain.{name}" for name in NOT_COMPARED} & record.keys()
    assert "pretrain.on_anomaly" not in record
    assert record["inputs.corpus"] == "1"
    assert record["pretrain.micro_batches_a_step"] == 2


@pytest.mark.parametrize("name", ["on_trouble", "spike"])
def test_a_record_that_has_them_still_resumes(tmp_path, make_recipe, name):
    """Older versions may have written them, by their old names."""
    folder_of(tmp_path, make_recipe(), **{name: "skip"}).check(resume=True, overwrite=False)


def test_other_fields_are_compared(tmp_path, make_recipe):
    with pytest.raises(InputError, match=r"pretrain\.steps: 9 there, 6 now"):
        folder_of(tmp_path, make_recipe(), steps=9).check(resume=True, overwrite=False)


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


def test_a_refused_run_changes_nothing(tmp_path, make_recipe):
    first, second, out = make_recipe(), make_recipe(steps=9), tmp_path / "out"
    run_recipe(first, out)
    before = (out / "recipe.yaml").read_text()
    with holder(out / "pretrain") as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another run is writing here"):
            run_recipe(second, out, overwrite=True)
        process.kill()
    assert (out / "recipe.yaml").read_text() == before
