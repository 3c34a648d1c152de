"""A text that was read once, saved: its memory is loaded, and shared, by many prompts and processes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from sentcompress.contracts import Segmenter
from sentcompress.errors import InputError, StorageError
from sentcompress.files import read_json, whole_folder
from sentcompress.registry import get_registry
from sentcompress.text.boundaries import BoundaryFinder
from sentcompress.text.segmentation import saved_segmenter

_HEADER, _TENSORS = "prefix.json", "prefix.safetensors"
_FORMAT, _VERSION = "sentcompress sentence memory", 1
_SAMPLE = 64
"""Numbers of each weight that are part of the fingerprint."""
_OF_RUN = {"transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}
"""Entries of a configuration that do not change what the LLM computes from the same weights."""


class Prefix(BaseModel):
    """What a saved prefix belongs to, and how it was read."""

    model_config = ConfigDict(extra="forbid")

    format: str = _FORMAT
    version: int = _VERSION
    model_type: str
    config: str
    weights: str
    dtype: str
    tokenizer: str
    arguments: dict[str, Any]
    """Of the memory, but for the segmenter."""
    segmenter: str | None
    """Its name; None if it is not registered."""
    segmenter_options: dict[str, Any]
    segmenter_state: dict[str, Any]
    tokens: int
    """Tokens read, padding included."""
    shapes: dict[str, list[int]]
    """Of all tensors."""

    def make_segmenter(self, tokenizer: Any) -> Segmenter:
        """The segmenter that read the text.

        Raises:
            InputError: it is not registered.
            PluginError: its plugin is missing.
        """
        if self.segmenter is None:
            raise InputError("the segmenter of this prefix is not registered", fix="give it: segmenter=...")
        return saved_segmenter(self.segmenter, self.segmenter_options, self.segmenter_state, tokenizer)


def fingerprints(model: PreTrainedModel, tokenizer: Any) -> dict[str, str]:
    """What a prefix depends on, as strings that are equal only for the same LLM and tokenizer.

    Of each weight, 64 numbers are read: enough to tell trained models apart, in milliseconds.
    """
    config = {
        name: value
        for name, value in model.config.get_text_config(decoder=True).to_dict().items()
        if name not in _OF_RUN and not name.startswith("_")
    }
    weights = hashlib.blake2b(digest_size=16)
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        picked = flat[:: max(1, len(flat) // _SAMPLE)][:_SAMPLE].cpu().contiguous()
        weights.update(f"{name} {tuple(weight.shape)} ".encode() + picked.view(torch.uint8).numpy().tobytes())
    vocabulary = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return {
        "model_type": model.config.model_type,
        "config": _digest(config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": weights.hexdigest(),
        "tokenizer": _digest(vocabulary),
    }


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write_prefix(
    folder: str | Path,
    model: PreTrainedModel,
    finder: BoundaryFinder,
    arguments: dict[str, Any],
    tokens: int,
    tensors: dict[str, Tensor],
) -> None:
    """Write a prefix, completely or not at all; an older prefix there is replaced.

    Raises:
        InputError: the folder holds something else.
        StorageError: it cannot be written.
    """
    folder, segmenter = Path(folder), finder.segmenter
    if folder.exists() and not (
        folder.is_dir() and (not any(folder.iterdir()) or (folder / _HEADER).is_file())
    ):
        raise InputError(f"{folder}: is not a saved prefix; left unchanged", fix="choose another folder")
    registered = get_registry().find("segmenter", type(segmenter))
    prefix = Prefix(
        **fingerprints(model, finder.tokenizer),
        arguments=arguments,
        segmenter=registered[0] if registered else None,
        segmenter_options=segmenter.options.model_dump(mode="json"),
        segmenter_state=segmenter.state(),
        tokens=tokens,
        shapes=_shapes(tensors),
    )
    try:
        with whole_folder(folder) as temporary:
            save_file(
                {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary / _TENSORS
            )
            (temporary / _HEADER).write_text(prefix.model_dump_json(indent=1), encoding="utf-8")
    except StorageError as error:  # its fix is one for training
        raise StorageError(error.message, fix="free some space, or choose another folder") from error


def read_prefix(
    folder: str | Path, model: PreTrainedModel, tokenizer: Any
) -> tuple[Prefix, dict[str, Tensor]]:
    """Read a prefix. Its tensors are memory-mapped: processes on one machine share them, so they are only read.

    Raises:
        InputError: there is no prefix, it is damaged, or it belongs to another LLM, dtype, tokenizer or version.
    """
    folder = Path(folder)
    header = read_json(folder / _HEADER)
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise InputError(
            f"{folder}: does not hold a saved prefix ({_HEADER} is missing or is another file)",
            fix="give a folder that memory.save(folder) has written",
        )
    if header.get("version") != _VERSION:
        raise InputError(
            f"{folder}: the prefix has format version {header.get('version')}, but this sentcompress reads {_VERSION}",
            fix="read the text again and save it",
        )
    try:
        prefix = Prefix.model_validate(header)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise _damaged(folder, f"{_HEADER}: {where}: {error.errors()[0]['msg']}") from None
    names = {
        "model_type": "model type",
        "config": "configuration of the model",
        "dtype": "dtype",
        "weights": "weights",
        "tokenizer": "tokenizer",
    }
    for field, value in fingerprints(model, tokenizer).items():
        if (saved := getattr(prefix, field)) != value:
            shown = "" if len(saved) == len(value) == 32 else f" ({saved}, here {value})"
            raise InputError(
                f"{folder}: the prefix belongs to another LLM: its {names[field]} differs{shown}",
                fix="use the LLM and the dtype that read it, or read the text again with this one and save it",
            )
    try:
        with safe_open(folder / _TENSORS, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(folder, f"{_TENSORS}: {error}") from None
    if _shapes(tensors) != prefix.shapes:
        raise _damaged(folder, f"{_TENSORS} has other tensors than {_HEADER} says")
    return prefix, tensors


def _shapes(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    """The shape of each tensor."""
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _damaged(folder: Path, why: str) -> InputError:
    return InputError(f"{folder}: the saved prefix is damaged: {why}", fix="read the text again and save it")
