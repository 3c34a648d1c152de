"""Checkpoints: an ordinary model folder plus everything needed to continue training exactly.

Nothing is pickled: tensors are in safetensors, the rest is JSON. A manifest records the size and digest of each file.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from accelerate.utils import gather_object
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sentcompress.errors import ModelFolderError
from sentcompress.files import (
    damage,
    manifest,
    read_json,
    set_aside,
    storage_errors,
    temporary_path,
    whole_folder,
)
from sentcompress.training.sharding import read_shards, shard_like

if TYPE_CHECKING:
    from sentcompress.training.preparation import WeightAverage

MANIFEST = "manifest.json"
TENSORS = "training_state.safetensors"
SHARDS = "training_state"
"""A folder of shards, one per process, that replaces the file above when the model is sharded."""
STATE = "training_state.json"


class CheckpointStore:
    """The ``checkpoints`` folder of a stage.

    Args:
        folder: the folder.
        keep: number of checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, damaged or not, oldest first."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return sorted(
            int(path.name[5:]) for path in found if path.name[5:].isdecimal() and path.name.isascii()
        )

    def shards(self, step: int) -> Path:
        """The folder in which all processes write their shards while the first one saves the rest."""
        return temporary_path(self.path(step)) / SHARDS

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        write_tensors: Callable[[Path], None],
        state: dict[str, Any],
    ) -> Path:
        """Write a checkpoint completely or not at all, then delete old ones so that ``keep`` remain.

        Args:
            step: steps done.
            write: writes the model into a folder.
            write_tensors: writes the training state there, such as :func:`write_tensors`.
            state: JSON values.

        Raises:
            StorageError: the disk is full or not writable; earlier checkpoints are unchanged.
        """
        path = self.path(step)
        with whole_folder(path) as temporary:
            write(temporary)
            write_tensors(temporary)
            (temporary / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            files = manifest(temporary)
            (temporary / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1))
        self.drop(*self.steps()[: -self.keep])
        return path

    def drop(self, *steps: int) -> None:
        """Delete checkpoints, and the remains of interrupted deletions. Raises StorageError if that is refused."""
        for step in steps:
            with storage_errors(self.folder):
                set_aside(self.path(step))
        for left in self.folder.glob(".step-*.gone"):  # also of runs that were killed
            shutil.rmtree(left, ignore_errors=True)

    def latest(self, warn: Callable[[str], None], before: int | None = None) -> Path | None:
        """The newest undamaged checkpoint; ``warn`` gets a line about each damaged one after it.

        Args:
            before: consider only checkpoints of earlier steps.

        Returns:
            its folder, or None if there is no checkpoint at all.

        Raises:
            ModelFolderError: all checkpoints are damaged.
        """
        problems = []
        for step in reversed(self.steps()):
            if before is not None and step >= before:
                continue
            path = self.path(step)
            problem = check_checkpoint(path)
            if problem is None:
                return path
            problems.append(f"{path}: {problem}")
            warn(f"damaged checkpoint skipped: {path}: {problem}")
        if problems:
            raise ModelFolderError(
                "all checkpoints are damaged:\n  " + "\n  ".join(problems),
                fix="restore one from a backup, or start over with --overwrite",
            )
        return None


def unusable(checkpoint: Path, why: str) -> ModelFolderError:
    """An undamaged checkpoint that training cannot continue from."""
    return ModelFolderError(
        f"{checkpoint}: {why}",
        fix="delete that folder to continue from the checkpoint before it, or start over with --overwrite",
    )


def check_checkpoint(path: Path) -> str | None:
    """Describe what is wrong with a checkpoint; None if it is undamaged."""
    record = read_json(path / MANIFEST)
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        return f"{MANIFEST} is missing or broken"
    files = record["files"]
    if STATE not in files or not any(name == TENSORS or name.startswith(f"{SHARDS}/") for name in files):
        return f"{MANIFEST} does not name {STATE} and {TENSORS}"
    if problem := damage(path, files):
        return problem
    try:
        state = _State.model_validate(read_json(path / STATE))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "it"
        return f"{STATE}: {field}: {first['msg']}"
    if path.name != f"step-{state.step:06d}":
        return f"{STATE}: step: {state.step} differs from the folder's name"
    return None


class _State(BaseModel):
    """The fields of ``training_state.json`` and their types."""

    model_config = ConfigDict(extra="allow", strict=True)
    step: int = Field(ge=0)
    tokens: int = Field(ge=0)
    next_batch: int = Field(default=0, ge=0, lt=1 << 62)
    seconds: float = Field(default=0.0, ge=0)
    recent_losses: list[float] = []
    figures: dict[str, float] = {}
    best: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    scaler: dict[str, Any] | None = None


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint that :func:`check_checkpoint` has passed."""
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    return state


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by ``group/name`` into the folder of a checkpoint."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)


def read_tensors(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, sharded over the processes as the model is.

    Args:
        like: the model's parameters by name.
    """
    if (path / SHARDS).is_dir():
        return read_shards(path / SHARDS, like)
    tensors = load_file(path / TENSORS)
    return {name: shard_like(value, like.get(name.rpartition("/")[2])) for name, value in tensors.items()}


