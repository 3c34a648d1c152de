"""One optimizer step, and the figures of the steps between two log lines."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sentcompress.errors import NumericsError
from sentcompress.recipe import TrainingSettings
from sentcompress.training.anomalies import MAX_SKIPPED, LossWatch
from sentcompress.training.sharding import whole

if TYPE_CHECKING:
    from sentcompress.training.jobs import Job

Batch = dict[str, Tensor]

WARMUP_SHARE = 0.05
"""Share of the steps for the warm-up, unless the recipe sets it."""


@dataclass(frozen=True)
class StepShare:
    """How much of a step a micro-batch is. A step is one large batch, however many micro-batches it is split into.

    Attributes:
        own: what the means of the loss are taken over, counted in this micro-batch (``job.counts``).
        total: the same, summed over the micro-batches of all processes.
    """

    own: dict[str, Tensor]
    total: dict[str, Tensor]

    def of(self, name: str) -> Tensor:
        """Scalar: the weight of this micro-batch's mean over ``name`` in the mean over the whole step."""
        return self.own[name] / self.total[name].clamp_min(1)


@dataclass
class StepOutput:
    """What a job computes from a micro-batch.

    Each figure is this micro-batch's summand of the step's figure: every mean times its :meth:`StepShare.of`.

    Attributes:
        loss: scalar to minimize.
        auxiliary_loss: minimized too, for parameters that train beside the model; not part of the reported loss.
        tokens: real tokens in the batch, for tokens/s.
        metrics: further scalars; all micro-batches have the same names.
        mask: bool, of every position the model computes, padding included; True where it holds data. None takes the
            batch's ``attention_mask``.
    """

    loss: Tensor
    tokens: int
    metrics: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    auxiliary_loss: Tensor | None = None


@dataclass
class StepResult:
    """An optimizer step, summed over all processes."""

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    positions: int
    """Positions computed, with padding."""
    filled: int
    """Positions computed that hold data."""
    seconds: float
    metrics: dict[str, float]
    interrupted: bool
    """A process received a signal to stop."""
    terminated: bool
    """That signal was SIGTERM."""
    skipped: bool
    """The weights did not change: fp16 overflowed, or there was an anomaly."""
    anomaly: str | None
    """Why the step was not taken, where the settings let the run continue."""


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """Learning rate of a step (0 is the first): linear warm-up, then cosine to the final share."""
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = round(WARMUP_SHARE * settings.steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, settings.steps - warmup))
    final = settings.final_learning_rate_share
    return settings.learning_rate * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


