"""Several processes: their environment, that their number makes no difference, and ``sentcompress launch``."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from sentcompress.cli import app
from sentcompress.distributed import check_environment
from sentcompress.errors import InputError
from sentcompress.training.checkpoints import SHARDS
from sentcompress.training.monitor import read_metrics
from sentcompress.training.sharding import read_shards

STEPS = 50
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "SENTCOMPRESS_CACHE": str(cache)}


def call(*words: str, cache: Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """``sentcompress WORDS`` to its end, in processes of one thread."""
    return subprocess.run(
        [sys.executable, *launcher, "-m", "sentcompress", *words],
        capture_output=True,
        text=True,
        timeout=400,
        env=environment(cache),
        check=False,
    )


@pytest.fixture
def run(tmp_path, cache, make_recipe):
    """``run(out, processes, distributed)``: six micro-batches a step, whoever computes them."""

    def run(
        out: Path, processes: int, distributed: str = "ddp", *options: str
    ) -> subprocess.CompletedProcess[str]:
        plain = make_recipe().pretrain.config | {"dropout": 0.0}
        recipe = make_recipe(
            steps=STEPS,
            gradient_accumulation=6 // processes,
            config=plain,
            save_every=20,
            keep=9,
            distributed=distributed,
        )
        path = tmp_path / f"recipe-{processes}.yaml"
        path.write_text(recipe.dump())
        # Ours starts two, torchrun three.
        ours = ["launch", "-n", "2"] if processes == 2 else []
        theirs = (*TORCHRUN, "3") if processes == 3 else ()
        return call(*ours, "run", str(path), "--out", str(out), *options, cache=cache, launcher=theirs)

    return run


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "pretrain" / "metrics.jsonl") if "loss" in line]


def back_to(step: int, out: Path) -> None:
    """Leave what a run that was killed after this step's checkpoint would leave."""
    stage = out / "pretrain"
    for path in (stage / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    (stage / "config.json").unlink(missing_ok=True)


@pytest.fixture
def alone(tmp_path, run):
    """What one process does."""
    done = run(tmp_path / "one", 1)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "one")) == STEPS
    return tmp_path / "one"


def assert_same(out: Path, alone: Path) -> None:
    """The same losses, the same files, the same weights as one process gives."""
    assert losses(out) == pytest.approx(losses(alone), abs=1e-4)
    files = [sorted(path.name for path in (folder / "pretrain").iterdir()) for folder in (out, alone)]
    assert files[0] == files[1]
    results = [load_file(folder / "pretrain" / "model.safetensors") for folder in (alone, out)]
    assert results[0].keys() == results[1].keys()
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    configs = [json.loads((folder / "pretrain" / "config.json").read_text()) for folder in (alone, out)]
    assert configs[0] == configs[1]


def legs(run, out: Path, alone: Path, distributed: str, plan: list[tuple[int, int]]) -> Iterator[int]:
    """Run in some number of processes up to a step, in another from there: each gives the result of one process.

    Yields the number of processes, before what lies after the step is taken away.
    """
    for number, (processes, step) in enumerate(plan):
        done = run(out, processes, distributed, *(["--resume"] if number else []))
        assert done.returncode == 0, done.stderr
        assert_same(out, alone)
        yield processes
        if step < STEPS:
            back_to(step, out)


@pytest.mark.slow
def test_processes_and_their_number_make_no_difference(tmp_path, cache, run, alone):
    """Two whole copies to step 20, one process to step 40, three from there."""
    many = tmp_path / "many"
    assert list(legs(run, many, alone, "ddp", [(2, 20), (1, 40), (3, STEPS)])) == [2, 1, 3]

    back_to(40, many)
    refused = call("run", str(tmp_path / "recipe-3.yaml"), "--out", str(many), "--resume", cache=cache)
    assert refused.returncode == 2
    assert "pretrain.micro_batches_a_step: 6 there, 2 now" in refused.stderr
    assert (
        "processes (launch -n) and pretrain.gradient_accumulation so that their product is 6"
        in refused.stderr
    )


