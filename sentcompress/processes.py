"""The processes of a run: one, or as many as ``torchrun`` started."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

T = TypeVar("T")


def process_count() -> int:
    """Processes of the run, before any of them has met the others."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_cpu() -> bool:
    """True where torch finds no accelerator. Accelerate must be told, or it runs each CPU process alone."""
    return not torch.accelerator.is_available()


def processes() -> PartialState:
    """Accelerate's state of this process, begun on first use."""
    return PartialState(cpu=on_cpu())


def own_share(items: Sequence[T]) -> Sequence[T]:
    """Those of some items that this process is to look after: every n-th of n processes."""
    ranks = processes()
    return items[ranks.process_index :: ranks.num_processes]


def gathered_shares(found: Sequence[T]) -> list[T]:
    """What all processes made of their :func:`own_share`, in the order of the items, in every process."""
    ranks = processes()
    if ranks.num_processes == 1:
        return list(found)
    parts: list[list[T]] = gather_object([list(found)])
    return [part[place] for place in range(max(map(len, parts))) for part in parts if place < len(part)]
