"""Real processes: how many there are makes no difference, and may change when a run goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from sentcompress.cli import app
from sentcompress.errors import InputError
from sentcompress.training.progress import read_metrics

STEPS = 6
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "SENTCOMPRESS_CACHE": str(cache)}


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
        # Ours starts two, torchrun three.
        launcher = {
            1: ["-m", "sentcompress"],
            2: ["-m", "sentcompress", "launch", "-n", "2"],
            3: [*TORCHRUN, "3", "-m", "sentcompress"],
        }
        return subprocess.run(
            [sys.executable, *launcher[processes], "run", str(path), "--out", str(out), *options],
            capture_output=True,
            text=True,
            timeout=300,
            env=environment(cache),
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


@pytest.fixture
def launched(tmp_path, cache, make_recipe):
    """Two processes of a long run, after their first step: the launcher and the ids of its processes."""
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(make_recipe(steps=10_000, log_every=1).dump())
    with subprocess.Popen(
        [sys.executable, "-m", "sentcompress", "launch", "-n", "2", "run", str(path), "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(cache),
    ) as launcher:
        metrics = out / "pretrain" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and losses(out)):
            assert launcher.poll() is None, launcher.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        yield launcher, [int(pid) for pid in children]
        launcher.kill()


@pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="the system does not tell a process's children"
)
class TestLaunch:
    def test_sigterm_saves_and_ends_with_the_code_to_start_again(self, tmp_path, launched):
        launcher, _ = launched
        launcher.send_signal(signal.SIGTERM)
        _, said = launcher.communicate(timeout=60)
        assert launcher.returncode == 75, said
        assert list((tmp_path / "out" / "pretrain" / "checkpoints").iterdir())

    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_process_that_dies_takes_the_others_with_it(self, launched, rank):
        launcher, children = launched
        began = time.monotonic()
        os.kill(children[rank], signal.SIGKILL)
        _, said = launcher.communicate(timeout=60)
        assert launcher.returncode == 1
        assert time.monotonic() - began < 30
        assert f"process {rank} was killed (SIGKILL)" in said
        assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_bad_input_is_said_once_and_with_its_code(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sentcompress", "launch", "-n", "3", "run", "strong", "--set", "graft.stps=3"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "stps" in done.stderr


@pytest.mark.parametrize("command", [["bench", "all"], []])
def test_only_training_runs_in_several_processes(command):
    done = CliRunner().invoke(app, ["launch", "-n", "2", *command])
    assert isinstance(done.exception, InputError)
    assert "name one of run, train-vae" in done.exception.fix
