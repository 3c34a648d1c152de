"""Saving a stage: checkpoints, the best model so far, the final model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from sentcompress.distributed import processes
from sentcompress.files import move_files, storage_errors, temporary_folder, whole_folder
from sentcompress.recipe import Recipe
from sentcompress.training.checkpoints import CheckpointStore, TrainingState, snapshot, write_tensors
from sentcompress.training.jobs import Job
from sentcompress.training.monitor import no_library_bars
from sentcompress.training.run_folder import BEST, COMPLETE, RUN, StageFolder, write_json
from sentcompress.training.sharding import is_sharded, write_shards

MAX_WAIT_SHARE = 0.05
"""Share of the time that training may wait for saves without a warning."""
MIN_RUN_SECONDS = 60.0
"""No such warning before the run is this old."""

Write = Callable[[], object]


class BackgroundWriter:
    """Writes in a thread of its own while training continues, one thing at a time.

    Args:
        enabled: False writes at once, and waits.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def submit(self, write: Write) -> None:
        """Start to write, after the previous write. Raises what that one raised, as :meth:`wait` does."""
        self.wait()
        if not self.enabled:
            write()
            return

        def run() -> None:
            try:
                write()
            except BaseException as error:
                self._error = error

        self._thread = Thread(target=run, name="saving")
        self._thread.start()

    def check(self) -> None:
        """Raise what the last write raised, if it has ended; do not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written; raise what the last write raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def finish(self) -> None:
        """Wait for the last write and ignore its error: another one is on its way."""
        if self._thread is not None:
            self._thread.join()


class BestModel:
    """The best held-out figure so far: the first of them, where lower is better.

    Args:
        enabled: False never keeps a best model.
        value: from the checkpoint that training continues from.
    """

    def __init__(self, enabled: bool, value: float | None) -> None:
        self.enabled, self.value = enabled, value

    def improved(self, figures: Mapping[str, float]) -> str | None:
        """Remember a new best figure and describe it; None if there is no improvement."""
        if not self.enabled or not figures:
            return None
        name, value = next(iter(figures.items()))
        if not math.isfinite(value) or (self.value is not None and value >= self.value):
            return None
        self.value = value
        return f"{name} {value:.4g}"


class Saver:
    """Saves a run. The first process writes, from copies of the weights, while training continues.

    If the model is sharded, each process writes its own shard. All processes must call every method.

    Args:
        state: of the run.
        background: False makes no copy of the optimizer's state, and waits.

    Attributes:
        wait_seconds: time that training has waited for saves.
    """

    def __init__(
        self,
        job: Job,
        stage: StageFolder,
        recipe: Recipe,
        store: CheckpointStore,
        state: TrainingState,
        background: bool,
    ) -> None:
        self.job, self.stage, self.recipe, self.store, self.state = job, stage, recipe, store, state
        self.sharded = is_sharded(state.model)
        # A separate group, since training communicates at the same time; of the CPU, where the copies are.
        self.group = torch.distributed.new_group(backend="gloo") if self.sharded else None
        self.writer = BackgroundWriter(background)
        self.main = processes().is_main_process
        self.wait_seconds = 0.0
        self._began, self._warned = time.monotonic(), False

    def checkpoint(self, step: int, card: str, values: dict[str, Any], *, best: bool) -> None:
        """Save everything needed to continue.

        Args:
            card: of the model.
            values: the part of the state that is not tensors.
            best: also save the model as the best so far, from the same copy.
        """
        with self._timed():
            self._checkpoint(step, card, values, best)

    def _checkpoint(self, step: int, card: str, values: dict[str, Any], best: bool) -> None:
        self.writer.wait()  # so that there is one copy at a time
        model, tensors = self._model(card), self.state.tensors()
        if not (self.main or self.sharded):
            return
        if self.writer.enabled:
            tensors = snapshot(tensors)

        def write(folder: Path) -> None:
            if self.sharded:
                torch.distributed.barrier(self.group)  # until the first process has made the folder
                write_shards(self.store.shards(step), tensors, self.group)
            else:
                write_tensors(folder, tensors)

        def save() -> None:
            if best:
                self._write_best(model)
            self.store.save(step, model, write, values)

        if self.main:
            self.writer.submit(save)
        else:
            self.writer.submit(lambda: write(self.store.folder))

    def best(self, card: str) -> None:
        """Save only the model, as the best so far."""
        with self._timed():
            model = self._model(card)
            if self.main:
                self.writer.submit(lambda: self._write_best(model))

    def _write_best(self, model: Callable[[Path], None]) -> None:
        with whole_folder(self.stage.path / BEST) as folder:
            model(folder)

    def final(self, card: str, about: dict[str, Any]) -> None:
        """Save the model into the folder of the stage, which completes it.

        Args:
            about: for ``run.json``.
        """
        model = self._model(card)
        self.writer.wait()
        if self.main:
            with storage_errors(self.stage.path), temporary_folder(self.stage.path / ".final") as folder:
                model(folder)
                write_json(folder / RUN, about)
                move_files(folder, self.stage.path, last=COMPLETE)
        processes().wait_for_everyone()

    def wait_warning(self) -> str | None:
        """A warning, returned once, when training waits too long for saves."""
        age = time.monotonic() - self._began
        if self._warned or age < MIN_RUN_SECONDS or self.wait_seconds < MAX_WAIT_SHARE * age:
            return None
        self._warned = True
        section = self.job.stage.section
        return (
            f"training waits for saves {self.wait_seconds / age:.0%} of the time: raise {section}.save_every"
        )

    def check(self) -> None:
        """Raise an error that occurred in the background."""
        self.writer.check()

    def wait(self) -> None:
        """Wait until everything is written, in all processes."""
        self.writer.wait()
        processes().wait_for_everyone()

    def close(self) -> None:
        """Wait for the write in progress."""
        self.writer.finish()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.wait_seconds += time.monotonic() - began

    def _model(self, card: str) -> Callable[[Path], None]:
        """A function that writes the model as it is now, even if it changes meanwhile; for the first process."""
        weights: dict[str, Tensor] = {}
        if self.main or self.sharded:
            with self.state.final_weights():
                weights = self.job.state()
                if not self.sharded:  # tensors collected from all processes are copies already
                    weights = snapshot(weights)

        def write(folder: Path) -> None:
            with no_library_bars():
                self.job.save(folder, weights)
            (folder / "README.md").write_text(card, encoding="utf-8")
            (folder / "recipe.yaml").write_text(self.recipe.dump(), encoding="utf-8")

        return write
