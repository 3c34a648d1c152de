"""The one training loop: token-level pretraining, SentenceVAE, graft, memory and baseline are jobs of it."""

from __future__ import annotations

import math
import random
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from rich.console import Console

from sentcompress.distributed import Interruption, processes
from sentcompress.errors import NumericsError, TerminatedError
from sentcompress.recipe import Recipe
from sentcompress.text.prefetch import Prefetcher, prefetch
from sentcompress.training.anomalies import LossWatch, Rollback, explain_out_of_memory, numerics_error
from sentcompress.training.card import provenance, render_card, resume_command
from sentcompress.training.checkpoints import (
    CheckpointStore,
    TrainingState,
    load_random_tensors,
    random_tensors,
    read_state,
    unusable,
)
from sentcompress.training.jobs import Job
from sentcompress.training.monitor import Monitor
from sentcompress.training.preparation import prepare, trainable
from sentcompress.training.run_folder import BEST, StageFolder
from sentcompress.training.saving import BestModel, Saver
from sentcompress.training.sharding import reshard
from sentcompress.training.step import Stepper, StepResult, Window


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def train(job: Job, stage: StageFolder, recipe: Recipe, console: Console | None = None) -> dict[str, float]:
    """Train a job in an open folder, from its newest checkpoint if there is one. All processes must call this.

    Returns:
        held-out figures at the end.

    Raises:
        InputError: the settings do not fit the model.
        ModelFolderError: no checkpoint can be used.
        NumericsError: loss or gradient became NaN or infinite, and ``on_anomaly`` could not help.
        OutOfMemoryError: names the settings to lower.
        StorageError: a file cannot be written; earlier checkpoints are intact.
        KeyboardInterrupt: Ctrl-C; the current step was finished and saved.
        TerminatedError: SIGTERM; the current step was finished and saved.
    """
    main = processes().is_main_process
    with Monitor(job.stage.name, stage.path, job.settings, main, console) as monitor:
        return _Training(job, stage, recipe, monitor).run()


@dataclass
class _Progress:
    """How far training has come; saved with each checkpoint.

    Attributes:
        step: steps done.
        next_batch: number of the first micro-batch of the next step, over all processes.
        tokens: real tokens trained on.
        seconds: spent in steps.
        figures: the newest held-out figures.
    """

    step: int = 0
    next_batch: int = 0
    tokens: int = 0
    seconds: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)


