"""Gets a model ready to train: precision, devices, optimizer, averaged weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from torch import Tensor, nn

from sentcompress.distributed import on_cpu, processes
from sentcompress.errors import InputError
from sentcompress.recipe import TrainingSettings
from sentcompress.training.anomalies import explain_out_of_memory
from sentcompress.training.jobs import Job
from sentcompress.training.sharding import shard_model
from sentcompress.training.step import StepShare
from sentcompress.training.tuning import recompute_activations, unreached_weights

ACCELERATE_NAMES = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
"""Accelerate's names for the precisions."""
MIN_SPEEDUP = 1.2
"""bf16 must be this much faster than fp32 for ``auto`` to choose it."""
MEASURED_ROUNDS = 4
"""How often both precisions are timed, unless that takes long."""
ENOUGH_SECONDS = 10
"""After so long, no further round begins."""


@dataclass
class Prepared:
    """A model ready to train.

    Attributes:
        precision: ``fp32``, ``bf16`` or ``fp16``.
        accelerator: moves, scales and exchanges gradients.
        model: what to call in a step; the job's model, or a wrapper around it.
        optimizer: as accelerate wrapped it.
        parameter_names: in the order of the optimizer.
        average: averaged weights, or None.
    """

    precision: str
    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    parameter_names: list[str]
    average: WeightAverage | None


def prepare(job: Job, precision: str | None, note: Callable[[str], None]) -> Prepared:
    """Move a job's model to its devices and build its optimizer. All processes must call this.

    Args:
        precision: of the checkpoint that training continues from; None chooses by the job's settings.
        note: prints a line.

    Raises:
        InputError: the settings do not fit the model.
    """
    model, settings = job.model, job.settings
    if not trainable(model):
        raise InputError(
            f"{job.stage.section}: these settings leave no trainable parameters",
            fix=f"choose another {job.stage.section}.tune",
        )
    if settings.gradient_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise InputError(
                f"{job.stage.section}.gradient_checkpointing: {type(model).__name__} does not support it",
                fix=f"set it to false, and lower {' or '.join(job.batch_fields)} instead",
            )
        recompute_activations(model)
    precision = _shared_precision(job, precision, note)
    # Accelerate keeps one precision for the whole process, but the stages of a recipe may differ.
    AcceleratorState._reset_state()
    if frozen := unreached_weights(job.units):
        note(frozen)
    # With a single latent, attention over it has no choice to make: its queries and keys get no gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(
        mixed_precision=ACCELERATE_NAMES[precision], cpu=on_cpu(), kwargs_handlers=[unused]
    )
    sharded = settings.distributed == "fsdp" and accelerator.num_processes > 1
    if sharded:
        shard_model(model, job.units, accelerator.device, accelerator.num_processes)
    else:
        model.to(accelerator.device)
    if settings.compile:
        model.compile()  # in place, so that the weights keep their names
    optimizer, names = build_optimizer(model, settings)
    average = WeightAverage(model, settings.ema) if settings.ema else None
    return Prepared(
        precision=precision,
        accelerator=accelerator,
        optimizer=accelerator.prepare(optimizer),
        model=model if sharded else accelerator.prepare(model),
        parameter_names=names,
        average=average,
    )


def _shared_precision(job: Job, saved: str | None, note: Callable[[str], None]) -> str:
    """The precision of the run: the saved one, or the first process's choice."""
    ranks = processes()
    choice = [saved, "as before"]
    if saved is None:
        if ranks.is_main_process:
            choice = [*choose_precision(job, ranks.device)]
        if ranks.num_processes > 1:
            broadcast_object_list(choice)
    note(f"{choice[0]} on {ranks.device} ({choice[1]})")
    return str(choice[0])


