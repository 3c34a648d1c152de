"""A model that no single device holds: its blocks over all there are, everything else on the first.

Accelerate moves what a block reads to where it lies, or the weights of a block that lies in the computer's memory or on
its disk to the first device for as long as it works. Nothing of the computation changes.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.utils import get_max_memory
from torch import Tensor, nn
from transformers import PreTrainedModel

from sentcompress.errors import InputError

DISK = "disk"
Place = int | str
"""The number of an accelerator, ``cpu`` or ``disk``."""


def blocks_of(causal_lm: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a transformers causal LM, by structure: its list of as many as the configuration says."""
    number = causal_lm.config.num_hidden_layers
    return next(m for m in causal_lm.modules() if isinstance(m, nn.ModuleList) and len(m) == number)


def spread_blocks(
    model: nn.Module,
    blocks: nn.ModuleList,
    device: torch.device,
    folder: Path,
    max_memory: Mapping[Any, int | str] | None = None,
) -> list[Place]:
    """Spread a model in place; it cannot be moved afterwards.

    Args:
        model: on the CPU.
        blocks: those of its modules that may lie anywhere, called one after the other.
        device: the first device, which computes what has no device of its own.
        folder: an empty one, for what fits into no memory.
        max_memory: bytes (``20GiB``) by device (``0``, ``1``, ``cpu``); None takes what is free now.

    Returns:
        where each block lies.

    Raises:
        InputError: ``max_memory`` cannot be read, or the first device does not hold what is not in the blocks.
    """
    inside = {id(t) for t in _tensors(blocks)}
    rest = [t for t in _tensors(model) if id(t) not in inside]
    room = _room(device, max_memory)
    first, free = room[0]
    needed = _bytes(rest)
    if needed > free:
        raise InputError(
            f"bench.max_memory: device '{first}' has {free:,.0f} bytes, what is not in the backbone's blocks takes "
            f"{needed:,}",
            fix="give it more",
        )
    room[0] = (first, free - needed)
    for tensor in rest:  # in place, so that tied weights stay tied
        tensor.data = tensor.data.to(device)
    places = dict(_others(model, blocks, _place(device)))
    name = next(name for name, module in model.named_modules() if module is blocks)
    found = _assign([_bytes(list(_tensors(block))) for block in blocks], room)
    places |= {f"{name}.{number}": place for number, place in enumerate(found)}
    with _quiet():
        dispatch_model(
            model,
            places,
            main_device=_place(device),
            offload_dir=folder,
            skip_keys=["past_key_values"],
            force_hooks=True,
        )
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Accelerate warns of tensors without a module of their own, and of weights that are on no device, as is meant."""
    said = logging.getLogger("accelerate.big_modeling")
    before = said.level
    said.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        said.setLevel(before)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def _place(device: torch.device) -> Place:
    return "cpu" if device.type == "cpu" else device.index or 0


def _room(device: torch.device, max_memory: Mapping[Any, int | str] | None) -> list[tuple[Place, float]]:
    """Bytes of each device, the first one first, the disk left out."""
    try:
        found = get_max_memory(None if max_memory is None else dict(max_memory))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"bench.max_memory: {error}", fix="write it like {0: 20GiB, cpu: 60GiB}") from error
    main = _place(device)
    if main == "cpu":
        return [("cpu", found.get("cpu", 0))]
    others = [key for key in found if isinstance(key, int) and key != main]
    return [(key, found.get(key, 0)) for key in (main, *others, "cpu")]


def _assign(sizes: Sequence[int], room: Sequence[tuple[Place, float]]) -> list[Place]:
    """A place for each block, in order: as evenly over the accelerators as they have room, then ``cpu``, then disk."""
    accelerators = sum(isinstance(place, int) for place, _ in room)
    places: list[Place] = []
    for share in range(math.ceil(len(sizes) / max(1, accelerators)), len(sizes) + 1):
        places = []
        for place, free in room:
            taken = 0
            while len(places) < len(sizes) and sizes[len(places)] <= free:
                if isinstance(place, int) and taken == share:
                    break
                free -= sizes[len(places)]
                places.append(place)
                taken += 1
        if len(places) == len(sizes) and all(isinstance(place, int) for place in places):
            break
    return [*places, *[DISK] * (len(sizes) - len(places))]


def _others(
    module: nn.Module, blocks: nn.ModuleList, place: Place, prefix: str = ""
) -> Iterator[tuple[str, Place]]:
    """Everything that is neither one of the blocks nor holds them."""
    own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    yield from ((f"{prefix}{name}", place) for name, _ in own)
    for name, child in module.named_children():
        if child is blocks:
            continue
        if any(inner is blocks for inner in child.modules()):
            yield from _others(child, blocks, place, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", place