class Stepper:
    """Runs optimizer steps.

    Args:
        job: its ``counts`` and ``loss`` are called.
        model, optimizer: as ``accelerator.prepare`` returned them.
        watch: detects the steps that must not be taken.
    """

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        optimizer: Any,
        accelerator: Accelerator,
        settings: TrainingSettings,
        watch: LossWatch,
    ) -> None:
        self.job, self.model, self.optimizer = job, model, optimizer
        self.accelerator, self.settings, self.watch = accelerator, settings, watch
        self.skipped = 0

    def step(
        self, number: int, batches: Iterator[Batch], first: int, received_signal: Callable[[], int | None]
    ) -> StepResult:
        """Take step ``number`` (0 is the first).

        Args:
            batches: micro-batches of this process, in order.
            first: number of the step's first micro-batch, over all processes.
            received_signal: returns the signal that asked this process to stop, or None.

        Raises:
            NumericsError: loss or gradient is not finite, or a spike, and the settings say ``stop``, or it happened in
                too many steps in a row; the weights are as before.
        """
        began = time.perf_counter()
        settings, accelerator = self.settings, self.accelerator
        rate = learning_rate(number, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_share"]
        self.model.train()
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        tokens = positions = filled = 0
        micro_batches = [next(batches) for _ in range(settings.gradient_accumulation)]
        shares = self._shares(micro_batches)
        for batch, share in zip(micro_batches, shares, strict=True):
            batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
            last = share is shares[-1]
            # Gradients are exchanged once per step, with the last micro-batch.
            with nullcontext() if last else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    output = self.job.loss(self.model, batch, share)
                minimized = output.loss
                if output.auxiliary_loss is not None:
                    minimized = minimized + output.auxiliary_loss
                # The exchange averages over the processes, but the step's gradient is their sum.
                accelerator.backward(minimized * accelerator.num_processes)
            mask = batch.get("attention_mask") if output.mask is None else output.mask
            if mask is not None:
                positions += mask.numel()
                filled += int(mask.sum())
            losses.append(output.loss.detach().float())
            for name, value in output.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + value.detach().float()
            tokens += output.tokens
        norm = float(whole(accelerator.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)))
        own = torch.stack(losses)
        # The figures are exchanged once per step. Signals travel with them, so all processes stop in the same step.
        number_received = received_signal()
        stops = [float(number_received is not None), float(number_received == signal.SIGTERM)]
        counts = own.new_tensor([tokens, positions, filled, *stops])
        shared = torch.cat([torch.stack([own.sum(), *metrics.values()]), counts])
        if accelerator.num_processes > 1:
            shared = accelerator.reduce(shared)
        loss, *means, all_tokens, all_positions, all_filled, stop, terminate = shared.tolist()
        anomaly = self.watch.anomaly(loss, norm, scaled=accelerator.scaler is not None)
        if anomaly is None:
            self.optimizer.step()
            skipped = bool(self.optimizer.step_was_skipped)
        else:
            skipped = True
            if accelerator.scaler is not None:
                accelerator.scaler.update()
        self.optimizer.zero_grad()
        self.skipped = self.skipped + 1 if skipped else 0
        if anomaly or self.skipped:
            where = (
                f"step {number + 1}: {anomaly or 'fp16 overflow'} at batch {self._bad_batches(first, own)}"
            )
            if (anomaly and settings.on_anomaly == "stop") or self.skipped >= MAX_SKIPPED:
                after = f", {self.skipped} steps skipped in a row" if self.skipped > 1 else ""
                raise NumericsError(where + after)
            anomaly = anomaly and where
        return StepResult(
            loss=loss,
            grad_norm=norm,
            learning_rate=rate,
            tokens=int(all_tokens),
            positions=int(all_positions),
            filled=int(all_filled),
            seconds=time.perf_counter() - began,
            metrics=dict(zip(metrics, means, strict=True)),
            interrupted=stop > 0,
            terminated=terminate > 0,
            skipped=skipped,
            anomaly=anomaly,
        )

    def _shares(self, batches: list[Batch]) -> list[StepShare]:
        """Count every micro-batch of the step before the first is computed. All processes must call this."""
        device = self.accelerator.device
        with torch.no_grad(), self.accelerator.autocast():
            counted = [self.job.counts(batch) for batch in batches]
        names, sizes = list(counted[0]), [value.numel() for value in counted[0].values()]
        own = torch.stack([torch.cat([value.float().flatten() for value in one.values()]) for one in counted])
        own = own.to(device, non_blocking=True)
        total = own.sum(0)
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total)

        def named(flat: Tensor) -> dict[str, Tensor]:
            shaped = zip(counted[0].values(), flat.split(sizes), strict=True)
            return dict(zip(names, (part.view(value.shape) for value, part in shaped), strict=True))

        return [StepShare(named(one), named(total)) for one in own]

    def _bad_batches(self, first: int, own: Tensor) -> str:
        """This process's micro-batches with a NaN or infinite loss; all of the step's where there are none."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        indexes = range(first + rank, first + len(own) * world, world)
        bad = [i for i, value in zip(indexes, own.tolist(), strict=True) if not math.isfinite(value)]
        return ", ".join(map(str, bad or range(first, first + len(own) * world)))


class Window:
    """Figures of the steps since the last log line.

    Args:
        batches: the prefetcher, which counts the seconds that training waited for it.
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
        """Averages over the window; empty if none of its steps was taken."""
        results = [result for result in self.results if not result.anomaly]
        if not results:
            return {}
        seconds = max(1e-9, time.perf_counter() - self.began)
        positions = sum(result.positions for result in results)
        figures = {
            "loss": sum(result.loss for result in results) / len(results),
            "learning_rate": results[-1].learning_rate,
            "grad_norm": sum(result.grad_norm for result in results) / len(results),
            "tokens_per_second": sum(result.tokens for result in results) / seconds,
            "padding": 1 - sum(result.filled for result in results) / positions if positions else 0.0,
            "wait": min(1.0, (self.batches.wait_seconds - self.waited) / seconds),
        }
        for name in results[0].metrics:
            figures[name] = sum(result.metrics[name] for result in results) / len(results)
        return figures
