"""Checkpoints: an ordinary model folder plus everything that is needed to go on exactly where it stopped.

Nothing is pickled: tensors are in safetensors, the rest is JSON; sizes and digests of all files are recorded.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sentcompress.errors import ModelFolderError
from sentcompress.files import (
    damage,
    manifest,
    read_json,
    set_aside,
    storage_errors,
    temporary_path,
    whole_folder,
    write_atomically,
)
from sentcompress.training.sharding import read_parts, spread_like

MANIFEST = "manifest.json"
TENSORS = "training_state.safetensors"
PARTS = "training_state"
"""In place of the file above, a folder of what each process has of a model that is spread over them."""
STATE = "training_state.json"


class CheckpointStore:
    """The ``checkpoints`` folder of a stage.

    Args:
        folder: where they are.
        keep: how many to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Steps there are checkpoints of, whole or not, oldest first."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return sorted(
            int(path.name[5:]) for path in found if path.name[5:].isdecimal() and path.name.isascii()
        )

    def parts(self, step: int) -> Path:
        """Where all processes write their parts while the first one saves."""
        return temporary_path(self.path(step)) / PARTS

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        write_tensors: Callable[[Path], None],
        state: dict[str, Any],
    ) -> Path:
        """Write a checkpoint whole or not at all, then drop those over ``keep``.

        Args:
            step: steps done.
            write: fills a folder with the model.
            write_tensors: puts the training state there, such as :func:`write_tensors`.
            state: JSON values.

        Raises:
            StorageError: the disk is full or refuses; earlier checkpoints are untouched.
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
        """Delete checkpoints, and what earlier deletions left. Raises StorageError where that is refused."""
        for step in steps:
            with storage_errors(self.folder):
                set_aside(self.path(step))
        for left in self.folder.glob(".step-*.gone"):  # those of runs that were killed too
            shutil.rmtree(left, ignore_errors=True)

    def latest(self, warn: Callable[[str], None], before: int | None = None) -> Path | None:
        """The newest whole checkpoint; damaged ones after it are named through ``warn``.

        Args:
            before: only those of earlier steps.

        Returns:
            its folder, or None when there is no checkpoint at all.

        Raises:
            ModelFolderError: there are checkpoints, and all are damaged.
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
            warn(f"damaged checkpoint left out: {path}: {problem}")
        if problems:
            raise ModelFolderError(
                "no checkpoint is whole:\n  " + "\n  ".join(problems),
                fix="restore one from a copy, or start over with --overwrite",
            )
        return None


def unusable(checkpoint: Path, why: str) -> ModelFolderError:
    """A checkpoint that is whole and yet nothing to go on from."""
    return ModelFolderError(
        f"{checkpoint}: {why}",
        fix="delete that folder, and the checkpoint before it is taken; or start over with --overwrite",
    )


def check_checkpoint(path: Path) -> str | None:
    """Say what is wrong with a checkpoint, or None when it is whole."""
    record = read_json(path / MANIFEST)
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        return f"{MANIFEST} is missing or broken"
    files = record["files"]
    if STATE not in files or not any(name == TENSORS or name.startswith(f"{PARTS}/") for name in files):
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
        return f"{STATE}: step: {state.step} is not that of the folder's name"
    return None


class _State(BaseModel):
    """``training_state.json``: what must be in it, and of which kind."""

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
    """The JSON state of a checkpoint that :func:`check_checkpoint` found whole."""
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    return state


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by ``group/name`` into a checkpoint's folder."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)


def read_tensors(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a whole checkpoint, spread over the processes as the model is.

    Args:
        like: the model's parameters by name.
    """
    if (path / PARTS).is_dir():
        return read_parts(path / PARTS, like)
    tensors = load_file(path / TENSORS)
    return {name: spread_like(value, like.get(name.rpartition("/")[2])) for name, value in tensors.items()}


def grouped(group: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names prefixed with their group."""
    return {f"{group}/{name}": tensor for name, tensor in tensors.items()}


def ungrouped(group: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one group under their own names."""
    prefix = f"{group}/"
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, a shared one once: the weights as they train, not their average."""
    persistent = model.state_dict().keys()
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors |= {name: buffer.detach() for name, buffer in model.named_buffers() if name in persistent}
    return tensors


@torch.no_grad()
def load_model_tensors(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Put saved weights back.

    Raises:
        ModelFolderError: names or shapes are not this model's.
    """
    own = model_tensors(model)
    wrong = sorted(own.keys() ^ tensors.keys())
    wrong += [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if wrong:
        raise ModelFolderError(
            f"{source}: not a checkpoint of this model: '{wrong[0]}' and {len(wrong) - 1} more differ",
            fix="resume with the recipe it was started with, or start over with --overwrite",
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
    """Put saved optimizer state back."""
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
    """Put saved states of the random generators back."""
    gauss = tensors["python_gauss"].tolist()
    random.setstate((3, tuple(tensors["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = tensors["numpy_position"].tolist()
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, tensors["numpy_gauss"].item()))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")
