"""What training must remember to go on exactly: weights, the optimizer's moments, averages, random states."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sentcompress.training import checkpoints as saved
from sentcompress.training.optimization import WeightAverage
from sentcompress.training.sharding import is_spread


@dataclass
class TrainingState:
    """The tensors of a run.

    Args:
        model, optimizer, average: in training.
        names: of the optimizer's parameters, in its order.
        rank, world: which process this is, of how many.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    names: list[str]
    average: WeightAverage | None
    rank: int
    world: int

    def tensors(self) -> dict[str, Tensor]:
        """All of them by ``group/name``, not copied. All processes must ask for them.

        Of a model that is spread each process has its part, and its own random state; else the first process has those
        of all.
        """
        random = saved.grouped(str(self.rank), saved.random_tensors())
        if self.world > 1 and not is_spread(self.model):
            random = {name: value for part in gather_object([random]) for name, value in part.items()}
        tensors = saved.grouped("weights", saved.model_tensors(self.model))
        tensors |= saved.grouped("optimizer", saved.optimizer_tensors(self.optimizer, self.names))
        tensors |= saved.grouped("random", random)
        if self.average:
            tensors |= saved.grouped("average", self.average.average)
        return tensors

    def load(self, checkpoint: Path) -> bool:
        """Take back what :meth:`tensors` gave, in another number of processes perhaps.

        Returns:
            whether this process's random state was there.

        Raises:
            ModelFolderError: the checkpoint is of another model, or its tensors are not what was saved.
        """
        try:
            return self._load(checkpoint)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise saved.unusable(checkpoint, f"its training state cannot be taken back: {error}") from error

    def _load(self, checkpoint: Path) -> bool:
        tensors = saved.read_tensors(checkpoint, dict(self.model.named_parameters()))
        saved.load_model_tensors(self.model, saved.ungrouped("weights", tensors), checkpoint)
        moments = saved.ungrouped("optimizer", tensors)
        saved.load_optimizer_tensors(self.optimizer, self.names, moments)
        if self.average:
            self.average.load(saved.ungrouped("average", tensors))
        random = saved.ungrouped(f"random/{self.rank}", tensors)
        if random:
            saved.load_random_tensors(random)
        return bool(random)

    def final_weights(self) -> AbstractContextManager[None]:
        """A context in which the model has the weights that count: the averaged ones, if there are any."""
        return self.average.in_place() if self.average else nullcontext()


def snapshot(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the computer's memory, which training does not change; what shares its memory still does."""
    copies: dict[tuple[object, ...], Tensor] = {}
    result = {}
    for name, tensor in tensors.items():
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor  # what is spread stays so
        place = (own.untyped_storage().data_ptr(), own.storage_offset(), tensor.shape, own.stride())
        if place not in copies:
            copies[place] = tensor.detach().to("cpu", copy=True)
        result[name] = copies[place]
    return result