@pytest.mark.slow
def test_a_sharded_run_is_the_same_and_any_number_of_processes_continues_it(tmp_path, run, alone):
    """Weights cut in three to step 20, in two to step 40, in one process from there."""
    parts = tmp_path / "parts"
    for processes in legs(run, parts, alone, "fsdp", [(3, 20), (2, 40), (1, STEPS)]):
        saved = parts / "pretrain" / "checkpoints" / f"step-{STEPS:06d}"
        assert (saved / SHARDS).is_dir() == (processes > 1)
        if processes > 1:
            held = [path.stat().st_size for path in (saved / SHARDS).iterdir()]
            assert len(held) == processes
            assert max(held) < 2 * min(held)
            state = read_shards(saved / SHARDS, {})
            random = {name.split("/")[1] for name in state if name.startswith("random/")}
            assert random == set(map(str, range(processes)))  # dropout goes on in each

    # Two processes that shard the model continue a run of one.
    back_to(40, alone)
    done = run(alone, 2, "fsdp", "--resume")
    assert done.returncode == 0, done.stderr
    assert_same(alone, parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("distributed", "fusion", "precision"),
    [("ddp", "mean", "fp32"), ("fsdp", "attention", "fp32"), ("fsdp", "sum-norm", "bf16")],
)
def test_all_trainings_are_the_same_in_two_processes(tmp_path, cache, distributed, fusion, precision):
    """SentenceVAE, graft (with adapters) and baseline: the same steps and figures as in one process.

    Each step is that of one large batch (``tests/training/test_accumulation.py``), though processes and micro-batches
    have different numbers of tokens.
    """
    figures, steps = [], []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        launcher = ["launch", "-n", "2"] if processes == 2 else []
        chosen = [
            f"{section}.{choice}"
            for section in ("train_vae", "graft")
            for choice in (
                f"distributed={distributed}",
                "steps=4",
                "log_every=1",
                f"gradient_accumulation={4 // processes}",
                "ema=0.9",
                f"precision={precision}",
            )
        ]
        chosen += [
            "data.options.max_documents=8",
            "data.options.heldout_documents=2",
            f"fusion.name={fusion}",
            f"fusion.options={'{latents: 4}' if fusion == 'attention' else '{}'}",
            f"vae.conditioning={'prefix' if fusion == 'attention' else 'cross-attention'}",
            "vae.dropout=0",
            f"graft.tune={'lora' if distributed == 'fsdp' else 'full'}",
            "graft.shortlist_rank=4",
            "bench.metrics=[data]",
        ]
        sets = [part for choice in chosen for part in ("--set", choice)]
        done = call(*launcher, "run", "quickstart", "--out", str(out), *sets, cache=cache)
        assert done.returncode == 0, done.stderr
        runs = [json.loads((out / stage / "run.json").read_text()) for stage in ("vae", "graft", "baseline")]
        figures.append([value for about in runs for value in about["figures"].values()])
        steps.append(
            [
                line[name]
                for stage in ("vae", "graft", "baseline")
                for line in read_metrics(out / stage / "metrics.jsonl")
                for name in ("loss", "grad_norm", "nats_per_token", "shortlist_nats_per_token", "tokens")
                if name in line
            ]
        )
    close = 1e-3 if precision == "fp32" else 0.02
    assert figures[1] == pytest.approx(figures[0], rel=close)
    assert steps[1] == pytest.approx(steps[0], rel=close)
    if precision == "fp32":
        assert_scored_alike(tmp_path / "1", cache)
        assert_timed_together(tmp_path / "1", cache)


