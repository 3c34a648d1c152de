"""The processes of a run: one, or as many as ``torchrun`` started."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState


def process_count() -> int:
    """Processes of the run, before any of them has met the others."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_cpu() -> bool:
    """True where torch finds no accelerator. Accelerate must be told, or it runs each CPU process alone."""
    return not torch.accelerator.is_available()


def processes() -> PartialState:
    """Accelerate's state of this process, begun on first use."""
    return PartialState(cpu=on_cpu())
