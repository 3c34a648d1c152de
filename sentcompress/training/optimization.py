"""Optimizer, learning-rate schedule and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sentcompress.recipe import TrainingSettings

WARMUP_SHARE = 0.05
"""Share of the steps spent warming up where the recipe does not say."""


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


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that learn, by name; a shared one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def build_optimizer(model: nn.Module, settings: TrainingSettings) -> tuple[torch.optim.AdamW, list[str]]:
    """AdamW that decays matrices only: biases, norms and single vectors are left alone.

    Returns:
        the optimizer, and the parameters' names in its order.
    """
    parameters = trainable(model)
    matrices = [name for name, parameter in parameters.items() if parameter.ndim >= 2]
    others = [name for name, parameter in parameters.items() if parameter.ndim < 2]
    groups = [
        {"params": [parameters[name] for name in matrices], "weight_decay": settings.weight_decay},
        {"params": [parameters[name] for name in others], "weight_decay": 0.0},
    ]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters.values())
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=settings.learning_rate, fused=fused
    )
    return optimizer, matrices + others


class WeightAverage:
    """Exponential moving average of the parameters that learn (the paper's EMA).

    Early on the decay is ``(1 + step) / (10 + step)`` where that is smaller, so that the average does not
    remember the random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = trainable(model)
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def update(self, step: int) -> None:
        """Take in the weights after a step (0 is the first)."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        current = [parameter.detach() for parameter in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), current, share)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take back what was saved of ``average``."""
        for name, average in self.average.items():
            average.copy_(tensors[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights within the block."""
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        try:
            self._put(self.average)
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
