"""Real processes: how many there are makes no difference, and may change when a run goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sentcompress.training.progress import read_metrics

STEPS = 6


@pytest.fixture
def run(tmp_path, cache, make_recipe):
    """``run(out, processes)``: six micro-batches a step, whoever computes them."""

    def run(out: Path, processes: int, *options: str) -> subprocess.CompletedProcess[str]:
        plain = make_recipe().pretrain.config | {"dropout": 0.0}
        recipe = make_recipe(
            steps=STEPS, gradient_accumulation=6 // processes, config=plain, save_every=2, keep=9, ema=None
        )
        path = tmp_path / f"recipe-{processes}.yaml"
        path.write_text(recipe.dump())
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        program = ["-m", "sentcompress", "run", str(path), "--out", str(out), *options]
        return subprocess.run(
            [sys.executable, *(launcher if processes > 1 else []), *program],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1", "SENTCOMPRESS_CACHE": str(cache)},
            check=False,
        )

    return run


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "pretrain" / "metrics.jsonl") if "loss" in line]


def back_to(step: int, out: Path) -> None:
    """What a run that was killed after this step's checkpoint leaves."""
    stage = out / "pretrain"
    for path in (stage / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    (stage / "config.json").unlink()


def test_two_processes_go_on_as_one_and_one_as_three(tmp_path, run):
    one, many = tmp_path / "one", tmp_path / "many"
    done = run(one, 1)
    assert done.returncode == 0, done.stderr
    expected = losses(one)
    assert len(expected) == STEPS

    for processes, step in ((2, 2), (1, 4), (3, STEPS)):
        done = run(many, processes, *(["--resume"] if processes != 2 else []))
        assert done.returncode == 0, done.stderr
        assert losses(many) == pytest.approx(expected, abs=1e-4)
        if step < STEPS:
            back_to(step, many)
    results = [load_file(out / "pretrain" / "model.safetensors") for out in (one, many)]
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)

    back_to(4, many)
    refused = subprocess.run(
        [
            sys.executable,
            "-m",
            "sentcompress",
            "run",
            str(tmp_path / "recipe-3.yaml"),
            "--out",
            str(many),
            "--resume",
        ],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert refused.returncode == 2
    assert "pretrain.micro_batches_a_step: 6 there, 2 now" in refused.stderr
