"""Runs the points of a grid one after the other, each as a ``sentcompress run`` in a process of its own.

Whatever ends one process (a bug in a plugin, the kernel's out-of-memory killer) leaves the other runs alone, and every
run starts from the same state.
"""

from __future__ import annotations

import datetime
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.text import Text

from sentcompress.benchmark.results import Results, is_current
from sentcompress.distributed import Interruption
from sentcompress.errors import InputError, RunError
from sentcompress.estimate.equal_cost import match
from sentcompress.estimate.plan import TOKENS_PER_SENTENCE, count
from sentcompress.files import storage_errors, write_atomically
from sentcompress.locks import try_lock
from sentcompress.pipeline import check_folder
from sentcompress.provenance import command
from sentcompress.recipe import Recipe
from sentcompress.studies.grid import Axis, GridPoint, check_each
from sentcompress.studies.presentation import require_matplotlib
from sentcompress.studies.sweep_report import draw, markdown
from sentcompress.studies.sweep_results import (
    FILE,
    SweepResults,
    SweepRun,
    comparison_notes,
    honesty_of,
    read_figures,
    read_sweep,
)

PROGRAM = (sys.executable, "-m", "sentcompress")
LOG = "log.txt"
"""In a run's folder: everything it printed."""
POLL_SECONDS = 0.2
LINE_SECONDS = 30.0
"""Seconds between lines about a run in progress where there is no terminal."""


