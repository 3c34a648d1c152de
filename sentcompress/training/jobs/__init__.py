"""The six trainings. A job is everything the training loop needs to know about one of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from sentcompress.recipe import TrainingSettings
from sentcompress.training.card import Card
from sentcompress.training.run_folder import Stage
from sentcompress.training.step import Batch, StepOutput, StepShare


class Job(Protocol):
    """One training. Seed the random generators (:func:`~sentcompress.training.loop.seed_everything`), then build it."""

    @property
    def stage(self) -> Stage:
        """The stage it trains."""

    @property
    def settings(self) -> TrainingSettings:
        """Steps, learning rate and the other settings."""

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of what it starts from (``sentcompress.files.folder_digest``), by name."""

    @property
    def batch_fields(self) -> tuple[str, ...]:
        """Recipe fields that shrink a micro-batch; an out-of-memory message names them."""

    @property
    def model(self) -> nn.Module:
        """The model to train; on the CPU at first."""

    def batch(self, index: int) -> Batch:
        """Micro-batch ``index`` of an infinite sequence: a pure function, called from another thread."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """What the means of the loss are taken over, counted in a micro-batch on the CPU; summed over the step."""

    def loss(self, model: nn.Module, batch: Batch, share: StepShare) -> StepOutput:
        """Run ``model`` (``self.model`` or a wrapper: call it, not its methods) on a micro-batch of a step."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out figures of ``self.model``, the most important first."""

    @property
    def units(self) -> Iterable[nn.Module]:
        """Modules whose weights are gathered one at a time when the model is sharded: its blocks."""

    def state(self) -> dict[str, Tensor]:
        """The tensors for :meth:`save`, complete in the first process. All processes must call this."""

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write the model with these tensors, and its tokenizer. The caller adds ``recipe.yaml`` and the card."""

    def card(self) -> Card:
        """The contents of the model card."""
