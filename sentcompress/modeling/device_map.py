"""A model that no single device holds: its blocks over all there are, everything else on the first.

Accelerate moves what a block reads to where it lies, or the weights of a block that lies in the computer's memory or on
its disk to the first device for as long as it works. Nothing of the computation changes.
"""

from __future__ import annotations

import logging
import math
import shutil
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import dispatch_model
from accelerate.utils import get_max_memory
from torch import Tensor, nn
from transformers import PreTrainedModel

from sentcompress.errors import InputError, StorageError

DISK = "disk"
Place = int | str
"""The number of an accelerator, ``cpu`` or ``disk``."""
SHARE = 0.9
"""Of the memory that is free now, for weights; what is computed needs the rest."""


def blocks_of(causal_lm: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a transformers causal LM, by structure: its list of as many as the configuration says."""
    number = causal_lm.config.num_hidden_layers
    return next(m for m in causal_lm.modules() if isinstance(m, nn.ModuleList) and len(m) == number)


def room_for_one(
    device: torch.device, max_memory: Mapping[Any, int | str] | None, model: nn.Module
) -> dict[Place, float]:
    """Bytes of each device that one of two models may take, the first device first.

    Args:
        device: the first device, which computes what has no device of its own.
        max_memory: bytes (``20GiB``) by device (``0``, ``1``, ``cpu``) for both; a device that is not named holds
            nothing. None takes nine tenths of what is free now.
        model: the first of them, which lies in the computer's memory.

    Raises:
        InputError: ``max_memory`` cannot be read, or names a device that is not there.
    """
    main = _place(device)
    if max_memory is None:
        found = get_max_memory()
        if main == "cpu":  # where it is shared with an accelerator, Accelerate counts it as that one's
            found.setdefault("cpu", psutil.virtual_memory().available)
        found["cpu"] = found.get("cpu", 0) + _bytes(_tensors(model))
        found = {place: SHARE * free for place, free in found.items()}
    else:
        found = _limits(max_memory)
    numbers = [place for place in found if isinstance(place, int) and place != main]
    order = [main] if main == "cpu" else [main, *numbers, "cpu"]
    return {place: found.get(place, 0) / 2 for place in order}


def _limits(max_memory: Mapping[Any, int | str]) -> dict[Place, float]:
    try:
        found = get_max_memory(dict(max_memory))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"bench.max_memory: {error}", fix="write it like {0: 20GiB, cpu: 60GiB}") from error
    there = torch.cuda.device_count()
    for place in found:
        if isinstance(place, int) and not 0 <= place < there:
            raise InputError(
                f"bench.max_memory: there is no device {place}; this machine has {there} that torch can use",
                fix="number them from 0, and name the computer's memory cpu",
            )
    return found


def spread_blocks(
    model: nn.Module, blocks: nn.ModuleList, room: Mapping[Place, float], folder: Path
) -> list[Place]:
    """Spread a model in place; it cannot be moved afterwards.

    Args:
        model: on the CPU.
        blocks: those of its modules that may lie anywhere, called one after the other.
        room: bytes of each device, the first one first: it computes what lies in the computer's memory or on its disk.
        folder: an empty one, for what fits into no memory.

    Returns:
        where each block lies.

    Raises:
        InputError: the first device does not hold what is not in the blocks, and one of those that lie elsewhere.
        StorageError: the disk does not hold what fits into no memory.
    """
    inside = {id(t) for t in _tensors(blocks)}
    rest = [t for t in _tensors(model) if id(t) not in inside]
    sizes = [_bytes(_tensors(block)) for block in blocks]
    main, needed = next(iter(room)), _bytes(rest)
    free = room[main] - needed
    found = _assign(sizes, {**room, main: free})
    visiting = _visiting(sizes, found, main)
    if visiting > free:
        also = f", one of the blocks that lie elsewhere {visiting:,}" if visiting else ""
        raise InputError(
            f"bench.max_memory: device '{main}' has {room[main]:,.0f} bytes for each of two models, what is not in "
            f"the backbone's blocks takes {needed:,}{also}",
            fix="give it more",
        )
    on_disk = sum(size for size, place in zip(sizes, found, strict=True) if place == DISK)
    free_disk = shutil.disk_usage(folder).free
    # Accelerate maps files into memory: a full disk would end the process without a word.
    if on_disk > free_disk:
        raise StorageError(
            f"{folder}: {on_disk:,} bytes of the backbone's blocks fit into no memory, and the disk has {free_disk:,}",
            fix="free some space, or give more in bench.max_memory",
        )
    for tensor in rest:  # in place, so that tied weights stay tied
        tensor.data = tensor.data.to(main)
    places = dict(_others(model, blocks, main))
    name = next(name for name, module in model.named_modules() if module is blocks)
    places |= {f"{name}.{number}": place for number, place in enumerate(found)}
    with _quiet():
        dispatch_model(
            model,
            places,
            main_device=main,
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


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def _place(device: torch.device) -> Place:
    return "cpu" if device.type == "cpu" else device.index or 0


def _assign(sizes: Sequence[int], room: Mapping[Place, float]) -> list[Place]:
    """A place for each block, in order: as evenly over the accelerators as they have room, then ``cpu``, then disk.

    The first device keeps room for one of the blocks that lie where nothing is computed.
    """
    main, accelerators = next(iter(room)), [place for place in room if isinstance(place, int)]
    number = len(sizes)
    if accelerators:
        for share in range(math.ceil(number / len(accelerators)), number + 1):
            places = _fill(sizes, {place: room[place] for place in accelerators}, share)
            if len(places) == number:
                return places
    places = _fill(sizes, room, number)
    if len(places) < number or _visiting(sizes, places, main):
        places = _fill(sizes, {**room, main: room[main] - max(sizes)}, number)
    return [*places, *[DISK] * (number - len(places))]


def _fill(sizes: Sequence[int], room: Mapping[Place, float], most: int) -> list[Place]:
    """Places of the first blocks, until none has room; each takes ``most`` at the most."""
    places: list[Place] = []
    for place, free in room.items():
        taken = 0
        while len(places) < len(sizes) and sizes[len(places)] <= free and taken < most:
            free -= sizes[len(places)]
            places.append(place)
            taken += 1
    return places


def _visiting(sizes: Sequence[int], places: Collection[Place], main: Place) -> int:
    """Bytes of the largest block that comes to the first device when it is its turn."""
    away = [DISK] if main == "cpu" else ["cpu", DISK]
    return max((size for size, place in zip(sizes, places, strict=False) if place in away), default=0)


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