def choose_precision(job: Job, device: torch.device) -> tuple[str, str]:
    """Resolve a job's ``precision``. ``auto`` takes bf16 where it is faster: on GPUs that have it, and on some CPUs.

    How much faster depends on the model. With small ones, what bf16 saves in products may be lost in attention and in
    casts, so on a CPU the job's own forward and backward pass is timed.

    Args:
        job: with its model on the CPU.
        device: where it will run.

    Returns:
        ``fp32``, ``bf16`` or ``fp16``, and the reason in one line.

    Raises:
        InputError: fp16 without a GPU.
        OutOfMemoryError: a micro-batch does not fit into memory.
    """
    wanted = job.settings.precision
    if wanted == "fp16" and device.type == "cpu":
        raise InputError(
            "precision: fp16 needs a GPU, and this run is on the CPU", fix="use auto, fp32 or bf16"
        )
    if wanted != "auto":
        return wanted, "set in the recipe"
    if device.type != "cpu":
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU has it"
        return "fp32", "bf16 is chosen on CPUs and CUDA GPUs that have it"
    if job.settings.distributed == "fsdp" and processes().num_processes > 1:
        return "fp32", "not measured: one process may not hold the whole model"
    with explain_out_of_memory(job.stage.section, job.batch_fields):
        seconds = step_seconds(job)
    ratio = seconds["fp32"] / seconds["bf16"]
    times = f"{max(ratio, 1 / ratio):.1f}x {'faster' if ratio >= 1 else 'slower'}"
    return ("bf16" if ratio >= MIN_SPEEDUP else "fp32"), f"bf16 measured {times}, forward and backward pass"


def step_seconds(job: Job) -> dict[str, float]:
    """Best time on the CPU of a forward and backward pass over a job's first micro-batch, by precision, in turns."""
    batch, model = job.batch(0), job.model.train()
    counts = job.counts(batch)
    best = {"fp32": math.inf, "bf16": math.inf}
    began = time.perf_counter()
    for _ in range(MEASURED_ROUNDS):  # the first one is a warm-up
        for precision in best:
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                output = job.loss(model, batch, StepShare(counts, counts))
            auxiliary = 0.0 if output.auxiliary_loss is None else output.auxiliary_loss
            (output.loss + auxiliary).backward()
            best[precision] = min(best[precision], time.perf_counter() - start)
            model.zero_grad()
        if time.perf_counter() - began > ENOUGH_SECONDS:
            break
    return best


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name; a shared one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def build_optimizer(model: nn.Module, settings: TrainingSettings) -> tuple[torch.optim.AdamW, list[str]]:
    """AdamW with weight decay on matrices only, not on biases, norms and single vectors.

    A graft's LLM may have a learning rate of its own: ``rate_share`` of each group is its share of ``learning_rate``.

    Returns:
        the optimizer, and the parameters' names in its order.
    """
    parameters = trainable(model)
    llm_rate = getattr(settings, "backbone_learning_rate", None) or settings.learning_rate
    groups: dict[tuple[float, float], list[str]] = {}
    for name, parameter in parameters.items():
        decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
        rate = llm_rate if name.startswith("backbone.") else settings.learning_rate
        groups.setdefault((decay, rate / settings.learning_rate), []).append(name)
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters.values())
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [parameters[name] for name in names],
                "weight_decay": decay,
                "rate_share": share,
            }
            for (decay, share), names in groups.items()
        ],
        lr=settings.learning_rate,
        fused=fused,
    )
    return optimizer, [name for names in groups.values() for name in names]


class WeightAverage:
    """Exponential moving average of the trainable parameters (the paper's EMA).

    In early steps the decay is ``(1 + step) / (10 + step)`` where that is smaller, so that the average forgets the
    random initial weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = trainable(model)
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def update(self, step: int) -> None:
        """Add the weights after a step (0 is the first)."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        current = [parameter.detach() for parameter in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), current, share)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore a saved ``average``."""
        for name, average in self.average.items():
            average.copy_(tensors[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the model has the averaged weights."""
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        try:
            self._copy_to_model(self.average)
            yield
        finally:
            self._copy_to_model(kept)

    @torch.no_grad()
    def _copy_to_model(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