class _Training:
    """A stage in training."""

    def __init__(self, job: Job, stage: StageFolder, recipe: Recipe, monitor: Monitor) -> None:
        self.job, self.stage, self.recipe, self.monitor = job, stage, recipe, monitor
        ranks, settings = processes(), job.settings
        store = CheckpointStore(stage.checkpoints, settings.keep)
        checkpoint = store.latest(monitor.note)
        saved = read_state(checkpoint) if checkpoint else {}
        if checkpoint and int(saved["step"]) > settings.steps:
            why = f"it is at step {int(saved['step']):,}, but the run has {settings.steps:,} steps"
            raise unusable(checkpoint, why)
        self.progress = _Progress()
        self.best = BestModel(settings.keep_best, saved.get("best"))
        self.prepared = prepare(job, saved.get("precision"), monitor.note)
        self.state = TrainingState(
            job.model,
            self.prepared.optimizer.optimizer,
            self.prepared.parameter_names,
            self.prepared.average,
            ranks.process_index,
            ranks.num_processes,
        )
        self.saver = Saver(job, stage, recipe, store, self.state, settings.background_saves)
        self.stepper = Stepper(
            job,
            self.prepared.model,
            self.prepared.optimizer,
            self.prepared.accelerator,
            settings,
            LossWatch(settings),
        )
        self.rollback = Rollback(store, job.stage, monitor.note)
        if checkpoint:
            self._load(checkpoint)
            self.progress.seconds = float(saved.get("seconds", 0.0))
            self.progress.figures = dict(saved.get("figures", {}))
            monitor.progress.start = self.progress.step
            monitor.note(f"continuing from {checkpoint}")
        else:
            # The job drew its weights from the seed when it was built; dropout must differ between processes.
            seed_everything(recipe.seed + self.state.rank)

    def run(self) -> dict[str, float]:
        """Train to the end."""
        settings, progress, monitor = self.job.settings, self.progress, self.monitor
        monitor.start(progress.step)
        batches = self._batches()
        first, save_due = progress.step + 1, False
        memory_errors = explain_out_of_memory(self.job.stage.section, self.job.batch_fields)
        try:
            with Interruption() as interruption, memory_errors:
                window = Window(batches)
                while progress.step < settings.steps:
                    result = self._step(batches, interruption)
                    if self.monitor.main and progress.step == first:
                        self.stage.forget_previous()
                    if result.anomaly and settings.on_anomaly == "rollback":
                        self._roll_back(result.anomaly)
                        batches.close()
                        monitor.start(progress.step)
                        batches = self._batches()
                        window = Window(batches)
                        monitor.anomaly(progress.step, result.anomaly)
                        continue
                    if result.anomaly:
                        monitor.anomaly(progress.step, result.anomaly)
                    window.add(result)
                    last = progress.step == settings.steps
                    if last or progress.step % settings.log_every == 0:
                        self._log(window)
                        window = Window(batches)
                    self.saver.check()
                    with window.paused():
                        best = not last and self._is_due(settings.eval_every) and self._evaluate()
                        save_due = save_due or self._is_due(settings.save_every)
                        # After an anomaly wait for a good step: nobody should go back to these weights.
                        if last or result.interrupted or (save_due and not result.anomaly):
                            self._checkpoint(best)
                            save_due = False
                        elif best:
                            self.saver.best(self._card())
                    if result.interrupted and not last:
                        self._stop_early(result.terminated)
                if self._evaluate():
                    self.saver.best(self._card())
                self.saver.final(self._card(), self._about())
                monitor.note(f"done: {self.stage.path}")
                self._stop_if_signalled(interruption)
        finally:
            batches.close()
            monitor.close()
            self.saver.close()
        return progress.figures

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.progress.step % every == 0

    def _batches(self) -> Prefetcher:
        """This process's micro-batches from ``next_batch`` on."""
        job, world = self.job, self.state.world
        first = self.progress.next_batch + self.state.rank
        # A step counts all its micro-batches before it computes the first.
        depth = max(4, job.settings.gradient_accumulation)
        return prefetch(lambda i: job.batch(first + i * world), start=0, depth=depth)

    def _step(self, batches: Prefetcher, interruption: Interruption) -> StepResult:
        progress, settings = self.progress, self.job.settings
        number = progress.step
        try:
            result = self.stepper.step(number, batches, progress.next_batch, lambda: interruption.signal)
        except NumericsError as error:
            self.saver.writer.wait()  # a checkpoint may be on its way
            raise numerics_error(error, self.job.stage, self.saver.store) from None
        progress.step += 1
        progress.next_batch += settings.gradient_accumulation * self.state.world
        progress.seconds += result.seconds
        if self.state.average and not result.skipped:
            self.state.average.update(number)
        if not result.anomaly:
            progress.tokens += result.tokens
            self.rollback.last = None
        self.monitor.step(progress.step)
        return result

    def _roll_back(self, anomaly: str) -> None:
        """Restore a checkpoint, but continue with the data after the step that failed."""
        self.saver.wait()
        checkpoint = self.rollback.choose(anomaly)
        next_batch = self.progress.next_batch
        self._load(checkpoint)
        self.progress.next_batch = next_batch
        self.monitor.note(f"back to {checkpoint}, continuing with batch {next_batch}")

    def _load(self, checkpoint: Path) -> None:
        """Restore the weights, the random state and the position of a checkpoint."""
        saved = read_state(checkpoint)
        own_random_state = self.state.load(checkpoint)
        if self.prepared.accelerator.scaler is not None:
            self.prepared.accelerator.scaler.load_state_dict(saved["scaler"])
        recent = self.stepper.watch.recent
        recent.clear()
        recent.extend(saved.get("recent_losses", ()))
        self.progress.step = int(saved["step"])
        self.progress.next_batch = int(saved.get("next_batch", 0))
        self.progress.tokens = int(saved["tokens"])
        if not own_random_state:  # this process is new in the run: its dropout starts here
            seed_everything(self.recipe.seed + self.state.rank + self.progress.next_batch)

    def _log(self, window: Window) -> None:
        figures = window.figures()
        if figures:
            totals = {"tokens": self.progress.tokens, "seconds": round(self.progress.seconds, 3)}
            self.monitor.figures(self.progress.step, figures, totals)

    def _evaluate(self) -> bool:
        """Measure the held-out figures; return whether they are the best so far and the model is to be kept."""
        step, model = self.progress.step, self.job.model
        random_states = random_tensors()
        self.monitor.busy("evaluating", step)
        model.eval()
        with torch.no_grad(), self.state.final_weights(), self.prepared.accelerator.autocast():
            self.progress.figures = self.job.evaluate(model)
        reshard(model)
        load_random_tensors(random_states)  # the evaluation does not change the training after it
        self.monitor.heldout(step, self.progress.figures)
        improved = self.best.improved(self.progress.figures)
        if improved:
            self.monitor.note(f"best so far after step {step}: {improved}, kept in {BEST}/")
        return improved is not None

    def _checkpoint(self, best: bool) -> None:
        progress, scaler = self.progress, self.prepared.accelerator.scaler
        self.rollback.count = 0  # training got past the step that it went back for
        self.monitor.busy("saving", progress.step)
        values = {
            "step": progress.step,
            "next_batch": progress.next_batch,
            "recent_losses": list(self.stepper.watch.recent),
            "processes": self.state.world,
            "precision": self.prepared.precision,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "figures": _finite(progress.figures),
            "best": self.best.value,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        self.saver.checkpoint(progress.step, self._card(), values, best=best)
        if warning := self.saver.wait_warning():
            self.monitor.note(warning)

    def _card(self) -> str:
        progress = self.progress
        facts = {
            "steps": f"{progress.step} of {self.job.settings.steps}",
            "training_tokens": f"{progress.tokens:,}",
            "training_seconds": round(progress.seconds),
            "precision": f"{self.prepared.precision} on {self.prepared.accelerator.device}, "
            f"{self.state.world} process(es), {torch.get_num_threads()} thread(s)",
            "seed": self.recipe.seed,
        }
        return render_card(self.job.card(), self.recipe, self.stage.path, facts, progress.figures)

    def _about(self) -> dict[str, Any]:
        """``run.json`` of the finished stage."""
        return {
            "stage": self.job.stage.name,
            "fields": self.stage.record,
            **provenance(self.recipe),
            "steps": self.job.settings.steps,
            "tokens": self.progress.tokens,
            "trainable_parameters": sum(p.numel() for p in trainable(self.job.model).values()),
            "seconds": self.progress.seconds,
            "saving_seconds": round(self.saver.wait_seconds, 3),
            "precision": self.prepared.precision,
            "device": str(self.prepared.accelerator.device),
            "processes": self.state.world,
            "figures": _finite(self.progress.figures),
        }

    def _stop_early(self, terminated: bool) -> NoReturn:
        """Stop after a signal; the current step has been saved."""
        self.saver.wait()
        checkpoint = self.saver.store.path(self.progress.step)
        self.monitor.note(f"stopped after step {self.progress.step} and saved {checkpoint}")
        self.monitor.note(f"continue with: {resume_command()}")
        self._stop(terminated, f"stopped by SIGTERM; saved {checkpoint}")

    def _stop_if_signalled(self, interruption: Interruption) -> None:
        """The stage is done, but a signal in its last moments also stops the stages after it."""
        received = torch.tensor([interruption.signal is not None, interruption.signal == signal.SIGTERM])
        received = received.float().to(self.prepared.accelerator.device)
        if self.state.world > 1:
            received = self.prepared.accelerator.reduce(received)
        stop, terminated = (received > 0).tolist()
        if stop:
            self._stop(terminated, "done, then stopped by SIGTERM")

    def _stop(self, terminated: bool, why: str) -> NoReturn:
        """End as after SIGTERM, or as after Ctrl-C."""
        if terminated:
            raise TerminatedError(f"{self.job.stage.name}: {why}", fix=f"continue with: {resume_command()}")
        raise KeyboardInterrupt


def _finite(figures: dict[str, float]) -> dict[str, float]:
    """The figures that JSON can hold."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}
