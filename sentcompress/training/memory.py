"""Memory: what to lower when it runs out, and activations that are computed again instead of kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sentcompress.errors import OutOfMemoryError

_CPU_TEXTS = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory", "Cannot allocate memory")


def recompute_activations(model: nn.Module) -> None:
    """Switch gradient checkpointing on, under the name that this version of transformers has for it."""
    enable: Any = (
        getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})


@contextmanager
def explain_out_of_memory(section: str, batch_fields: tuple[str, ...]) -> Iterator[None]:
    """Turn torch's and Python's out-of-memory errors into one that names the settings to lower.

    Args:
        section: of the recipe, with the stage's training settings.
        batch_fields: fields of the recipe that shrink a micro-batch.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        cpu = isinstance(error, MemoryError) or any(text in str(error) for text in _CPU_TEXTS)
        if not cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        where = "this machine has" if cpu else "the GPU has"
        reason = str(error).partition("\n")[0] or repr(error)
        raise OutOfMemoryError(
            f"{where} too little memory for these settings: {reason}",
            fix=f"lower {' or '.join(batch_fields)} (and raise {section}.gradient_accumulation by as much), "
            f"or set {section}.gradient_checkpointing=true; then go on with --resume, or --overwrite",
        ) from error
