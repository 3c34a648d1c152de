"""The one training loop: token-level pretraining, SentenceVAE, graft and baseline are jobs of it."""

from __future__ import annotations

import math
import random
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from rich.console import Console

from sentcompress.distributed import Interruption, on_cpu, processes
from sentcompress.errors import InputError, NumericsError, TerminatedError
from sentcompress.recipe import Recipe
from sentcompress.text.prefetch import Prefetcher, prefetch
from sentcompress.training import checkpoints as saved
from sentcompress.training.anomalies import MAX_ROLLBACKS, LossWatch
from sentcompress.training.card import provenance, render_card, resume_command
from sentcompress.training.heartbeat import Heartbeat
from sentcompress.training.job import Job
from sentcompress.training.memory import explain_out_of_memory, recompute_activations
from sentcompress.training.monitor import MetricsLog, TrainingProgress
from sentcompress.training.optimization import WeightAverage, build_optimizer, trainable
from sentcompress.training.precision import choose_precision
from sentcompress.training.run_folder import BEST, SECTIONS, StageFolder, stage_record
from sentcompress.training.saving import Saver
from sentcompress.training.sharding import let_go, spread
from sentcompress.training.state import TrainingState
from sentcompress.training.step import Batch, StepOutput, Stepper, StepResult, Window

__all__ = ["Batch", "Job", "StepOutput", "run_job", "seed_everything"]

MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
"""Our names of precisions to accelerate's."""


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def run_job(
    job: Job,
    folder: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, float]:
    """Train a job in a stage's folder. A finished stage is recognised and left as it is.

    Args:
        folder: ``OUT/<stage>``.
        resume: go on from the newest whole checkpoint, or start where there is none.
        overwrite: replace the run that is there, once the new one has taken its first step.

    Returns:
        held-out figures at the end.

    Raises:
        InputError: the folder holds another run or one that is going on, or the settings do not fit the model.
        NumericsError: loss or gradient became NaN or infinite, and ``on_trouble`` had no more to offer.
        OutOfMemoryError: names the settings that lower it.
        StorageError: a file cannot be written; what was saved before is intact.
        KeyboardInterrupt: Ctrl-C; the step was finished and saved.
        TerminatedError: SIGTERM; the step was finished and saved.
    """
    stage = StageFolder(folder, job.stage, stage_record(job.stage, recipe, job.inputs))
    ranks = processes()
    with stage.locked() if ranks.is_main_process else nullcontext():
        if ranks.is_main_process:
            stage.recover()
        ranks.wait_for_everyone()
        stage.check(resume=resume, overwrite=overwrite)
        if stage.finished and not overwrite:
            return stage.figures()
        ranks.wait_for_everyone()  # everyone has read before anything changes
        if ranks.is_main_process:
            stage.open(overwrite=overwrite, about=provenance(recipe))
        ranks.wait_for_everyone()
        try:
            with Heartbeat(folder, job.settings.steps, shown=ranks.is_main_process) as heartbeat:
                return _Run(job, stage, recipe, heartbeat, console).train()
        finally:
            if ranks.is_main_process:
                stage.restore()


