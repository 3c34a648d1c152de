"""Saving a stage: checkpoints, the best model so far, the model at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sentcompress.io import move_files, storage_errors, temporary_folder, whole_folder
from sentcompress.processes import processes
from sentcompress.recipe import Recipe
from sentcompress.training.background import BackgroundWriter
from sentcompress.training.checkpoints import CheckpointStore, write_json, write_tensors
from sentcompress.training.job import Job
from sentcompress.training.progress import no_library_bars
from sentcompress.training.run_folder import BEST, MARK, RUN, StageFolder
from sentcompress.training.sharding import is_spread, write_parts
from sentcompress.training.state import TrainingState, snapshot


class Saver:
    """Writes in the first process, from copies of the weights, while training goes on.

    What is spread over processes, each writes its part of. All processes must call every method.

    Args:
        state: of the run.
        background: False makes no copy of the optimizer's state, and waits.
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

    def checkpoint(self, step: int, card: str, values: dict[str, Any]) -> None:
        """Save all that is needed to go on.

        Args:
            card: of the model.
            values: what there is to remember besides tensors.
        """
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

        if self.main:
            self.writer.submit(lambda: self.store.save(step, model, write, values))
        else:
            self.writer.submit(lambda: write(self.store.folder))

    def best(self, card: str) -> None:
        """Save the model as the best so far."""
        model = self._model(card)

        def write() -> None:
            with whole_folder(self.stage.path / BEST) as folder:
                model(folder)

        if self.main:
            self.writer.submit(write)

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
