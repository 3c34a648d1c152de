"""Chooses the arithmetic of a run. ``auto`` measures: bf16 is 9x faster on some CPUs and slower on others."""

from __future__ import annotations

import time

import torch

from sentcompress.errors import InputError

WORTHWHILE = 1.2
"""bf16 must be this much faster than fp32 to be chosen."""
_ROWS = 512
_SECONDS = 0.1


def choose_precision(wanted: str, width: int, device: torch.device) -> tuple[str, str]:
    """Resolve a recipe's ``precision``.

    Args:
        wanted: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        width: the model's hidden size.
        device: where it will run.

    Returns:
        ``fp32``, ``bf16`` or ``fp16``, and one line that says why.

    Raises:
        InputError: fp16 without a GPU.
    """
    if wanted == "fp16" and device.type == "cpu":
        raise InputError(
            "precision: fp16 needs a GPU, and this run is on the CPU", fix="use auto, fp32 or bf16"
        )
    if wanted != "auto":
        return wanted, "as the recipe says"
    fp32 = matmul_seconds(torch.float32, width, device)
    try:
        bf16 = matmul_seconds(torch.bfloat16, width, device)
    except RuntimeError:
        return "fp32", "this device has no bf16"
    ratio = fp32 / bf16
    chosen = "bf16" if ratio >= WORTHWHILE else "fp32"
    verdict = "faster" if ratio >= 1 else "slower"
    times = max(ratio, 1 / ratio)
    return chosen, f"bf16 measured {times:.1f}x {verdict}, products of {_ROWS} x {width} x {4 * width}"


def matmul_seconds(dtype: torch.dtype, width: int, device: torch.device) -> float:
    """Best time of one product of the model's width, over at least three runs and a tenth of a second."""
    left = torch.ones(_ROWS, width, dtype=dtype, device=device)
    right = torch.ones(width, 4 * width, dtype=dtype, device=device)
    best = float("inf")
    deadline = time.perf_counter() + _SECONDS
    runs = 0
    while runs < 3 or time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if runs:  # the first run pays for warming up
            best = min(best, time.perf_counter() - start)
        runs += 1
    return best
