"""Runs the cells of a grid one after the other, each as a ``sentcompress run`` in a process of its own.

A process a cell: whatever ends one (a bug in a plugin, the kernel's out-of-memory killer) leaves the others alone,
and every cell starts from the same state.
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
from sentcompress.estimate.plan import count
from sentcompress.files import storage_errors, write_atomically
from sentcompress.pipeline import check_folder
from sentcompress.provenance import command
from sentcompress.studies.grid import Axis, Cell, check_each
from sentcompress.studies.sweep_plots import draw, require_matplotlib
from sentcompress.studies.sweep_results import (
    FILE,
    CellRow,
    SweepResults,
    comparison_notes,
    honesty_of,
    read_cell,
    read_sweep,
)
from sentcompress.studies.sweep_tables import markdown

PROGRAM = (sys.executable, "-m", "sentcompress")
LOG = "log.txt"
"""In a cell's folder: all that its run printed."""
POLL_SECONDS = 0.2
LINE_SECONDS = 30.0
"""Seconds between plain lines about a running cell where there is no terminal."""


def check_cells(cells: Sequence[Cell], out: Path) -> None:
    """Find what cannot work before the first cell starts. Reads only.

    Raises:
        InputError: a model cannot be built as asked, a cell's folder holds something else, or matplotlib is missing.
        PluginError: a component is missing or broken.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a sweep runs one process a cell", fix="start it without torchrun")
    require_matplotlib()
    named = [(cell.name, cell) for cell in cells]
    check_each(named, lambda cell: count(cell.recipe))
    check_each(named, lambda cell: check_folder(cell.recipe, out / cell.name))


def run_sweep(
    title: str,
    axes: Sequence[Axis],
    cells: Sequence[Cell],
    out: Path,
    *,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> SweepResults:
    """Run what is not finished yet; write ``sweep.json`` and ``sweep.md`` after every cell, ``sweep.png`` at the end.

    Args:
        cells: that :func:`check_cells` has passed.
        out: folder of the sweep; each cell has a folder of its name in it.
        overrides: the ``--set`` options the cells were built with; only written down.

    Returns:
        all rows; those of cells that failed say why.

    Raises:
        InputError: the folder holds a sweep of another version.
        RunError: another process is at work on one of the cells.
        StorageError: a file cannot be written.
        KeyboardInterrupt: Ctrl-C; the running cell has saved where it was.
    """
    return _Sweep(title, axes, cells, out, overrides, quiet).run()


class _Sweep:
    """A sweep under way."""

    def __init__(
        self,
        title: str,
        axes: Sequence[Axis],
        cells: Sequence[Cell],
        out: Path,
        overrides: Sequence[str],
        quiet: bool,
    ) -> None:
        self.cells, self.out = cells, out
        self.console = Console(stderr=True, quiet=quiet, highlight=False, markup=False, soft_wrap=True)
        before = read_sweep(out)
        known = {(row.name, row.recipe_digest): row.wall_seconds for row in before.cells} if before else {}
        rows = [_row(cell) for cell in cells]
        for row in rows:
            row.wall_seconds = known.get((row.name, row.recipe_digest))
        self.sweep = SweepResults(
            title=title,
            command=command(),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            overrides=list(overrides),
            axes={axis.field: list(axis.values) for axis in axes},
            cells=rows,
            notes=[],
        )
        self.done: list[tuple[CellRow, Results]] = []
        self.took: list[float] = []

    def run(self) -> SweepResults:
        waiting = []
        for cell, row in zip(self.cells, self.sweep.cells, strict=True):
            if is_current(self.out / cell.name / "bench", self.out / cell.name, cell.recipe):
                self._read(row)
            else:
                waiting.append((cell, row))
        if finished := len(self.cells) - len(waiting):
            self.console.print(f"sweep: {finished} of {len(self.cells)} cells are done already")
        try:
            for number, (cell, row) in enumerate(waiting, finished + 1):
                self._run_cell(cell, row, number, left=len(self.cells) - number)
                self._write()
        finally:
            self._write()
            draw(self.sweep, self.out / "sweep.png")
        return self.sweep

    def _run_cell(self, cell: Cell, row: CellRow, number: int, left: int) -> None:
        self.console.print(f"[{number}/{len(self.cells)}] {cell.name}")
        began = time.monotonic()
        failure = None
        try:
            failure = self._child(cell, f"[{number}/{len(self.cells)}] {cell.name}")
        finally:
            took = time.monotonic() - began
            row.wall_seconds = (row.wall_seconds or 0.0) + took
        if failure is None:
            try:
                self._read(row)
            except InputError as error:
                failure = str(error)
        if failure is not None:
            row.state, row.error = "failed", failure
            self.console.print(f"  failed after {_duration(took)}: {failure}")
            return
        self.took.append(took)
        assert row.figures is not None
        score = row.figures.bits_per_byte
        shown = "" if score is None else f"{score:.4f} bits/byte, "
        rest = f", about {_duration(statistics.mean(self.took) * left)} left" if left else ""
        self.console.print(f"  {shown}{_duration(took)}{rest}")

    def _child(self, cell: Cell, title: str) -> str | None:
        """Run a cell to its end; None when it was done, else what it said."""
        folder = self.out / cell.name
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        # The resolved recipe, so that a recipe edited meanwhile does not change the cells still to come.
        write_atomically(folder / "recipe.yaml", cell.recipe.dump())
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
                            self.console.print("  stopping: the cell saves where it is")
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
            return _said(log.read().decode(errors="replace"), child.returncode)

    def _read(self, row: CellRow) -> None:
        row.figures, results = read_cell(self.out / row.name)
        row.honesty = honesty_of(results)
        row.state = "done"
        self.done.append((row, results))

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
        start_new_session=True,  # Ctrl-C comes through us, exactly once: a second one would not save
    )


def _row(cell: Cell) -> CellRow:
    return CellRow(
        name=cell.name,
        values=list(cell.values),
        overrides=list(cell.overrides),
        recipe_digest=cell.recipe.digest(),
    )


def _lock(log: IO[bytes], folder: Path) -> None:
    """Keep a second sweep away from this cell. The child inherits the lock: it outlives a killed parent."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise RunError(
            f"{folder}: another process is at work on this cell", fix="wait for it to end, or end it"
        ) from None


def _interrupt(child: subprocess.Popen[bytes]) -> None:
    if os.name != "nt":  # there the console has told it already
        import signal

        child.send_signal(signal.SIGINT)


def _said(log: str, code: int) -> str:
    """The error message at the end of a log, or what the exit code tells."""
    _, mark, message = log.rpartition("error: ")
    if mark:
        return message.strip()
    if code < 0:
        why = ": out of memory?" if code == -9 else ""
        return f"ended by signal {-code}{why}"
    return f"ended with code {code} and no message"


class _Live:
    """What a running cell said last: one line that changes on a terminal, else a line now and then."""

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