class _Run:
    """A stage being trained, from its newest whole checkpoint if there is one."""

    def __init__(
        self, job: Job, stage: StageFolder, recipe: Recipe, heartbeat: Heartbeat, console: Console | None
    ) -> None:
        self.heartbeat = heartbeat
        self.job, self.stage, self.recipe, self.settings = job, stage, recipe, job.settings
        ranks = processes()
        self.main, self.world, self.rank = (
            ranks.is_main_process,
            ranks.num_processes,
            ranks.process_index,
        )
        self.progress = TrainingProgress(job.stage, self.settings.steps, shown=self.main, console=console)
        self.store = saved.CheckpointStore(stage.checkpoints, self.settings.keep)
        checkpoint = self.store.latest(self.progress.note)
        state = saved.read_state(checkpoint) if checkpoint else {}
        self.start = int(state.get("step", 0))
        if checkpoint and self.start > self.settings.steps:
            why = f"is of step {self.start:,}, and the run has {self.settings.steps:,}"
            raise saved.unusable(checkpoint, why)
        self.next_batch = int(state.get("next_batch", 0))
        self.watch = LossWatch(self.settings)
        self.rollbacks = 0
        self.gone_back: Path | None = None  # to this checkpoint, and no step was taken since
        self.tokens = 0
        self.seconds = float(state.get("seconds", 0.0))
        self.figures: dict[str, float] = dict(state.get("figures", {}))
        self.best: float | None = state.get("best")
        self.accelerator = self._accelerator(state.get("precision"))
        self._prepare()
        if checkpoint:
            self._load(checkpoint, state)
            self.progress.start = self.start
            self.progress.note(f"going on from {checkpoint}")
        else:
            # Weights were drawn from the seed when the job was built; dropout must differ between processes.
            seed_everything(recipe.seed + self.rank)

    def _accelerator(self, before: str | None) -> Accelerator:
        ranks = processes()
        choice = [before, "as before"]
        if before is None:
            if self.main:
                choice = [*choose_precision(self.settings.precision, self.job.width, ranks.device)]
            if self.world > 1:
                broadcast_object_list(choice)
        self.precision = str(choice[0])
        self.progress.note(f"{self.precision} on {ranks.device} ({choice[1]})")
        # Accelerate keeps one precision for the whole process, but a recipe's stages may differ.
        AcceleratorState._reset_state()
        # One latent has nothing to choose from: queries and keys of the attention to it are in no product.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        return Accelerator(mixed_precision=MIXED[self.precision], cpu=on_cpu(), kwargs_handlers=[unused])

    def _prepare(self) -> None:
        model, settings = self.job.model, self.settings
        if not trainable(model):
            raise InputError("nothing of the model learns with these settings", fix="choose another 'tune'")
        if settings.gradient_checkpointing:
            if not getattr(model, "supports_gradient_checkpointing", False):
                raise InputError(
                    f"{SECTIONS[self.job.stage]}.gradient_checkpointing: {type(model).__name__} cannot do it",
                    fix=f"set it to false, and lower {' or '.join(self.job.batch_fields)} instead",
                )
            recompute_activations(model)
        spreading = settings.distributed == "fsdp" and self.world > 1
        if spreading:
            spread(model, self.job.units, self.accelerator.device, self.world)
        else:
            model.to(self.accelerator.device)
        if settings.compile:
            model.compile()  # in place, so that weights keep their names
        optimizer, names = build_optimizer(model, settings)
        self.average = WeightAverage(model, settings.ema) if settings.ema else None
        self.optimizer = self.accelerator.prepare(optimizer)
        prepared = model if spreading else self.accelerator.prepare(model)
        self.state = TrainingState(
            model, self.optimizer.optimizer, names, self.average, self.rank, self.world
        )
        self.saver = Saver(
            self.job, self.stage, self.recipe, self.store, self.state, settings.background_saves
        )
        self.stepper = Stepper(
            self.job.loss, prepared, self.optimizer, self.accelerator, settings, self.watch
        )

    def _load(self, checkpoint: Path, state: dict[str, Any]) -> None:
        own_random_state = self.state.load(checkpoint)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.watch.recent.clear()
        self.watch.recent.extend(state.get("recent_losses", ()))
        self.tokens = int(state["tokens"])
        if not own_random_state:  # a process that was not there before: its dropout is its own from here on
            seed_everything(self.recipe.seed + self.rank + int(state["next_batch"]))

    def train(self) -> dict[str, float]:
        """Train to the end; raises as :func:`run_job` says."""
        settings, job = self.settings, self.job
        log, batches = self._log_from(self.start), self._batches()
        try:
            with Interruption() as interruption, explain_out_of_memory(SECTIONS[job.stage], job.batch_fields):
                window = Window(batches)
                done, due = self.start, False
                while done < settings.steps:
                    done += 1
                    result = self._step(done, batches, interruption)
                    if result.trouble and settings.on_trouble == "rollback":
                        done = self._roll_back(result.trouble)
                        batches.close()
                        if log:
                            log.close()
                        log, batches = self._log_from(done), self._batches()
                        window = Window(batches)
                        self._note_trouble(done, result.trouble, log)
                        continue
                    if result.trouble:
                        self._note_trouble(done, result.trouble, log)
                    window.add(result)
                    last = done == settings.steps
                    if done % settings.log_every == 0 or last:
                        self._log(done, window, log)
                        window = Window(batches)
                    self.saver.check()
                    with window.paused():
                        best = False
                        if settings.eval_every and done % settings.eval_every == 0 and not last:
                            self._evaluate(done, log)
                            best = self._is_best(done)
                        due = due or (settings.save_every is not None and done % settings.save_every == 0)
                        # Weights whose loss is no number are nothing to go back to: one is owed until they are better.
                        if (due and not result.trouble) or last or result.interrupted:
                            self._checkpoint(done, best)
                            due = False
                        elif best:
                            self.saver.best(self._card(done))
                    if result.interrupted and not last:
                        self.saver.wait()
                        self._say_how_to_go_on(done)
                        self._end(result.terminated, f"asked to end (SIGTERM); saved {self.store.path(done)}")
                self._evaluate(settings.steps, log)
                if self._is_best(settings.steps):
                    self.saver.best(self._card(settings.steps))
                self._finish()
                self._end_if_asked(interruption)
        finally:
            batches.close()
            self.progress.close()
            if log:
                log.close()
            self.saver.close()
        return self.figures

    def _log_from(self, step: int) -> MetricsLog | None:
        """``metrics.jsonl`` after the lines up to ``step``, in the first process."""
        if not self.main:
            return None
        return MetricsLog(self.stage.path, step, self.settings.tensorboard, self.settings.wandb)

    def _batches(self) -> Prefetcher:
        """This process's micro-batches from ``next_batch`` on."""
        first, job = self.next_batch + self.rank, self.job
        return prefetch(lambda i: job.batch(first + i * self.world), start=0)

    def _note_trouble(self, done: int, trouble: str, log: MetricsLog | None) -> None:
        self.progress.note(f"{trouble}; not taken")
        if log:
            log.write(done, {"event": trouble})

    def _roll_back(self, trouble: str) -> int:
        """Go back to the newest checkpoint that is any good, but not in the data; return its step."""
        self.saver.wait()
        checkpoint = self.store.latest(self.progress.note)
        if checkpoint is not None and checkpoint == self.gone_back:
            # Other data, and the first step fails again: it is the weights.
            step = int(saved.read_state(checkpoint)["step"])
            older = self.store.latest(self.progress.note, before=step)
            processes().wait_for_everyone()  # all have looked
            if older is not None:
                self.progress.note(f"{checkpoint} is no better: deleted")
                if self.main:
                    self.store.drop(step)
                checkpoint = older
        if checkpoint is None or self.rollbacks == MAX_ROLLBACKS:
            why = f"after {self.rollbacks} rollbacks" if checkpoint else "nothing was saved to go back to"
            raise NumericsError(
                f"{self.job.stage}: {trouble}, {why}",
                fix=f"lower {SECTIONS[self.job.stage]}.learning_rate, raise warmup_steps, or set save_every",
            )
        self.rollbacks += 1
        self.gone_back = checkpoint
        state = saved.read_state(checkpoint)
        self._load(checkpoint, state)
        self.progress.note(f"back to {checkpoint}, on with batch {self.next_batch}")
        return int(state["step"])

    def _step(self, done: int, batches: Prefetcher, interruption: Interruption) -> StepResult:
        try:
            result = self.stepper.step(done - 1, batches, self.next_batch, lambda: interruption.signal)
        except NumericsError as error:
            self.saver.writer.wait()  # one may be on its way
            steps = self.store.steps()
            good = str(self.store.path(steps[-1])) if steps else "none was saved yet"
            raise NumericsError(
                f"{self.job.stage}: {error.message}; last good checkpoint: {good}",
                fix=f"lower {SECTIONS[self.job.stage]}.learning_rate, raise warmup_steps, or use fp32; "
                "if it is always this batch, look at its text; on_trouble: skip or rollback go on without it",
            ) from None
        self.next_batch += self.settings.gradient_accumulation * self.world
        if self.main and done == self.start + 1:
            self.stage.forget_previous()
        if self.average and not result.skipped:
            self.average.update(done - 1)
        if not result.trouble:
            self.tokens += result.tokens
            self.gone_back = None
        self.seconds += result.seconds
        self.progress.advance(done)
        self.heartbeat.beat("training", done)
        return result

    def _log(self, done: int, window: Window, log: MetricsLog | None) -> None:
        figures = window.figures()
        if not figures:
            return
        self.progress.update(done, figures)
        self.heartbeat.beat("training", done, figures)
        if log:
            log.write(done, figures | {"tokens": self.tokens, "seconds": round(self.seconds, 3)})

    def _evaluate(self, done: int, log: MetricsLog | None) -> None:
        before = saved.random_tensors()
        self.heartbeat.beat("evaluating", done)
        model = self.job.model
        model.eval()
        with torch.no_grad(), self.state.final_weights(), self.accelerator.autocast():
            self.figures = self.job.evaluate(model)
        let_go(model)
        saved.load_random_tensors(before)  # training goes on as if nothing had been measured
        self.progress.heldout(done, self.figures)
        if log:
            log.write(done, {"eval": self.figures})

    def _card(self, done: int) -> str:
        facts = {
            "steps": f"{done} of {self.settings.steps}",
            "training_tokens": f"{self.tokens:,}",
            "training_seconds": round(self.seconds),
            "precision": f"{self.precision} on {self.accelerator.device}, {self.world} process(es), "
            f"{torch.get_num_threads()} thread(s)",
            "seed": self.recipe.seed,
        }
        return render_card(self.job.card(), self.recipe, self.stage.path, facts, self.figures)

    def _checkpoint(self, done: int, best: bool) -> None:
        self.rollbacks = 0  # it got past what it went back for
        self.heartbeat.beat("saving", done)
        scaler = self.accelerator.scaler
        values = {
            "step": done,
            "next_batch": self.next_batch,
            "recent_losses": list(self.watch.recent),
            "processes": self.world,
            "precision": self.precision,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "figures": _numbers(self.figures),
            "best": self.best,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        self.saver.checkpoint(done, self._card(done), values, best=best)
        if complaint := self.saver.complaint():
            self.progress.note(complaint)

    def _is_best(self, done: int) -> bool:
        """Whether the weights are to be kept: the first held-out figure has never been lower."""
        if not self.settings.keep_best or not self.figures:
            return False
        name, value = next(iter(self.figures.items()))
        # Not "value >= best": what is no number is not the best, and nothing is worse than it.
        if not math.isfinite(value) or (self.best is not None and not value < self.best):
            return False
        self.best = value
        self.progress.note(f"best so far after step {done}: {name} {value:.4g}, kept in {BEST}/")
        return True

    def _end_if_asked(self, interruption: Interruption) -> None:
        """The stage is done, but whoever asked for an end in its last moments wants none after it."""
        asked = torch.tensor([interruption.signal is not None, interruption.signal == signal.SIGTERM])
        asked = asked.float().to(self.accelerator.device)
        if self.world > 1:
            asked = self.accelerator.reduce(asked)
        stop, terminated = (asked > 0).tolist()
        if stop:
            self._end(terminated, "done, and asked to end (SIGTERM)")

    def _end(self, terminated: bool, why: str) -> NoReturn:
        """End as Ctrl-C does, or as SIGTERM."""
        if terminated:
            raise TerminatedError(f"{self.job.stage}: {why}", fix=f"go on with: {resume_command()}")
        raise KeyboardInterrupt

    def _say_how_to_go_on(self, done: int) -> None:
        self.progress.note(f"stopped after step {done} and saved {self.store.path(done)}")
        self.progress.note(f"go on with: {resume_command()}")

    def _finish(self) -> None:
        about = {
            "stage": self.job.stage,
            "fields": self.stage.record,
            **provenance(self.recipe),
            "steps": self.settings.steps,
            "tokens": self.tokens,
            "trainable_parameters": sum(p.numel() for p in trainable(self.job.model).values()),
            "seconds": self.seconds,
            "saving_seconds": round(self.saver.held_up, 3),
            "precision": self.precision,
            "device": str(self.accelerator.device),
            "processes": self.world,
            "figures": _numbers(self.figures),
        }
        self.saver.final(self._card(self.settings.steps), about)
        self.progress.note(f"done: {self.stage.path}")


def _numbers(figures: dict[str, float]) -> dict[str, float]:
    """Those that JSON can hold."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}