def assert_scored_alike(run: Path, cache: Path) -> None:
    """``bench quality`` in two processes: every document once, the same figures to the last digits."""
    scores = []
    for name, launcher in (("alone", []), ("shared", ["launch", "-n", "2"])):
        words = [*launcher, "bench", "quality", str(run), "--out", str(run / name), "--by", "length"]
        done = call(*words, cache=cache)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("report:") == 1
        scores.append(json.loads((run / name / "results.json").read_text())["quality"])
    for alone, shared in zip(*scores, strict=True):
        assert shared["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-9)
        assert shared["bytes"] == alone["bytes"]
        assert [d["document"] for d in shared["documents"]] == [d["document"] for d in alone["documents"]]
        assert shared["by"].keys() == alone["by"].keys() == {"length"}


def assert_timed_together(run: Path, cache: Path) -> None:
    """``bench speed`` in two processes: what both write at once, beside the first alone."""
    short = ["prompt_tokens=20", "new_tokens=8", "repeats=1", "break_even=false", "batch_sizes=[1,2]"]
    sets = [word for setting in short for word in ("--set", f"bench.{setting}")]
    done = call(
        "launch", "-n", "2", "bench", "speed", str(run), *sets, "--out", str(run / "fast"), cache=cache
    )
    assert done.returncode == 0, done.stderr
    assert (
        "Tokens/s by number of processes, prefill included, sentence model, batch 2 each: 1: " in done.stdout
    )
    found = json.loads((run / "fast" / "results.json").read_text())["speed"]["throughput"]
    assert [(one["processes"], one["efficiency"] > 0) for one in found] == [(1, True), (2, True)] * 2
    assert found[0]["efficiency"] == 1
    refused = call(
        *("launch", "-n", "2", "bench", "speed", str(run), "--set", "bench.device_map=auto"), cache=cache
    )
    assert refused.returncode == 2
    assert "with several processes, each has its own device" in refused.stderr


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
        preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL),  # tests under nohup ignore it
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


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="the system does not tell a process's children"
)
class TestLaunch:
    @pytest.mark.parametrize(
        "number", [signal.SIGTERM, signal.SIGHUP]
    )  # a cluster's, and of a closed terminal
    def test_after_a_signal_it_saves_and_exits_with_75(self, tmp_path, launched, number):
        launcher, children = launched
        launcher.send_signal(number)
        _, shown = launcher.communicate(timeout=60)
        assert launcher.returncode == 75, shown
        assert list((tmp_path / "out" / "pretrain" / "checkpoints").iterdir())
        assert " launch -n 2 run " in shown.partition("continue with: ")[2]
        assert not any(Path(f"/proc/{pid}").exists() for pid in children)

    def test_if_the_launcher_is_killed_its_processes_save_and_exit(self, tmp_path, launched):
        launcher, children = launched
        launcher.kill()
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in children):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert list((tmp_path / "out" / "pretrain" / "checkpoints").iterdir())

    @pytest.mark.parametrize("rank", [0, 1])
    def test_if_a_process_dies_the_others_are_stopped(self, launched, rank):
        launcher, children = launched
        began = time.monotonic()
        os.kill(children[rank], signal.SIGKILL)
        _, shown = launcher.communicate(timeout=60)
        assert launcher.returncode == 1
        assert time.monotonic() - began < 30
        assert f"process {rank} was killed (SIGKILL)" in shown
        assert not any(Path(f"/proc/{pid}").exists() for pid in children)


GLOO_STILL_BUSY = """
import atexit, ctypes, os, time
late = os.environ["RANK"] == "1"
if late:  # registered first, so called last: it holds the interpreter's lock until it returns
    atexit.register(ctypes.PyDLL(None).usleep, 2_000_000)
import torch
from sentcompress.cli import main
torch.distributed.init_process_group("gloo")
torch.distributed.barrier()
if not late:
    time.sleep(1)
torch.distributed.all_reduce(torch.ones(1000), async_op=late)
main(["--version"])
"""


@pytest.mark.slow
def test_a_process_ends_well_while_a_thread_of_gloo_still_works(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(GLOO_STILL_BUSY)
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "2", str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(tmp_path),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sentcompress ") == 2


def test_bad_input_is_reported_once_with_its_exit_code(tmp_path):
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
def test_not_every_command_runs_in_several_processes(command):
    done = CliRunner().invoke(app, ["launch", "-n", "2", *command])
    assert isinstance(done.exception, InputError)
    assert "use one of run, train-vae" in done.exception.fix


RIGHT = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_the_variables_that_torchrun_sets_pass(monkeypatch):
    for name, value in RIGHT.items():
        monkeypatch.setenv(name, value)
    check_environment()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WORLD_SIZE", "abc", "WORLD_SIZE is 'abc', not a number"),
        ("WORLD_SIZE", "0", "WORLD_SIZE is 0"),
        ("RANK", "5", "RANK is 5 but WORLD_SIZE is 2"),
        ("MASTER_PORT", "x", "MASTER_PORT is 'x', not a number"),
        ("MASTER_ADDR", "", "MASTER_ADDR is not set"),
    ],
)
def test_wrong_variables_are_named(monkeypatch, name, value, message):
    for known, right in RIGHT.items():
        monkeypatch.setenv(known, right)
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message) as refused:
        check_environment()
    assert "sentcompress launch or torchrun" in refused.value.fix
