"""Saving a stage: checkpoints, the best model so far, the model at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sentcompress.distributed import processes
from sentcompress.files import move_files, storage_errors, temporary_folder, whole_folder
from sentcompress.recipe import Recipe
from sentcompress.training.background import BackgroundWriter
from sentcompress.training.checkpoints import CheckpointStore, write_json, write_tensors
from sentcompress.training.job import Job
from sentcompress.training.monitor import no_library_bars
from sentcompress.training.run_folder import BEST, MARK, RUN, SECTIONS, StageFolder
from sentcompress.training.sharding import is_spread, write_parts
from sentcompress.training.state import TrainingState, snapshot

MOST_HELD_UP = 0.05
"""Share of the time that training may wait for saves before it is said."""
UNSAID_SECONDS = 60.0
"""A run that is younger says nothing of it."""


class Saver:
    """Writes in the first process, from copies of the weights, while training goes on.

    What is spread over processes, each writes its part of. All processes must call every method.

    Args:
        state: of the run.
        background: False makes no copy of the optimizer's state, and waits.

    Attributes:
        held_up: seconds that training has waited for saves.
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
        self.spread = is_spread(state.model)
        # Of its own, as training talks at the same time; of the CPU, where the copies are.
        self.group = torch.distributed.new_group(backend="gloo") if self.spread else None
        self.writer = BackgroundWriter(background)
        self.main = processes().is_main_process
        self.held_up = 0.0
        self._began, self._said = time.monotonic(), False

    def checkpoint(self, step: int, card: str, values: dict[str, Any], *, best: bool) -> None:
        """Save all that is needed to go on.

        Args:
            card: of the model.
            values: what there is to remember besides tensors.
            best: also save the model as the best so far, from the same copy.
        """
        with self._holding_up():
            self._checkpoint(step, card, values, best)

    def _checkpoint(self, step: int, card: str, values: dict[str, Any], best: bool) -> None:
        self.writer.wait()  # before there are two copies
        model, tensors = self._model(card), self.state.tensors()
        if not (self.main or self.spread):
            return
        if self.writer.enabled:
            tensors = snapshot(tensors)

        def write(folder: Path) -> None:
            if self.spread:
                torch.distributed.barrier(self.group)  # until the first process has made the folder
                write_parts(self.store.parts(step), tensors, self.group)
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
        """Save the model as the best so far, and nothing else."""
        with self._holding_up():
            model = self._model(card)
            if self.main:
                self.writer.submit(lambda: self._write_best(model))

    def _write_best(self, model: Callable[[Path], None]) -> None:
        with whole_folder(self.stage.path / BEST) as folder:
            model(folder)

    def final(self, card: str, about: dict[str, Any]) -> None:
        """Save the model into the stage's own folder, which finishes it.

        Args:
            about: for ``run.json``.
        """
        model = self._model(card)
        self.writer.wait()
        if self.main:
            with storage_errors(self.stage.path), temporary_folder(self.stage.path / ".final") as folder:
                model(folder)
                write_json(folder / RUN, about)
                move_files(folder, self.stage.path, last=MARK)
        processes().wait_for_everyone()

    def complaint(self) -> str | None:
        """Once, that training waits for saves more than it should."""
        whole = time.monotonic() - self._began
        if self._said or whole < UNSAID_SECONDS or self.held_up < MOST_HELD_UP * whole:
            return None
        self._said = True
        section = SECTIONS[self.job.stage]
        return f"training waits for saves {self.held_up / whole:.0%} of the time: raise {section}.save_every"

    def check(self) -> None:
        """Raise what went wrong in the background."""
        self.writer.check()

    def wait(self) -> None:
        """Until everything is written, in all processes."""
        self.writer.wait()
        processes().wait_for_everyone()

    def close(self) -> None:
        """Let what is being written come to its end."""
        self.writer.finish()

    @contextmanager
    def _holding_up(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.held_up += time.monotonic() - began

    def _model(self, card: str) -> Callable[[Path], None]:
        """What writes the model as it is now, whatever becomes of it meanwhile; for the first process."""
        weights: dict[str, Tensor] = {}
        if self.main or self.spread:
            with self.state.final_weights():
                weights = self.job.state()
                if not self.spread:  # what was collected from all processes is a copy already
                    weights = snapshot(weights)

        def write(folder: Path) -> None:
            with no_library_bars():
                self.job.save(folder, weights)
            (folder / "README.md").write_text(card, encoding="utf-8")
            (folder / "recipe.yaml").write_text(self.recipe.dump(), encoding="utf-8")

        return write
