"""``sentcompress watch``: what it says of runs that go on, are done, failed, or fell silent."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sentcompress.cli.app import main
from sentcompress.training.watch import curve, find_stages, view


def make_stage(folder: Path, *lines: dict, done: bool = False, **heartbeat: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 99, "lo')  # cut by a kill
    if heartbeat:
        facts = {"pid": 1, "host": "here", "time": time.time(), "steps": 100, **heartbeat}
        (folder / "heartbeat.json").write_text(json.dumps(facts))
    if done:
        (folder / "config.json").write_text("{}")
    return folder


def line(step: int, **figures: object) -> dict:
    return {
        "step": step,
        "loss": 9 - step / 10,
        "tokens_per_second": 1234.5,
        "seconds": 3.0 * step,
        **figures,
    }


@pytest.fixture
def runs(tmp_path):
    root = tmp_path / "runs"
    evaluated = {"step": 20, "eval": {"bits_per_token": 7.25, "other": 1}}
    make_stage(root / "a/graft", line(10), line(20), evaluated, state="training", step=25)
    make_stage(root / "b/vae", line(10), done=True)
    event = {"step": 11, "event": "step 11: loss nan at batch 3"}
    make_stage(root / "c", line(10), event, state="failed", step=12, error="out of \x1b[31mmemory")
    make_stage(root / "d", line(10), state="training", step=12, time=time.time() - 4000)
    return root


def test_a_running_stage_says_how_long_it_will_take(runs):
    found = view(runs / "a/graft", runs)
    assert (found.name, found.state, found.step, found.steps) == ("a/graft", "training", 25, 100)
    assert found.losses == [8.0, 7.0]
    assert found.heldout == ("bits_per_token", 7.25)
    assert found.seconds_left == pytest.approx(3 * 75)
    assert 0 <= found.age < 60


def test_states(runs):
    states = {stage.name: view(stage, runs).state for stage in find_stages(runs)}
    assert states == {"graft": "training", "vae": "done", "c": "failed", "d": "lost"}
    make_stage(runs / "e", line(1), state="training", step=2, time=time.time() + 4000)
    assert view(runs / "e", runs).age == 0  # another machine's clock
    make_stage(runs / "f", {"step": 1, "loss": 10**400}, state="training", step=2, time=float("nan"))
    assert (view(runs / "f", runs).state, view(runs / "f", runs).losses) == ("unknown", [])


def test_the_table(runs, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["watch", str(runs)])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "25/100 25%" in out
    assert "3:45" in out
    assert "bits_per_token 7.25" in out
    assert "out of \\x1b[31mmemory" in out
    assert "\x1b" not in out


def test_json_is_for_programs(runs, capsys):
    with pytest.raises(SystemExit):
        main(["watch", str(runs / "c"), "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["name"], found["error"], found["step"]) == ("c", "out of \x1b[31mmemory", 12)


@pytest.mark.parametrize("broken", ['{"step": "x"}\n[1]\nnull\n', '{"step": 1, "loss": null}\n', "\x00\xff"])
def test_broken_files_count_as_not_there(tmp_path, broken):
    stage = make_stage(tmp_path / "run", state="training", step=3)
    (stage / "metrics.jsonl").write_bytes(broken.encode("latin-1"))
    (stage / "heartbeat.json").write_text('{"time": "now", "steps": []}')
    assert view(stage, tmp_path).state == "unknown"


def test_a_folder_without_runs_is_said_to_be_one(tmp_path, capsys):
    for folder, said in (
        (tmp_path, "no run has written here yet"),
        (tmp_path / "x", "there is no such folder"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["watch", str(folder)])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def test_curves():
    assert curve([], 8) == ""
    assert curve([3.0, 3.0], 8) == "▁▁"
    assert curve([8, 7, 6, 5, 4, 3, 2, 1], 8) == "█▇▆▅▄▃▂▁"
    assert len(curve(list(range(1000)), 20)) == 20


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_on_a_terminal_it_goes_on_until_ctrl_c(runs):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "sentcompress", "watch", str(runs), "--interval", "0.2"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    shown = b""
    deadline = time.monotonic() + 120
    try:
        while b"grown" not in shown and time.monotonic() < deadline:
            if select.select([ours], [], [], 1)[0]:
                shown += os.read(ours, 65536)
            if b"a/graft" in shown and not (runs / "grown").exists():
                make_stage(runs / "grown", line(10))
        assert b"grown" in shown
        process.send_signal(signal.SIGINT)  # what a terminal makes of Ctrl-C
        while process.poll() is None and time.monotonic() < deadline:
            if select.select([ours], [], [], 0.1)[0]:
                os.read(ours, 65536)  # a full terminal would hold it up
        assert process.returncode == 0
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)