def grouped(group: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names prefixed with their group."""
    return {f"{group}/{name}": tensor for name, tensor in tensors.items()}


def ungrouped(group: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one group under their own names."""
    prefix = f"{group}/"
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, shared ones once: the weights in training, not their average."""
    persistent = model.state_dict().keys()
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors |= {name: buffer.detach() for name, buffer in model.named_buffers() if name in persistent}
    return tensors


@torch.no_grad()
def load_model_tensors(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Restore saved weights.

    Raises:
        ModelFolderError: names or shapes differ from this model's.
    """
    own = model_tensors(model)
    wrong = sorted(own.keys() ^ tensors.keys())
    wrong += [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if wrong:
        raise ModelFolderError(
            f"{source}: is not a checkpoint of this model: '{wrong[0]}' and {len(wrong) - 1} more differ",
            fix="resume with the original recipe, or start over with --overwrite",
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimizer's state by ``kind/parameter``; empty before the first step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"{kind}/{name}": value
        for name, parameter in zip(names, parameters, strict=True)
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]
) -> None:
    """Restore saved optimizer state."""
    states: dict[int, dict[str, Tensor]] = {}
    numbers = {name: i for i, name in enumerate(names)}
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if name not in numbers or (kind != "step" and value.shape != shapes[numbers[name]]):
            raise ValueError(f"'{key}' does not fit a parameter of this model")
        states.setdefault(numbers[name], {})[kind] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _numpy_state() -> tuple[Any, ...]:
    return tuple(np.random.get_state(legacy=True))


def random_tensors() -> dict[str, Tensor]:
    """States of the random generators of Python, numpy, torch and the current GPU, as integers."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = _numpy_state()
    if version != 3 or kind != "MT19937":
        raise RuntimeError(f"unknown random generators: python {version}, numpy {kind}")
    tensors = {
        "python": torch.tensor(internal, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def load_random_tensors(tensors: dict[str, Tensor]) -> None:
    """Restore saved states of the random generators."""
    gauss = tensors["python_gauss"].tolist()
    random.setstate((3, tuple(tensors["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = tensors["numpy_position"].tolist()
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, tensors["numpy_gauss"].item()))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


@dataclass
class TrainingState:
    """The tensors that a run needs to continue exactly: weights, optimizer moments, average, random states.

    Args:
        model, optimizer, average: in training.
        names: the optimizer's parameters, in its order.
        rank, world: index of this process, and number of processes.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    names: list[str]
    average: WeightAverage | None
    rank: int
    world: int

    def tensors(self) -> dict[str, Tensor]:
        """All of them by ``group/name``, not copied. All processes must call this.

        If the model is sharded, each process gets its own shards. The random states of all go to every process.
        """
        random_states = grouped(str(self.rank), random_tensors())
        if self.world > 1:
            gathered = gather_object([random_states])
            random_states = {name: value for states in gathered for name, value in states.items()}
        tensors = grouped("weights", model_tensors(self.model))
        tensors |= grouped("optimizer", optimizer_tensors(self.optimizer, self.names))
        tensors |= grouped("random", random_states)
        if self.average:
            tensors |= grouped("average", self.average.average)
        return tensors

    def load(self, checkpoint: Path) -> bool:
        """Restore what :meth:`tensors` returned, perhaps in another number of processes.

        Returns:
            whether the checkpoint has this process's random state.

        Raises:
            ModelFolderError: the checkpoint is of another model, or its tensors are not those that were saved.
        """
        try:
            return self._load(checkpoint)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise unusable(checkpoint, f"its training state cannot be restored: {error}") from error

    def _load(self, checkpoint: Path) -> bool:
        tensors = read_tensors(checkpoint, dict(self.model.named_parameters()))
        load_model_tensors(self.model, ungrouped("weights", tensors), checkpoint)
        load_optimizer_tensors(self.optimizer, self.names, ungrouped("optimizer", tensors))
        if self.average:
            self.average.load(ungrouped("average", tensors))
        random_states = ungrouped(f"random/{self.rank}", tensors)
        if random_states:
            load_random_tensors(random_states)
        return bool(random_states)

    def final_weights(self) -> AbstractContextManager[None]:
        """A context in which the model has its final weights: the averaged ones, if there are any."""
        return self.average.in_place() if self.average else nullcontext()


def snapshot(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the computer's memory, which training does not change; tensors that share memory still do."""
    copies: dict[tuple[object, ...], Tensor] = {}
    result = {}
    for name, tensor in tensors.items():
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor  # a sharded tensor stays sharded
        memory = (own.untyped_storage().data_ptr(), own.storage_offset(), tensor.shape, own.stride())
        if memory not in copies:
            copies[memory] = tensor.detach().to("cpu", copy=True)
        result[name] = copies[memory]
    return result
