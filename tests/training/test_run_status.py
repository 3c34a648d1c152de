"""``sentcompress watch``: what it shows of runs that are in progress, done, failed or lost."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from sentcompress.cli.app import main
from sentcompress.training import run_status as watch
from sentcompress.training.monitor import read_metrics
from sentcompress.training.run_status import StageReader, StageView, Watcher, curve, find_stages

TERMINAL = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
DEEP = "[" * 200_000


def view(stage: Path, root: Path) -> StageView:
    """A single look."""
    return StageReader(stage, root).look()


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


def append(stage: Path, *lines: dict) -> None:
    with open(stage / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


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


def test_a_running_stage_shows_its_time_left(runs):
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
def test_broken_files_are_ignored(tmp_path, broken):
    stage = make_stage(tmp_path / "run", state="training", step=3)
    (stage / "metrics.jsonl").write_bytes(broken.encode("latin-1"))
    (stage / "heartbeat.json").write_text('{"time": "now", "steps": []}')
    assert view(stage, tmp_path).state == "unknown"


def test_a_folder_without_runs_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["watch", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out) == []
    for folder, message in (
        (tmp_path, "no runs here yet"),
        (tmp_path / "x", "no such folder"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["watch", str(folder)])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_curves():
    assert curve([], 8) == ""
    assert curve([3.0, 3.0], 8) == "▁▁"
    assert curve([8, 7, 6, 5, 4, 3, 2, 1], 8) == "█▇▆▅▄▃▂▁"
    assert curve([0.0, 5e-324], 8) == "▁█"
    assert len(curve(list(range(1000)), 20)) == 20


class Terminal:
    """``sentcompress watch`` on a terminal of its own."""

    def __init__(self, *arguments: object, columns: int = 200) -> None:
        self.shown = ""
        self._deadline = time.monotonic() + 120
        self._ours, self._theirs = pty.openpty()
        command = [sys.executable, "-m", "sentcompress", "watch", *map(str, arguments)]
        size = {"COLUMNS": str(columns), "LINES": "50"}
        environment = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8", **size}
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), self._theirs)
        self.process = subprocess.Popen(command, env=environment, **streams)

    def _read(self) -> bool:
        if not select.select([self._ours], [], [], 0.1)[0]:
            return False
        text = os.read(self._ours, 65536).decode("utf-8", "replace")
        self.shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")
        return True

    def wait_for(self, text: str) -> None:
        while text not in self.shown and time.monotonic() < self._deadline and self.process.poll() is None:
            self._read()
        assert text in self.shown

    def end(self) -> int | None:
        """Its exit code."""
        while self.process.poll() is None and time.monotonic() < self._deadline:
            self._read()  # a full terminal would hold it up
        while self._read():
            pass
        return self.process.returncode

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)


@TERMINAL
def test_on_a_terminal_it_runs_until_ctrl_c(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    with Terminal(runs, "--interval", "0.2") as terminal:
        terminal.wait_for("no runs here yet")
        make_stage(runs / "a/graft", line(10), state="training", step=11)
        terminal.wait_for("a/graft")
        make_stage(runs / "grown", line(10))
        terminal.wait_for("grown")
        shutil.rmtree(runs)
        terminal.wait_for("the folder is gone")
        terminal.process.send_signal(signal.SIGINT)  # what a terminal makes of Ctrl-C
        assert terminal.end() == 0


LONG = "experiments/2026-11-28-opt-350m-with-four-latents-and-a-decoder-that-sees-the-text/seed-1"


@TERMINAL
@pytest.mark.parametrize("columns", [80, 200])
def test_what_matters_is_readable_at_any_width(tmp_path, columns):
    error = "CUDA out of memory: tried to allocate 2.00 GiB, lower graft.passages_per_batch or max_sentences"
    evaluated = {"step": 10, "eval": {"bits_per_token": 7.25}}
    make_stage(tmp_path / "short", line(10), evaluated, state="evaluating", step=12_345, steps=100_000)
    make_stage(tmp_path / LONG, line(10), state="failed", step=98_765, steps=100_000, error=error)
    with Terminal(tmp_path, "--once", columns=columns) as terminal:
        assert terminal.end() == 0
        lines = terminal.shown.splitlines()
    assert max(map(len, lines)) <= columns
    for cell in ("12,345/100,000 12%", "98,765/100,000 99%", "evaluating", "failed", "8.0000", "short"):
        assert any(cell in text for text in lines), cell
    assert "…" not in terminal.shown
    first = lines[0].index("state")  # a long name is folded in the first column
    assert LONG in "".join(text[:first].strip() for text in lines)
    assert ("last seen" in lines[0]) is (columns == 200)
    below = next((i for i, text in enumerate(lines) if not text.strip()), len(lines))
    last = lines[0].index("error") if "error" in lines[0] else 0
    texts = lines if last else lines[below:]
    assert error in " ".join(" ".join(text[last:] for text in texts).split())


def test_a_terminal_without_unicode(tmp_path):
    make_stage(tmp_path / "modèle", *(line(i) for i in range(1, 9)), state="training", step=9, error="für")
    for encoding in ("ascii", "cp1252"):
        ended = subprocess.run(
            [sys.executable, "-m", "sentcompress", "watch", str(tmp_path)],
            env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
            capture_output=True,
        )
        assert ended.returncode == 0, ended.stderr
        shown = ended.stdout.decode(encoding)
        assert "@#*+=-:." in shown
        assert ("mod\\xe8le" if encoding == "ascii" else "modèle") in shown


ABSURD = [
    line(1, seconds=1e308) | {"step": 10**400},
    line(1, loss=1.7e308),
    line(2, loss=-1.7e308),
    *(line(i, loss=1.7e308) for i in range(3, 63)),
    {"step": 70, "loss": [1], "event": ["x"], "eval": {"a": "b"}},
    {"step": True, "loss": 1.0},
]


def broken_metrics(path: Path, how: str) -> None:
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "absurd":
        append(path.parent, *ABSURD)
    else:
        text = {"deep": DEEP, "long": '{"step": 1, "loss": 2.0, "x": "' + "x" * (1 << 21) + '"}'}[how]
        path.write_text(text + "\n")


@pytest.mark.parametrize("how", ["deep", "long", "absurd", "folder", "pipe"])
@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_broken_metrics_hide_nothing_else(runs, capsys, how, arguments):
    stage = make_stage(runs / "e", line(1), state="training", step=25)
    broken_metrics(stage / "metrics.jsonl", how)
    with pytest.raises(SystemExit) as ended:
        main(["watch", str(runs), *arguments])
    assert ended.value.code == 0
    assert "a/graft" in capsys.readouterr().out
    found = view(stage, runs)
    assert (found.state, found.step, found.losses, found.error) == ("training", 25, [], "")


def test_a_whole_line_after_a_broken_one_counts(tmp_path):
    stage = make_stage(tmp_path / "run", line(1))
    whole = json.dumps(line(2)) + "\n"
    (stage / "metrics.jsonl").write_text(f"{DEEP}\n{whole}{'x' * (3 << 20)}\n\x00\n{whole}")
    assert view(stage, tmp_path).losses == [line(2)["loss"]] * 2
    assert read_metrics(stage / "metrics.jsonl") == [line(2)] * 2


@pytest.mark.parametrize(
    "facts",
    [
        DEEP,
        '{"time": -1e308, "state": "training"}',
        '{"time": 1e308, "state": "training"}',
        '{"time": 1e12, "state": "training"}',
        '{"time": NaN}',
        '{"time": 1' + "0" * 400 + "}",
        " " * (2 << 20) + "{}",
        "[1]",
    ],
)
def test_a_broken_heartbeat_is_ignored(runs, capsys, facts):
    (runs / "c/heartbeat.json").write_text(facts)
    found = view(runs / "c", runs)
    assert (found.state, found.age, found.step, found.losses) == ("unknown", None, 10, [8.0])
    for arguments in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            main(["watch", str(runs), *arguments])
        assert ended.value.code == 0
        assert "a/graft" in capsys.readouterr().out


def test_absurd_values_count_as_unknown(tmp_path):
    timed = (line(1, seconds=1e308), line(2, seconds=10**400))
    stage = make_stage(tmp_path / "a", *timed, state=["x"], step=10**400, steps=1e300, error={"a": 1})
    found = view(stage, tmp_path)
    assert (found.state, found.step, found.steps, found.error) == ("unknown", 2, 0, "")
    timed = (line(1, seconds=1e99), line(2, seconds=5e99))
    stage = make_stage(tmp_path / "b", *timed, state="training", step=2)
    assert view(stage, tmp_path).seconds_left is None
    stage = make_stage(tmp_path / "c", line(1), line(2), state="training", step=2, steps="many")
    assert view(stage, tmp_path).seconds_left is None


def test_a_long_log_is_read_once_and_in_little_memory(tmp_path):
    stage = make_stage(tmp_path / "run", state="training", step=3)
    (stage / "metrics.jsonl").unlink()
    append(stage, *({"step": i, "loss": 9 - i / 20_000, "seconds": i} for i in range(1, 100_001)))
    watcher = Watcher(tmp_path)

    def seconds() -> float:
        began = time.perf_counter()
        watcher.look()
        return time.perf_counter() - began

    whole = seconds()
    append(stage, {"step": 100_001, "loss": 1.5}, {"step": 100_002, "event": "a spike"})
    assert min(seconds() for _ in range(3)) < whole / 10
    tracemalloc.start()
    try:
        (seen,) = Watcher(tmp_path).look()
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
    assert watcher.look()[0].losses == seen.losses
    assert (seen.step, seen.loss, seen.error) == (100_001, 1.5, "a spike")
    assert len(seen.losses) <= watch.MAX_POINTS
    assert seen.losses[0] == pytest.approx(9, abs=0.01)
    assert curve(seen.losses, 8) == "█▇▆▅▄▃▂▁"


def test_later_looks_see_what_changed(tmp_path):
    stage = make_stage(tmp_path / "run", line(10), line(20))  # and half a line

    def losses() -> list[float]:
        return watcher.look()[0].losses

    watcher = Watcher(tmp_path)
    assert losses() == [8, 7]
    with open(stage / "metrics.jsonl", "a") as file:
        file.write('ss": 5.5}\n{"step": 100, "loss": 5.25}\n{"st')  # the half line is finished
    assert losses() == [8, 7, 5.5, 5.25]
    resumed = "".join(json.dumps(line(step)) + "\n" for step in (10, 15, 17, 18, 19, 20, 21))
    for text, expected in ((resumed, [8, 7.5, 7.3, 7.2, 7.1, 7, 6.9]), (json.dumps(line(10)) + "\n", [8])):
        (tmp_path / "other").write_text(text)
        os.replace(tmp_path / "other", stage / "metrics.jsonl")
        assert losses() == pytest.approx(expected)
    shutil.rmtree(stage)
    assert watcher.look() == []
    make_stage(stage, line(30))
    assert losses() == [6]


def test_a_run_with_another_clock_is_not_lost_while_it_has_heartbeats(tmp_path, monkeypatch):
    def sign(stage: Path, behind: float) -> None:
        facts = {"state": "training", "step": 12, "steps": 100, "time": time.time() - behind}
        (stage / "heartbeat.json").write_text(json.dumps(facts))

    slow = make_stage(tmp_path / "slow", line(10))
    fast = make_stage(tmp_path / "fast", line(10))
    sign(slow, 4000)
    sign(fast, -4000)
    watcher = Watcher(tmp_path)

    def states() -> dict[str, str]:
        return {stage.name: stage.state for stage in watcher.look()}

    assert states() == {"slow": "lost", "fast": "training"}  # by the clocks
    sign(slow, 4000)
    assert states() == {"slow": "training", "fast": "training"}
    monkeypatch.setattr(watch, "STALE_SECONDS", 0.1)
    time.sleep(0.2)
    assert states() == {"slow": "lost", "fast": "lost"}  # nothing has come while it looked
    sign(fast, -4000)
    assert states() == {"slow": "lost", "fast": "training"}


def test_long_ages_are_days(tmp_path, capsys):
    make_stage(tmp_path / "run", line(10), state="training", step=12, time=time.time() - 3.5 * 86400)
    with pytest.raises(SystemExit):
        main(["watch", str(tmp_path)])
    assert "3 days ago" in capsys.readouterr().out


def test_the_folder_itself_has_a_name(runs, monkeypatch):
    monkeypatch.chdir(runs / "c")
    assert [stage.name for stage in Watcher(Path(".")).look()] == ["c"]