def check_grid(points: Sequence[GridPoint], out: Path) -> None:
    """Find what cannot work before the first run starts. Reads only.

    Raises:
        InputError: a model cannot be built as asked, a run's folder holds something else, or matplotlib is missing.
        PluginError: a component is missing or broken.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a sweep starts the process of each run itself", fix="start it without torchrun")
    require_matplotlib()
    named = [(point.name, point) for point in points]
    check_each(named, lambda point: _check_models(point.recipe))
    check_each(named, lambda point: check_folder(point.recipe, out / point.name))


def _check_models(recipe: Recipe) -> None:
    """Build the models of a run without weights."""
    count(recipe)
    for name in recipe.opponents:
        match(recipe, name, TOKENS_PER_SENTENCE)


def run_sweep(
    title: str,
    axes: Sequence[Axis],
    points: Sequence[GridPoint],
    out: Path,
    *,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> SweepResults:
    """Run what is not finished yet; write ``sweep.json`` and ``sweep.md`` after every run, ``sweep.png`` at the end.

    Args:
        points: which :func:`check_grid` has passed.
        out: folder of the sweep; each run has a folder of its name in it.
        overrides: the ``--set`` options the points were built with; only written down.

    Returns:
        all runs; those that failed say why.

    Raises:
        InputError: the folder holds a sweep of another version.
        RunError: another process is working on one of the runs.
        StorageError: a file cannot be written.
        KeyboardInterrupt: Ctrl-C; the run in progress has saved a checkpoint.
    """
    return _Sweep(title, axes, points, out, overrides, quiet).run()


class _Sweep:
    """A sweep in progress."""

    def __init__(
        self,
        title: str,
        axes: Sequence[Axis],
        points: Sequence[GridPoint],
        out: Path,
        overrides: Sequence[str],
        quiet: bool,
    ) -> None:
        self.points, self.out = points, out
        self.console = Console(stderr=True, quiet=quiet, highlight=False, markup=False, soft_wrap=True)
        before = read_sweep(out)
        seconds = {(run.name, run.recipe_digest): run.wall_seconds for run in before.cells} if before else {}
        runs = [_waiting_run(point) for point in points]
        for run in runs:
            run.wall_seconds = seconds.get((run.name, run.recipe_digest))
        self.sweep = SweepResults(
            title=title,
            command=command(),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            overrides=list(overrides),
            axes={axis.field: list(axis.values) for axis in axes},
            cells=runs,
            notes=[],
        )
        self.done: list[tuple[SweepRun, Results]] = []
        self.durations: list[float] = []

    def run(self) -> SweepResults:
        waiting = []
        for point, run in zip(self.points, self.sweep.cells, strict=True):
            if is_current(self.out / point.name / "bench", self.out / point.name, point.recipe):
                self._read(run)
            else:
                waiting.append((point, run))
        if finished := len(self.points) - len(waiting):
            self.console.print(f"sweep: {finished} of {len(self.points)} runs are already done")
        try:
            for number, (point, run) in enumerate(waiting, finished + 1):
                self._run_point(point, run, number)
                self._write()
        finally:
            self._write()
            draw(self.sweep, self.out / "sweep.png")
        return self.sweep

    def _run_point(self, point: GridPoint, run: SweepRun, number: int) -> None:
        title, left = f"[{number}/{len(self.points)}] {point.name}", len(self.points) - number
        self.console.print(title)
        began = time.monotonic()
        failure = None
        try:
            failure = self._run_process(point, title)
        finally:
            took = time.monotonic() - began
            run.wall_seconds = (run.wall_seconds or 0.0) + took
        if failure is None:
            try:
                self._read(run)
            except InputError as error:
                failure = str(error)
        if failure is not None:
            run.state, run.error = "failed", failure
            self.console.print(f"  failed after {_duration(took)}: {failure}")
            return
        self.durations.append(took)
        assert run.figures is not None
        score = run.figures.bits_per_byte
        shown = "" if score is None else f"{score:.4f} bits/byte, "
        rest = f", about {_duration(statistics.mean(self.durations) * left)} left" if left else ""
        self.console.print(f"  {shown}{_duration(took)}{rest}")

    def _run_process(self, point: GridPoint, title: str) -> str | None:
        """Run a grid point to its end; None on success, else its error message."""
        folder = self.out / point.name
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        # The resolved recipe: editing the file meanwhile must not change the runs still to come.
        write_atomically(folder / "recipe.yaml", point.recipe.dump())
        arguments = ["run", str(folder / "recipe.yaml"), "--out", str(folder)]
        with open(folder / LOG, "a+b") as log, Interruption() as interruption:
            _lock(log, folder)
            start = log.seek(0, os.SEEK_END)
            child = _start(arguments, log)
            asked = False
            try:
                with _Live(self.console, title, folder / LOG) as live:
                    while child.poll() is None:
                        if interruption.signal and not asked:
                            asked = True
                            self.console.print("  stopping after the run has saved a checkpoint")
                            _interrupt(child)
                        live.update()
                        time.sleep(POLL_SECONDS)
            except KeyboardInterrupt:
                _interrupt(child)
                child.wait()
                raise
            if interruption.signal:
                raise KeyboardInterrupt
            if child.returncode == 0:
                return None
            log.seek(start)
            return _error_message(log.read().decode(errors="replace"), child.returncode)

    def _read(self, run: SweepRun) -> None:
        run.figures, results = read_figures(self.out / run.name)
        run.honesty = honesty_of(results)
        run.state = "done"
        self.done.append((run, results))

    def _write(self) -> None:
        self.sweep.notes = comparison_notes(self.done)
        with storage_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        write_atomically(self.out / "sweep.md", markdown(self.sweep))
        write_atomically(self.out / FILE, self.sweep.model_dump_json(indent=1) + "\n")


def _start(arguments: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*PROGRAM, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # we pass Ctrl-C on exactly once: at a second one the run would not save
    )


def _waiting_run(point: GridPoint) -> SweepRun:
    return SweepRun(
        name=point.name,
        values=list(point.values),
        overrides=list(point.overrides),
        recipe_digest=point.recipe.digest(),
    )


def _lock(log: IO[bytes], folder: Path) -> None:
    """Keep a second sweep away from this run. The run's process inherits the lock: it may outlive the sweep's."""
    if try_lock(log.fileno()) is False:
        raise RunError(
            f"{folder}: another process is working on this run", fix="wait for it to end, or stop it"
        )


def _interrupt(child: subprocess.Popen[bytes]) -> None:
    if os.name != "nt":  # on Windows the console has done it already
        import signal

        child.send_signal(signal.SIGINT)


def _error_message(log: str, code: int) -> str:
    """The error message at the end of a log, or what the exit code says."""
    _, mark, message = log.rpartition("error: ")
    if mark:
        return message.strip()
    if code < 0:
        why = ": out of memory?" if code == -9 else ""
        return f"ended by signal {-code}{why}"
    return f"ended with code {code} and no message"


class _Live:
    """The last line a run printed: on a terminal as a line that changes, else as a line now and then."""

    def __init__(self, console: Console, title: str, log: Path) -> None:
        self.console, self.log = console, log
        self._title = title
        self._shown, self._last = time.monotonic(), ""
        self._status = console.status(_one_row(title)) if console.is_terminal else None

    def __enter__(self) -> _Live:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def update(self) -> None:
        if self._status is None and time.monotonic() - self._shown < LINE_SECONDS:
            return
        line = _last_line(self.log)
        if self._status:
            self._status.update(_one_row(f"{self._title}  {line}"))
        elif line != self._last:
            self.console.print(f"  {line}")
        self._shown, self._last = time.monotonic(), line


def _one_row(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")


def _last_line(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _duration(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min" if minutes >= 10 else f"{60 * minutes + left} s"
