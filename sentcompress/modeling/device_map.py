"""Device maps for a model that no single device holds: its blocks on all devices, everything else on the first.

Accelerate moves a block's inputs to the block's device. The weights of an offloaded block, which is in CPU memory or on
disk, come to the first device while the block computes. The computation stays the same.
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

from sentcompress.contracts.causal_lm import CACHE
from sentcompress.errors import InputError, StorageError

DISK = "disk"
DeviceName = int | str
"""The number of an accelerator, or ``cpu`` or ``disk``."""
FREE_SHARE = 0.9
"""Share of the free memory that weights may take; activations need the rest."""


def blocks_of(causal_lm: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a transformers causal LM: its list with as many modules as the configuration has layers."""
    number = causal_lm.config.num_hidden_layers
    return next(m for m in causal_lm.modules() if isinstance(m, nn.ModuleList) and len(m) == number)


def memory_per_model(
    device: torch.device, max_memory: Mapping[Any, int | str] | None, model: nn.Module
) -> dict[DeviceName, float]:
    """Bytes of each device that each of two models may take, the first device first.

    Args:
        device: the first device, which computes everything without a device of its own.
        max_memory: bytes (``20GiB``) by device (``0``, ``1``, ``cpu``) for both models; devices it does not name hold
            nothing. None takes nine tenths of the free memory.
        model: the first of the two, which is in CPU memory.

    Raises:
        InputError: ``max_memory`` cannot be read, or names a device that does not exist.
    """
    main = _device_name(device)
    if max_memory is None:
        found = get_max_memory()
        if main == "cpu":  # Accelerate leaves it out where it is shared with an accelerator
            found.setdefault("cpu", psutil.virtual_memory().available)
        found["cpu"] = found.get("cpu", 0) + _bytes(_tensors(model))
        found = {name: FREE_SHARE * free for name, free in found.items()}
    else:
        found = _limits(max_memory)
    numbers = [name for name in found if isinstance(name, int) and name != main]
    order = [main] if main == "cpu" else [main, *numbers, "cpu"]
    return {name: found.get(name, 0) / 2 for name in order}


def _limits(max_memory: Mapping[Any, int | str]) -> dict[DeviceName, float]:
    try:
        found = get_max_memory(dict(max_memory))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"bench.max_memory: {error}", fix="write it like {0: 20GiB, cpu: 60GiB}") from error
    count = torch.cuda.device_count()
    for device in found:
        if isinstance(device, int) and not 0 <= device < count:
            raise InputError(
                f"bench.max_memory: there is no device {device}; torch can use {count} on this machine",
                fix="number devices from 0, and call the computer's memory cpu",
            )
    return found


def dispatch_blocks(
    model: nn.Module, blocks: nn.ModuleList, memory: Mapping[DeviceName, float], folder: Path
) -> list[DeviceName]:
    """Move a model's blocks to devices, in place; the model cannot be moved afterwards.

    Args:
        model: on the CPU.
        blocks: those of its modules that may be on any device, called one after the other.
        memory: bytes of each device; the first one computes offloaded blocks.
        folder: an empty one, for blocks that fit into no memory.

    Returns:
        the device of each block.

    Raises:
        InputError: the first device cannot hold everything outside the blocks and one offloaded block.
        StorageError: the disk cannot hold the blocks that fit into no memory.
    """
    inside = {id(t) for t in _tensors(blocks)}
    rest = [t for t in _tensors(model) if id(t) not in inside]
    sizes = [_bytes(_tensors(block)) for block in blocks]
    main, needed = next(iter(memory)), _bytes(rest)
    free = memory[main] - needed
    found = _assign(sizes, {**memory, main: free})
    offloaded = _largest_offloaded(sizes, found, main)
    if offloaded > free:
        also = f", and an offloaded block takes {offloaded:,}" if offloaded else ""
        raise InputError(
            f"bench.max_memory: device '{main}' has {memory[main]:,.0f} bytes for each of two models, but everything "
            f"outside the backbone's blocks takes {needed:,}{also}",
            fix="give that device more in bench.max_memory",
        )
    on_disk = sum(size for size, device in zip(sizes, found, strict=True) if device == DISK)
    free_disk = shutil.disk_usage(folder).free
    # Accelerate maps files into memory: a full disk would kill the process without a message.
    if on_disk > free_disk:
        raise StorageError(
            f"{folder}: {on_disk:,} bytes of the backbone's blocks must go to disk, which has {free_disk:,} bytes free",
            fix="free some space, or give more in bench.max_memory",
        )
    for tensor in rest:  # in place, so that tied weights stay tied
        tensor.data = tensor.data.to(main)
    devices = dict(_others(model, blocks, main))
    name = next(name for name, module in model.named_modules() if module is blocks)
    devices |= {f"{name}.{number}": device for number, device in enumerate(found)}
    with _quiet():
        dispatch_model(
            model,
            devices,
            main_device=main,
            offload_dir=folder,
            skip_keys=["past_key_values", CACHE],
            force_hooks=True,
        )
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Accelerate's warnings of tensors outside modules and of weights on no device: both are intended."""
    logger = logging.getLogger("accelerate.big_modeling")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logger.setLevel(before)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def _device_name(device: torch.device) -> DeviceName:
    return "cpu" if device.type == "cpu" else device.index or 0


def _assign(sizes: Sequence[int], memory: Mapping[DeviceName, float]) -> list[DeviceName]:
    """A device for each block, in order: as evenly on the accelerators as their memory allows, then CPU, then disk.

    The first device keeps memory for one offloaded block.
    """
    main, accelerators = next(iter(memory)), [device for device in memory if isinstance(device, int)]
    number = len(sizes)
    if accelerators:
        for share in range(math.ceil(number / len(accelerators)), number + 1):
            devices = _fill(sizes, {device: memory[device] for device in accelerators}, share)
            if len(devices) == number:
                return devices
    devices = _fill(sizes, memory, number)
    if len(devices) < number or _largest_offloaded(sizes, devices, main):
        devices = _fill(sizes, {**memory, main: memory[main] - max(sizes)}, number)
    return [*devices, *[DISK] * (number - len(devices))]


def _fill(sizes: Sequence[int], memory: Mapping[DeviceName, float], most: int) -> list[DeviceName]:
    """Devices of the first blocks, until all are full; each device takes at most ``most`` blocks."""
    devices: list[DeviceName] = []
    for device, free in memory.items():
        taken = 0
        while len(devices) < len(sizes) and sizes[len(devices)] <= free and taken < most:
            free -= sizes[len(devices)]
            devices.append(device)
            taken += 1
    return devices


def _largest_offloaded(sizes: Sequence[int], devices: Collection[DeviceName], main: DeviceName) -> int:
    """Bytes of the largest offloaded block; the first device needs them while it computes the block."""
    offloaded = [DISK] if main == "cpu" else ["cpu", DISK]
    return max((size for size, device in zip(sizes, devices, strict=False) if device in offloaded), default=0)


def _others(
    module: nn.Module, blocks: nn.ModuleList, device: DeviceName, prefix: str = ""
) -> Iterator[tuple[str, DeviceName]]:
    """Everything outside the blocks, by the largest modules that contain no block."""
    own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    yield from ((f"{prefix}{name}", device) for name, _ in own)
    for name, child in module.named_children():
        if child is blocks:
            continue
        if any(inner is blocks for inner in child.modules()):
            yield from _others(child, blocks, device, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", device
