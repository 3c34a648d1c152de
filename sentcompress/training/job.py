"""What differs between the four trainings: all the loop knows of one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from sentcompress.recipe import TrainingSettings
from sentcompress.training.card import Card
from sentcompress.training.step import Batch, StepOutput


class Job(Protocol):
    """What differs between the four trainings. Build one after :func:`seed_everything`."""

    @property
    def stage(self) -> str:
        """``pretrain``, ``vae``, ``graft`` or ``baseline``."""

    @property
    def settings(self) -> TrainingSettings:
        """Steps, learning rate and the rest."""

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of what it starts from (``sentcompress.files.folder_digest``), by name."""

    @property
    def batch_fields(self) -> tuple[str, ...]:
        """Fields of the recipe that shrink a micro-batch, named when memory runs out."""

    @property
    def width(self) -> int:
        """Hidden size, for ``precision: auto``."""

    @property
    def model(self) -> nn.Module:
        """What is trained; on the CPU at first."""

    def batch(self, index: int) -> Batch:
        """Micro-batch ``index`` of an infinite sequence: a pure function, called from another thread."""

    def loss(self, model: nn.Module, batch: Batch) -> StepOutput:
        """Run ``model`` (``self.model``, perhaps wrapped: call it, not its methods) on a batch."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out figures of ``self.model``, the most telling first."""

    @property
    def units(self) -> Iterable[nn.Module]:
        """Modules whose weights are gathered by themselves where the model is spread over processes: its blocks."""

    def state(self) -> dict[str, Tensor]:
        """The tensors that :meth:`save` is to write, whole in the first process; all processes ask for them."""

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write the model with these tensors, and its tokenizer; the loop adds ``recipe.yaml`` and the card."""

    def card(self) -> Card:
        """What the card says."""
