"""One optimizer step, and the figures of the steps between two log lines."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sentcompress.errors import NumericsError
from sentcompress.recipe import TrainingSettings
from sentcompress.training.anomalies import MAX_SKIPPED, LossWatch
from sentcompress.training.optimization import learning_rate
from sentcompress.training.sharding import whole

Batch = dict[str, Tensor]


@dataclass
class StepOutput:
    """What a job makes of a micro-batch.

    Attributes:
        loss: scalar to minimize; the micro-batches of a step count equally.
        beside: a loss that is minimized too, of something that learns beside the model; not part of what is reported.
        tokens: real tokens in it, for tokens/s.
        metrics: further scalars, averaged over the micro-batches between two log lines.
        rows: ``[R, N]`` bool, True at cells that hold something, of the rows the model computes with their
            padding; None takes the batch's ``attention_mask``.
    """

    loss: Tensor
    tokens: int
    metrics: dict[str, float | Tensor] = field(default_factory=dict)
    rows: Tensor | None = None
    beside: Tensor | None = None


@dataclass
class StepResult:
    """An optimizer step, summed over all processes."""

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    cells: int
    """Positions computed, with padding."""
    real: int
    """Positions computed that hold a token."""
    seconds: float
    metrics: list[dict[str, float | Tensor]]
    """Of this process's micro-batches."""
    interrupted: bool
    """A process was asked to stop."""
    terminated: bool
    """By SIGTERM."""
    skipped: bool
    """The weights were left as they were: fp16 overflowed, or there was trouble."""
    trouble: str | None
    """Why the step was not taken, where the settings do not end the run for it."""


class Stepper:
    """Runs optimizer steps.

    Args:
        loss: ``job.loss``.
        model, optimizer: as ``accelerator.prepare`` returned them.
        watch: says which steps must not be taken.
    """

    def __init__(
        self,
        loss: Callable[[nn.Module, Batch], StepOutput],
        model: nn.Module,
        optimizer: Any,
        accelerator: Accelerator,
        settings: TrainingSettings,
        watch: LossWatch,
    ) -> None:
        self.loss, self.model, self.optimizer = loss, model, optimizer
        self.accelerator, self.settings, self.watch = accelerator, settings, watch
        self.skipped = 0

    def step(
        self, number: int, batches: Iterator[Batch], first: int, asked: Callable[[], int | None]
    ) -> StepResult:
        """Take step ``number`` (0 is the first).

        Args:
            batches: micro-batches of this process, in order.
            first: number of the step's first micro-batch, over all processes.
            asked: the signal by which this process was asked to stop, if it was.

        Raises:
            NumericsError: loss or gradient is not finite, or a spike, and the settings say ``stop``, or it went on for
                too long; the weights are as before.
        """
        began = time.perf_counter()
        settings, accelerator = self.settings, self.accelerator
        rate = learning_rate(number, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        losses: list[Tensor] = []
        metrics = []
        tokens = cells = real = 0
        for micro in range(settings.gradient_accumulation):
            batch = next(batches)
            batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
            last = micro == settings.gradient_accumulation - 1
            # Gradients are exchanged once a step, with the last micro-batch.
            with nullcontext() if last else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    output = self.loss(self.model, batch)
                minimized = output.loss if output.beside is None else output.loss + output.beside
                accelerator.backward(minimized / settings.gradient_accumulation)
            rows = batch.get("attention_mask") if output.rows is None else output.rows
            if rows is not None:
                cells += rows.numel()
                real += int(rows.sum())
            losses.append(output.loss.detach().float())
            metrics.append(output.metrics)
            tokens += output.tokens
        norm = float(whole(accelerator.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)))
        own = torch.stack(losses)
        # One exchange of figures a step; with it, all processes stop in the same step.
        signal_number = asked()
        stops = [float(signal_number is not None), float(signal_number == signal.SIGTERM)]
        counts = own.new_tensor([tokens, cells, real, *stops])
        shared = torch.cat([own.mean()[None], counts])
        if accelerator.num_processes > 1:
            shared = accelerator.reduce(shared)
        loss, all_tokens, all_cells, all_real, stop, terminate = shared.tolist()
        loss /= accelerator.num_processes
        trouble = self.watch.trouble(loss, norm, scaled=accelerator.scaler is not None)
        if trouble is None:
            self.optimizer.step()
            skipped = bool(self.optimizer.step_was_skipped)
        else:
            skipped = True
            if accelerator.scaler is not None:
                accelerator.scaler.update()
        self.optimizer.zero_grad()
        self.skipped = self.skipped + 1 if skipped else 0
        if trouble or self.skipped:
            where = f"step {number + 1}: {trouble or 'fp16 overflow'} at batch {self._broken(first, own)}"
            if (trouble and settings.on_trouble == "stop") or self.skipped >= MAX_SKIPPED:
                after = f", {self.skipped} steps skipped in a row" if self.skipped > 1 else ""
                raise NumericsError(where + after)
            trouble = trouble and where
        return StepResult(
            loss=loss,
            grad_norm=norm,
            learning_rate=rate,
            tokens=int(all_tokens),
            cells=int(all_cells),
            real=int(all_real),
            seconds=time.perf_counter() - began,
            metrics=metrics,
            interrupted=stop > 0,
            terminated=terminate > 0,
            skipped=skipped,
            trouble=trouble,
        )

    def _broken(self, first: int, own: Tensor) -> str:
        """Numbers of this process's micro-batches whose loss is no number; of the whole step where none is."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        indexes = range(first + rank, first + len(own) * world, world)
        broken = [i for i, value in zip(indexes, own.tolist(), strict=True) if not math.isfinite(value)]
        return ", ".join(map(str, broken or range(first, first + len(own) * world)))


class Window:
    """Figures of the steps since the last log line.

    Args:
        batches: the prefetcher, which counts the seconds it was waited for.
    """

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.results: list[StepResult] = []
        self.began = time.perf_counter()
        self.waited = batches.wait_seconds

    def add(self, result: StepResult) -> None:
        self.results.append(result)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time within the block does not count."""
        start = time.perf_counter()
        yield
        self.began += time.perf_counter() - start

    def figures(self) -> dict[str, float]:
        """Averages over the window; nothing where no step of it was taken."""
        results = [result for result in self.results if not result.trouble]
        if not results:
            return {}
        seconds = max(1e-9, time.perf_counter() - self.began)
        cells = sum(result.cells for result in results)
        figures = {
            "loss": sum(result.loss for result in results) / len(results),
            "learning_rate": results[-1].learning_rate,
            "grad_norm": sum(result.grad_norm for result in results) / len(results),
            "tokens_per_second": sum(result.tokens for result in results) / seconds,
            "padding": 1 - sum(result.real for result in results) / cells if cells else 0.0,
            "wait": min(1.0, (self.batches.wait_seconds - self.waited) / seconds),
        }
        rows = [row for result in results for row in result.metrics]
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [float(row[name]) for row in rows if name in row]
            figures[name] = sum(values) / len(values)
        return figures
