"""A real sweep over a tiny recipe: interrupted and picked up, a run that fails, what is refused, what is written.

Its runs are real, but in this process: starting Python and torch for each would take most of the time.
``test_sweep_processes.py`` has the processes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import IO, Any

import pytest
import yaml

from sentcompress import pipeline as stages
from sentcompress.cli import main
from sentcompress.studies import sweep_runs as runner
from sentcompress.studies.sweep_results import SweepResults, count_parameters

FUSIONS = "fusion={name: mean},{name: attention, options: {latents: 2}}"
CONDITIONING = "vae.conditioning=add,prefix"


class InThisProcess:
    """Stands for a child: runs the command when it is first asked whether it has ended."""

    returncode: int | None = None

    def __init__(self, arguments: list[str], log: IO[bytes]) -> None:
        self.arguments, self.log = arguments, log

    def poll(self) -> int | None:
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            try:
                main(self.arguments)
            except SystemExit as end:
                self.returncode = int(end.code or 0)
        self.log.write(text.getvalue().encode())
        self.log.flush()
        if self.returncode == 130:  # Ctrl-C, which comes to a sweep first
            signal.raise_signal(signal.SIGINT)
        return self.returncode


@pytest.fixture(autouse=True)
def runs(monkeypatch) -> list[str]:
    """Names of the runs that were started."""
    started: list[str] = []

    def start(arguments: list[str], log: IO[bytes]) -> Any:
        started.append(Path(arguments[-1]).name)
        return InThisProcess(arguments, log)

    monkeypatch.setattr(runner, "_start", start)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.0)
    return started


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in ("sweep", *arguments)])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def saved(out: Path) -> SweepResults:
    return SweepResults.model_validate_json((out / "sweep.json").read_text(encoding="utf-8"))


def interrupt_in_the_second_vae(monkeypatch) -> None:
    real, jobs = stages.train, []

    def train(job: Any, *arguments: Any, **keywords: Any) -> dict[str, float]:
        jobs.append(job.stage.name)
        if jobs.count("vae") == 2 and job.stage.name == "vae":
            inner = job.loss

            def loss(model: Any, batch: Any, part: Any) -> Any:
                os.kill(os.getpid(), signal.SIGINT)
                return inner(model, batch, part)

            job.loss = loss
        return real(job, *arguments, **keywords)

    monkeypatch.setattr(stages, "train", train)


@pytest.mark.slow
def test_two_by_two_interrupted_and_picked_up(tmp_path, capsys, monkeypatch, recipe_file, runs):
    out = tmp_path / "out"
    command = (recipe_file, "--grid", FUSIONS, "--grid", CONDITIONING, "--out", out)
    with monkeypatch.context() as patch:
        interrupt_in_the_second_vae(patch)
        code, _, _ = call(capsys, *command)
    assert code == 130
    assert runs == ["fusion-mean_conditioning-add", "fusion-mean_conditioning-prefix"]
    assert [row.state for row in saved(out).cells] == ["done", "waiting", "waiting", "waiting"]
    assert (out / "fusion-mean_conditioning-prefix" / "vae" / "checkpoints" / "step-000001").is_dir()
    assert not (out / "fusion-mean_conditioning-prefix" / "vae" / "config.json").exists()

    runs.clear()
    code, shown, err = call(capsys, *command)
    assert code == 0, err
    assert "sweep: 1 of 4 runs are already done" in err
    assert "[2/4] fusion-mean_conditioning-prefix" in err
    assert "left" in err
    assert runs == [
        "fusion-mean_conditioning-prefix",
        "fusion-attention-latents-2_conditioning-add",
        "fusion-attention-latents-2_conditioning-prefix",
    ]
    log = (out / "fusion-mean_conditioning-prefix" / "log.txt").read_text(encoding="utf-8")
    assert "vae: continuing from " in log
    check_what_was_written(out, shown)

    # Nothing is left to do; a further value adds its runs; a changed benchmark is measured again, not trained.
    runs.clear()
    assert call(capsys, *command)[0] == 0
    assert runs == []
    other = (recipe_file, "--grid", CONDITIONING + ",cross-attention", "--grid", "fusion={name: mean}")
    code, _, err = call(capsys, *other, "--out", out)
    assert code == 0, err
    assert runs == ["fusion-mean_conditioning-cross-attention"]
    code, _, err = call(capsys, *other, "--out", out, "--set", "bench.metrics=[data]")
    assert code == 0, err
    assert len(runs) == 4
    assert "vae: already done" in (out / runs[1] / "log.txt").read_text(encoding="utf-8")


def check_what_was_written(out: Path, shown: str) -> None:
    sweep = saved(out)
    assert (sweep.schema_version, sweep.title) == (1, "tiny")
    assert sweep.axes["vae.conditioning"] == ["add", "prefix"]
    assert all(row.state == "done" for row in sweep.cells)
    scores = [row.figures.bits_per_byte for row in sweep.ranked()]
    assert scores == sorted(scores)
    for row in sweep.cells:
        results = json.loads((out / row.name / "bench" / "results.json").read_text(encoding="utf-8"))
        quality = {score["system"]: score["bits_per_byte"] for score in results["quality"]}
        figures = row.figures
        assert figures.bits_per_byte == quality["sentence model"]
        assert figures.backbone_bits_per_byte == quality["backbone, as it came"]
        assert figures.backbone_ratio == pytest.approx(figures.bits_per_byte / figures.backbone_bits_per_byte)
        assert figures.token_accuracy == results["reconstruction"]["token_accuracy"]
        assert figures.baseline_ratio is None
        assert figures.output_tokens_per_second is None
        trained = [json.loads((out / row.name / s / "run.json").read_text()) for s in ("vae", "graft")]
        assert figures.training_tokens == sum(about["tokens"] for about in trained)
        assert figures.training_seconds == pytest.approx(sum(about["seconds"] for about in trained))
        assert row.honesty.recipe_digest == row.recipe_digest
        assert row.wall_seconds > 0
    page = (out / "sweep.md").read_text(encoding="utf-8")
    header = "| # | fusion | vae.conditioning | tokens per sentence | tokens right |"
    assert header in page
    assert "output tok/s" not in page
    for row in sweep.cells:
        assert f"{row.figures.bits_per_byte:.4f}" in shown
        assert f"| {row.name} | {row.recipe_digest} | {row.honesty.commit} | {row.honesty.device} |" in page
    assert shown.rstrip().endswith(f"sweep: {out / 'sweep.md'}")
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_parameters_are_those_on_disk(tmp_path, recipe_file):
    from safetensors.torch import load_file

    model = Path(yaml.safe_load(recipe_file.read_text())["backbone"]["model"])
    expected = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    assert count_parameters(model) == expected
    assert count_parameters(tmp_path) is None


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capsys, recipe_file, text_files, runs):
    out = tmp_path / "out"
    grid = f"data.options.paths=[{tmp_path / 'nowhere'}],[{text_files}]"
    settings = ("--set", "bench.metrics=[reconstruct]", "--out", out)
    code, shown, err = call(capsys, recipe_file, "--grid", grid, *settings)
    assert code == 1
    assert len(runs) == 2
    failed, done = saved(out).cells
    assert (failed.state, done.state) == ("failed", "done")
    assert "nowhere" in failed.error
    assert "fix:" in failed.error
    assert "1 of 2 runs failed" in err
    assert str(out / failed.name / "log.txt") in err
    assert "failed: " in shown
    assert "failed: " in (out / "sweep.md").read_text(encoding="utf-8")
    # It is tried again, and is done once its cause is gone.
    (tmp_path / "nowhere").symlink_to(text_files)
    runs.clear()
    assert call(capsys, recipe_file, "--grid", grid, *settings)[0] == 0
    assert runs == [failed.name]


def test_a_dry_run_prints_the_runs_and_touches_nothing(tmp_path, capsys, recipe_file, runs):
    out = tmp_path / "out"
    code, shown, _ = call(
        capsys, recipe_file, "--grid", FUSIONS, "--grid", CONDITIONING, "--out", out, "--dry-run"
    )
    assert code == 0
    assert "[4/4] fusion-attention-latents-2_conditioning-prefix" in shown
    assert "    fusion={name: attention, options: {latents: 2}}\n    vae.conditioning=prefix\n" in shown
    # 2 steps of 8 sentences, and 2 of 2 passages of 8 sentences
    assert "tokens: vae 240, graft 480" in shown
    assert "4 runs, at most 2,880 tokens" in shown
    assert not out.exists()
    assert runs == []


@pytest.mark.parametrize(
    ("grid", "code", "message"),
    [
        ("vae.num_heads=4,3", 2, "run num_heads-3: vae.num_heads: 3 does not divide"),
        ("fusion.name=mean,meen", 3, "run fusion-meen: no fusion is called 'meen'"),
        ("backbone.model=/nowhere,/neither", 2, "/nowhere"),
        ("opponents={},{x: {blocks: 9}}", 2, "opponents.x: 9 blocks, but"),
        ("seed", 2, "write FIELD=VALUE,VALUE"),
    ],
)
def test_bad_grids_are_found_before_the_first_run(
    tmp_path, capsys, recipe_file, runs, grid: str, code: int, message: str
):
    out = tmp_path / "out"
    found, _, err = call(capsys, recipe_file, "--grid", grid, "--out", out)
    assert (found, runs) == (code, [])
    assert message in err
    assert not out.exists()


def test_a_folder_with_other_runs_is_refused_whole(tmp_path, capsys, recipe_file, runs):
    out = tmp_path / "out"
    stage = out / "seed-1" / "vae"
    stage.mkdir(parents=True)
    (stage / "run.json").write_text(json.dumps({"stage": "vae", "fields": {"seed": 7}}))
    code, _, err = call(capsys, recipe_file, "--grid", "seed=0,1", "--out", out)
    assert (code, runs) == (2, [])
    assert "run seed-1: " in err
    assert "seed: 7 there, 1 now" in err
    out = tmp_path / "newer"
    out.mkdir()
    (out / "sweep.json").write_text('{"schema_version": 99}')
    code, _, err = call(capsys, recipe_file, "--grid", "seed=0", "--out", out)
    assert (code, runs) == (2, [])
    assert "schema version 99" in err


def test_matplotlib_is_asked_for_at_the_start(tmp_path, capsys, monkeypatch, recipe_file, runs):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = call(capsys, recipe_file, "--grid", "seed=0", "--out", tmp_path / "out")
    assert (code, runs) == (2, [])
    assert "pip install 'sentcompress[bench]'" in err


def test_not_under_torchrun(tmp_path, capsys, monkeypatch, recipe_file, runs):
    for name, value in (
        ("WORLD_SIZE", "2"),
        ("RANK", "0"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "29511"),
    ):
        monkeypatch.setenv(name, value)
    code, _, err = call(capsys, recipe_file, "--grid", "seed=0", "--out", tmp_path / "out")
    assert (code, runs) == (2, [])
    assert "without torchrun" in err
