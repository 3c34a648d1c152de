"""The folder of a stage: which runs may continue in it. Locks and replaced runs are tested with the loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sentcompress.errors import InputError
from sentcompress.recipe import Recipe
from sentcompress.training.run_folder import NOT_COMPARED, PRETRAIN, RUN, StageFolder, stage_record


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
