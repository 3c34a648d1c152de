"""docs/reproducibility.md: what it promises, and that the tests it names are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sentcompress.pipeline import run_job

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reproducibility.md").read_text(encoding="utf-8")


def trained(folder: Path, recipe, make_job) -> dict[str, torch.Tensor]:
    run_job(make_job(recipe), folder, recipe)
    return load_file(folder / "model.safetensors")


def test_the_same_seed_gives_the_same_weights(tmp_path, make_recipe, make_job):
    recipe = make_recipe(steps=3)
    first, second = (trained(tmp_path / name, recipe, make_job) for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = trained(tmp_path / "c", recipe.model_copy(update={"seed": 1}), make_job)
    assert not any(torch.equal(first[name], other[name]) for name in first if first[name].ndim > 1)


def test_background_saves_make_no_difference(tmp_path, make_recipe, make_job):
    weights = [
        trained(
            tmp_path / str(background),
            make_recipe(steps=4, save_every=1, background_saves=background),
            make_job,
        )
        for background in (True, False)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_tests_that_the_page_names_are_there():
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", PAGE)
    assert len(named) >= 3
    assert [name for name in named if f"def {name}(" not in code] == []
    for path in re.findall(r"`((?:tests|tools)/[\w/]+\.py)`", PAGE):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("figure", ["1e-4", "50 steps"])
def test_the_figures_are_those_that_are_tested(figure):
    processes = (ROOT / "tests" / "test_distributed.py").read_text(encoding="utf-8")
    assert figure in PAGE
    assert {"1e-4": "abs=1e-4", "50 steps": "STEPS = 50"}[figure] in processes
