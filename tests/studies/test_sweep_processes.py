"""The process of a run: its log, its signals, its end. Small scripts stand for ``sentcompress`` here."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from sentcompress.errors import RunError
from sentcompress.studies import sweep_runs as runner
from sentcompress.studies.grid import Axis, GridPoint, build_grid
from sentcompress.studies.sweep_results import SweepResults

AXES = [Axis("seed", ("0", "1"))]


@pytest.fixture
def points(recipe_file) -> list[GridPoint]:
    return build_grid(str(recipe_file), [], AXES)


def script(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, "-c", code))
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)


def sweep(points: list[GridPoint], out: Path) -> SweepResults:
    return runner.run_sweep("tiny", AXES, points, out)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("print('error: a\\nerror: this\\n  fix: that'); raise SystemExit(2)", "this\n  fix: that"),
        ("raise SystemExit(7)", "ended with code 7 and no message"),
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9: out of memory?"),
        ("", "no results.json at"),
    ],
)
def test_how_a_run_can_fail(tmp_path, monkeypatch, points, code: str, error: str):
    script(monkeypatch, code)
    rows = sweep(points, tmp_path).cells
    assert [row.state for row in rows] == ["failed", "failed"]
    assert rows[1].error.startswith(error)


def test_an_old_error_in_the_log_is_not_taken_for_a_new_one(tmp_path, monkeypatch, points):
    script(monkeypatch, "print('error: old'); raise SystemExit(2)")
    assert sweep(points, tmp_path).cells[0].error == "old"
    script(monkeypatch, "raise SystemExit(3)")
    assert "code 3" in sweep(points, tmp_path).cells[0].error
    assert (tmp_path / "seed-0" / "log.txt").read_text() == "error: old\n"


WAITS = """
import signal, sys, time
def stop(*_):
    print("stopping", flush=True)
    time.sleep(0.3)  # a second signal would end it here
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
print("ready", flush=True)
time.sleep(60)
"""


def in_a_moment(log: Path, act: object) -> None:
    """Call ``act`` once the child has said that it is ready."""

    def wait() -> None:
        while not log.is_file() or b"ready" not in log.read_bytes():
            time.sleep(0.01)
        act()  # type: ignore[operator]

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_lets_the_run_save(tmp_path, monkeypatch, capfd, points, number: int):
    script(monkeypatch, WAITS)
    log = tmp_path / "seed-0" / "log.txt"
    in_a_moment(log, lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt):
        sweep(points, tmp_path)
    assert log.read_text() == "ready\nstopping\nsaved\n"
    assert "stopping after the run has saved a checkpoint" in capfd.readouterr().err
    assert not (tmp_path / "seed-1").exists()
    written = SweepResults.model_validate_json((tmp_path / "sweep.json").read_text())
    assert [row.state for row in written.cells] == ["waiting", "waiting"]


def test_what_a_run_prints_is_shown_as_it_is(tmp_path):
    log, screen = tmp_path / "log.txt", io.StringIO()
    log.write_text("first\nvae: [/bold] step 1\n\n")
    with runner._Live(Console(file=screen, force_terminal=True, width=60), "[1/2] seed-0", log) as live:
        live.update()
    assert "[1/2] seed-0  vae: [/bold] step 1" in screen.getvalue()
    plain = io.StringIO()
    with runner._Live(Console(file=plain, markup=False, width=60), "[1/2] seed-0", log) as live:
        live.update()
        assert plain.getvalue() == ""
        live._shown -= runner.LINE_SECONDS
        live.update()
    assert plain.getvalue() == "  vae: [/bold] step 1\n"


def test_two_sweeps_do_not_share_a_run(tmp_path, monkeypatch, points):
    script(monkeypatch, "")
    folder = tmp_path / "seed-0"
    folder.mkdir()
    with open(folder / "log.txt", "a+b") as log:
        runner._lock(log, folder)
        # What holds it is the run's process, even when the sweep that started it is gone.
        orphan = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=log)
    with pytest.raises(RunError, match="another process is working on"):
        sweep(points, tmp_path)
    orphan.communicate(b"\n")
    assert sweep(points, tmp_path).cells[0].state == "failed"


@pytest.mark.slow
def test_a_run_of_a_sweep_is_an_ordinary_one(tmp_path, recipe_file):
    """The one test here with the real program; its data are not there, so that it ends soon."""
    points = build_grid(str(recipe_file), [f"data.options.paths=[{tmp_path / 'nowhere'}]"], AXES[:1])
    row = sweep(points[:1], tmp_path / "out").cells[0]
    assert row.state == "failed"
    assert "nowhere" in row.error
    recipe = tmp_path / "out" / "seed-0" / "recipe.yaml"
    assert recipe.read_text(encoding="utf-8") == points[0].recipe.dump()
