"""What a run shows and records: progress, ``metrics.jsonl``, ``heartbeat.json``, TensorBoard, W&B. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sentcompress.errors import InputError, StorageError, TerminatedError
from sentcompress.files import finite, printable, storage_errors, write_atomically
from sentcompress.recipe import TrainingSettings

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

METRICS = "metrics.jsonl"
MAX_LINE = 1 << 20
"""Characters in a line of ``metrics.jsonl``; real lines have a few hundred, so a longer one is broken."""
LINE_SECONDS = 5.0
"""Seconds between progress lines where there is no terminal."""
HEARTBEAT = "heartbeat.json"
HEARTBEAT_SECONDS = 5.0
"""Seconds between heartbeats while nothing changes."""
MAX_HEARTBEAT = 1 << 20
"""Characters in ``heartbeat.json``; a longer file is not ours."""
MAX_AGE = 100 * 365 * 86400.0
"""Largest plausible difference between two clocks in seconds; beyond it, the file is broken."""


class Monitor:
    """Everything a training run shows and records. Only the first process shows or writes anything.

    As a context manager it keeps the heartbeat, which records why the run failed. Call :meth:`start` to open the log.

    Args:
        stage: name shown.
        folder: of the stage.
        main: whether this is the first process.
    """

    def __init__(
        self, stage: str, folder: Path, settings: TrainingSettings, main: bool, console: Console | None = None
    ) -> None:
        self.folder, self.settings, self.main = folder, settings, main
        self.progress = TrainingProgress(stage, settings.steps, shown=main, console=console)
        self.heartbeat = Heartbeat(folder, settings.steps, shown=main)
        self.log: MetricsLog | None = None

    def __enter__(self) -> Monitor:
        self.heartbeat.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.heartbeat.__exit__(kind, error, trace)

    def start(self, step: int) -> None:
        """Open ``metrics.jsonl`` and drop its lines after ``step``."""
        self.close_log()
        if self.main:
            self.log = MetricsLog(self.folder, step, self.settings.tensorboard, self.settings.wandb)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self.progress.note(text)

    def busy(self, state: str, step: int) -> None:
        """Record what the run is doing: ``evaluating`` or ``saving``."""
        self.heartbeat.beat(state, step)

    def step(self, step: int) -> None:
        """Show that a step was done."""
        self.progress.advance(step)
        self.heartbeat.beat("training", step)

    def figures(self, step: int, figures: Mapping[str, float], totals: Mapping[str, float]) -> None:
        """Show the figures since the last time; log them with the totals of the run."""
        self.progress.update(step, figures)
        self.heartbeat.beat("training", step, figures)
        self._write(step, {**figures, **totals})

    def heldout(self, step: int, figures: Mapping[str, float]) -> None:
        """Show and log held-out figures."""
        self.progress.heldout(step, figures)
        self._write(step, {"eval": figures})

    def anomaly(self, step: int, anomaly: str) -> None:
        """Show and log a step that was not taken; ``step`` is the last one that was."""
        self.note(f"{anomaly}; step not taken")
        self._write(step, {"event": anomaly})

    def _write(self, step: int, figures: Mapping[str, Any]) -> None:
        if self.log:
            self.log.write(step, figures)

    def close_log(self) -> None:
        if self.log:
            self.log.close()
            self.log = None

    def close(self) -> None:
        """Close the progress bar and the log."""
        self.progress.close()
        self.close_log()


class TrainingProgress:
    """A progress bar on a terminal, otherwise a line every few seconds.

    Args:
        stage: name shown.
        total: steps of the run.
        start: steps done before.
        shown: False shows nothing.
    """

    def __init__(
        self, stage: str, total: int, start: int = 0, shown: bool = True, console: Console | None = None
    ) -> None:
        self.console = console or Console(stderr=True, quiet=not shown)
        self.stage = stage
        self.total = total
        self.start = start
        self._began = time.monotonic()
        self._printed = float("-inf")
        self._heldout = ""
        self._bar: Progress | None = None
        if shown and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self.console,
            )
            self._task = self._bar.add_task(stage, total=total, completed=start, figures="")

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(printable(f"{self.stage}: {text}"), markup=False, highlight=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Move the progress bar, if there is one."""
        if self._bar is not None:
            self._bar.start()  # has an effect before the first step only
            self._bar.update(self._task, completed=step)

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        """Show the state after ``step`` steps."""
        text = (
            f"loss {figures['loss']:.4f}  {figures['tokens_per_second']:,.0f} tokens/s  "
            f"padding {figures['padding']:.1%}{self._heldout}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=text)
            return
        now = time.monotonic()
        if now - self._printed >= LINE_SECONDS or step == self.total:
            self._printed = now
            left = (now - self._began) / max(1, step - self.start) * (self.total - step)
            self.note(f"step {step}/{self.total}  {text}  {duration(left)} left")

    def heldout(self, step: int, figures: Mapping[str, float]) -> None:
        """Show held-out figures now, and next to the loss from now on."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.note(f"step {step}/{self.total}  held out: {text}")
        name, value = next(iter(figures.items()), ("", 0.0))
        self._heldout = f"  held-out {name} {value:.4g}" if name else ""

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def duration(seconds: float) -> str:
    """``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def no_library_bars() -> Iterator[None]:
    """Within the block transformers shows no progress bar of its own."""
    from transformers.utils import (
        logging as transformers_logging,  # slow to import, and `watch` imports this module
    )

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


class MetricsLog:
    """``metrics.jsonl``, one JSON object per line, and the trackers that the recipe asks for.

    Args:
        folder: of the stage.
        start: steps done before; later lines of an earlier attempt are dropped.
        tensorboard: also write TensorBoard events, with Accelerate's tracker.
        wandb: also log to Weights & Biases, with Accelerate's tracker.

    Raises:
        InputError: a tracker is not installed, or W&B refuses.
        StorageError: the file cannot be written.
    """

    def __init__(self, folder: Path, start: int, tensorboard: bool, wandb: bool = False) -> None:
        self.path = folder / METRICS
        with storage_errors(folder):
            kept = [line for line in read_metrics(self.path) if line["step"] <= start]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._trackers: list[GeneralTracker] = []
        if tensorboard:
            self._trackers.append(_tensorboard(folder, start))
        if wandb:
            self._trackers.append(_wandb_run(folder))
        with storage_errors(folder):
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Append ``{"step": step, **figures}``."""
        with storage_errors(self.path.parent):
            self._file.write(json.dumps({"step": step, **finite(figures)}) + "\n")
            self._file.flush()
        for tracker in self._trackers:
            tracker.log(_by_group(figures), step=step)

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.finish()


def _by_group(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Names in groups, as both trackers use them: ``train/loss``, ``eval/bits_per_byte``, ``event``."""
    flat: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{inner}": number for inner, number in value.items()}
        else:
            flat[name if isinstance(value, str) else f"train/{name}"] = value
    return flat


def _tensorboard(folder: Path, start: int) -> GeneralTracker:
    """A tracker of the steps after ``start``; it hides later ones of an earlier attempt. Raises InputError."""
    from accelerate.tracking import TensorBoardTracker
    from accelerate.utils import is_tensorboard_available

    if not is_tensorboard_available():
        raise InputError(
            "tensorboard: true, but TensorBoard is not installed",
            fix="pip install 'sentcompress[tensorboard]', or set it to false",
        )
    tracker = TensorBoardTracker("tensorboard", folder, purge_step=start + 1)
    with storage_errors(folder):
        tracker.start()
    return tracker


def _wandb_run(folder: Path) -> GeneralTracker:
    """A W&B run that continues when the stage does. Raises InputError."""
    from accelerate.tracking import WandBTracker
    from accelerate.utils import is_wandb_available

    fix = "pip install 'sentcompress[wandb]' and 'wandb login', set WANDB_MODE=offline, or set wandb to false"
    if not is_wandb_available():
        raise InputError("wandb: true, but Weights & Biases is not installed", fix=fix)
    path = folder.resolve()
    tracker = WandBTracker(
        "sentcompress",
        name="/".join(path.parts[-2:]),
        id=hashlib.blake2b(str(path).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest(),
        resume="allow",
        dir=str(folder),
    )
    try:
        tracker.start()
    except Exception as error:
        raise InputError(f"wandb: {type(error).__name__}: {error}", fix=fix) from error
    return tracker


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, without broken ones such as the last line of a killed run."""
    try:
        if not path.is_file():  # reading a pipe would block
            return []
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = (read_line(line) for line in text.splitlines())
    return [line for line in lines if line is not None]


def read_line(text: str) -> dict[str, Any] | None:
    """A line of a ``metrics.jsonl``; None if it is broken."""
    if len(text) > MAX_LINE:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None


class Heartbeat:
    """Keeps ``heartbeat.json`` up to date, for ``sentcompress watch`` and for schedulers.

    When the stage fails, the file keeps the reason; when the stage is done, the file is deleted. Training continues
    if the file cannot be written: the next checkpoint gives a better error message.

    Args:
        folder: of the stage.
        steps: of the whole run.
        shown: False (in all processes but the first) writes nothing.
    """

    def __init__(self, folder: Path, steps: int, *, shown: bool = True) -> None:
        self.path = folder / HEARTBEAT
        self.shown = shown
        self.facts: dict[str, Any] = {
            "state": "starting",
            "step": 0,
            "steps": steps,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        self._written = float("-inf")
        self._lock = threading.Lock()
        self._ended = threading.Event()
        # A daemon thread does not keep a process alive that is about to end.
        self._thread = threading.Thread(target=self._repeat, name="heartbeat", daemon=True)

    def beat(self, state: str, step: int, figures: Mapping[str, float] | None = None) -> None:
        """Set what the run is doing; written if that changed, or some seconds after the last time.

        Args:
            state: ``training``, ``evaluating`` or ``saving``.
            step: steps done.
            figures: as in ``metrics.jsonl``.
        """
        changed = state != self.facts["state"]
        kept = ("loss", "tokens_per_second")
        self.facts = {
            **self.facts,
            "state": state,
            "step": step,
            **{name: figures[name] for name in kept if figures and name in figures},
        }
        if changed or time.monotonic() - self._written >= HEARTBEAT_SECONDS:
            self._write()

    def _repeat(self) -> None:
        """Write every few seconds, also during a long step, evaluation or save."""
        while not self._ended.wait(max(HEARTBEAT_SECONDS, 0.1)):
            self._write()

    def _write(self) -> None:
        if not self.shown:
            return
        self._written = time.monotonic()
        with self._lock, suppress(StorageError):
            text = json.dumps(self.facts | {"time": time.time()}) + "\n"
            write_atomically(self.path, text, durable=False)

    def __enter__(self) -> Heartbeat:
        if self.shown:
            self._write()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.shown:
            return
        self._ended.set()
        self._thread.join()
        if error is None:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
            return
        stopped = isinstance(error, KeyboardInterrupt | TerminatedError)
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        self.facts |= {"state": "stopped" if stopped else "failed", "error": "" if stopped else reason}
        self._write()


def read_heartbeat(folder: Path) -> dict[str, Any] | None:
    """The last heartbeat of a stage that is not done, or None.

    Its ``age`` is the time since then in seconds, by the clocks of this machine and of the run.
    """
    path = folder / HEARTBEAT
    try:
        if not path.is_file():  # reading a pipe would block
            return None
        with open(path, encoding="utf-8") as file:
            facts = json.loads(file.read(MAX_HEARTBEAT))
        age = time.time() - float(facts["time"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    # The clock of another machine may be ahead.
    return {**facts, "age": max(0.0, age)} if abs(age) <= MAX_AGE else None
