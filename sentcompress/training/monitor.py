"""What a run shows and records: a progress bar or plain lines, ``metrics.jsonl``, TensorBoard, W&B."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sentcompress.errors import InputError
from sentcompress.files import finite, printable, storage_errors, write_atomically

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

METRICS = "metrics.jsonl"
LONGEST_LINE = 1 << 20
"""Characters of a line of it; ours have some hundreds, and a longer one is broken."""
LINE_SECONDS = 5.0
"""Seconds between plain lines where there is no terminal."""


class TrainingProgress:
    """A progress bar on a terminal, else a plain line every few seconds. Only rank 0 shows anything.

    Args:
        stage: name shown.
        total: steps of the run.
        start: steps done before.
        shown: False keeps quiet.
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
        """A line that stays."""
        self.console.print(printable(f"{self.stage}: {text}"), markup=False, highlight=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Move the bar, if there is one."""
        if self._bar is not None:
            self._bar.start()  # with the first step; does nothing after that
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
        """Show held-out figures now, and beside the loss from now on."""
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
    """Saving shows no bar of transformers' own in the middle of ours."""
    from transformers.utils import logging as transformers_logging  # slow, and `watch` reads this module too

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


class MetricsLog:
    """``metrics.jsonl``, one object a line, and what a recipe wants beside it.

    Args:
        folder: of the stage.
        start: steps done before; later lines of an earlier attempt are dropped.
        tensorboard: also write events; Accelerate's tracker does.
        wandb: also log to Weights & Biases; Accelerate's tracker does.

    Raises:
        InputError: one of them is wanted and not installed, or W&B refuses.
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
    """``train/loss``, ``eval/bits_per_byte``, ``event``: as both trackers group them."""
    flat: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{inner}": number for inner, number in value.items()}
        else:
            flat[name if isinstance(value, str) else f"train/{name}"] = value
    return flat


def _tensorboard(folder: Path, start: int) -> GeneralTracker:
    """Events of the steps after ``start``; later ones of an earlier attempt are not shown. Raises InputError."""
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
    """A W&B run that goes on when the stage does. Raises InputError."""
    from accelerate.tracking import WandBTracker
    from accelerate.utils import is_wandb_available

    fix = "pip install 'sentcompress[wandb]' and 'wandb login', set WANDB_MODE=offline, or wandb to false"
    if not is_wandb_available():
        raise InputError("wandb: true, but Weights & Biases is not installed", fix=fix)
    place = folder.resolve()
    tracker = WandBTracker(
        "sentcompress",
        name="/".join(place.parts[-2:]),
        id=hashlib.blake2b(str(place).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest(),
        resume="allow",
        dir=str(folder),
    )
    try:
        tracker.start()
    except Exception as error:
        raise InputError(f"wandb: {type(error).__name__}: {error}", fix=fix) from error
    return tracker


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a ``metrics.jsonl``; one cut short by a kill or otherwise broken is left out."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return []
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = (read_line(line) for line in text.splitlines())
    return [line for line in lines if line is not None]


def read_line(text: str) -> dict[str, Any] | None:
    """What a line of a ``metrics.jsonl`` says; None where it is broken."""
    if len(text) > LONGEST_LINE:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None
