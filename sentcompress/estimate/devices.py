"""What devices can do: vendors' figures for GPUs, a measurement of a few seconds for this machine's CPU."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import psutil
import torch
from torch import nn
from torch.nn import functional as F
from transformers import OPTConfig, OPTForCausalLM

from sentcompress.errors import InputError
from sentcompress.generation.shortlist_head import MIN_ROWS_FOR_ONE_PASS, ShortlistExactHead

TIMED_ROWS = (1, 2, 8, 32, 128, 512)
"""Batch sizes at which a CPU's products are timed; costs between them are interpolated."""
PROOF_ROWS = 8
"""Batch size at which the output head's proof of the largest logit is timed."""
MATRIX = (16384, 2048)
"""128 MB: larger than a processor's cache, as the weights of a step are."""
GPU_UTILIZATION = 0.4
"""Share of a GPU's arithmetic that training usually reaches; an assumption."""
GPU_BLOCK_SECONDS = 4e-4
"""Overhead of a block whose operations Python calls one by one: an assumption, not measured here."""


@dataclass(frozen=True)
class Device:
    """What a step costs on a device.

    Attributes:
        name: as the user writes it.
        memory_bytes: of the device.
        element_size: bytes of a weight.
        bandwidth: bytes/s at which weights and caches are read.
        flops: operations/s of large products.
        training_flops: operations/s that training reaches.
        block_seconds: overhead of calling one block once, whatever its size.
        step_seconds: overhead of a step of transformers ``generate``, its blocks not included.
        link: bytes/s of exchanges with devices of the same kind.
        per_weight: measured seconds per weight, by batch size; empty where they follow from bandwidth and ``flops``.
        per_int8_weight: the same for int8 weights; empty without int8 kernels.
        per_proved_logit: seconds per logit to prove the largest after a pass over int8 weights.
    """

    name: str
    memory_bytes: float
    element_size: int
    bandwidth: float
    flops: float
    training_flops: float
    block_seconds: float
    step_seconds: float
    link: float = math.inf
    per_weight: Mapping[int, float] = field(default_factory=dict)
    per_int8_weight: Mapping[int, float] = field(default_factory=dict)
    per_proved_logit: float = 0.0

    @property
    def measured(self) -> bool:
        """Whether the figures were measured on this machine."""
        return bool(self.per_weight)

    def product(self, weights: float, rows: float, *, int8: bool = False) -> float:
        """Seconds of multiplying ``rows`` states by matrices of so many weights."""
        timed = self.per_int8_weight if int8 and self.per_int8_weight else self.per_weight
        if timed:
            return weights * _interpolate(timed, rows)
        return max(weights * self.element_size / self.bandwidth, 2 * weights * rows / self.flops)

    def read(self, size: float) -> float:
        """Seconds of reading so many bytes."""
        return size / self.bandwidth


def _gpu(name: str, gigabytes: float, bandwidth: float, flops: float, link: float) -> Device:
    return Device(
        name=name,
        memory_bytes=gigabytes * 1e9,
        element_size=2,
        bandwidth=bandwidth,
        flops=flops,
        training_flops=flops * GPU_UTILIZATION,
        block_seconds=GPU_BLOCK_SECONDS,
        step_seconds=2 * GPU_BLOCK_SECONDS,
        link=link,
    )


GPUS = {
    # Vendors' data sheets: memory, bytes/s, dense bf16 operations/s, bytes/s of NVLink or PCIe one way.
    "h100": lambda: _gpu("h100", 80, 3.35e12, 989e12, 450e9),
    "a100": lambda: _gpu("a100", 80, 2.04e12, 312e12, 300e9),
    "a100-40": lambda: _gpu("a100-40", 40, 1.555e12, 312e12, 300e9),
    "4090": lambda: _gpu("4090", 24, 1.01e12, 165e12, 32e9),
}
NAMES = ("cpu", *GPUS)


def device(name: str) -> Device:
    """A device by name; ``cpu`` is measured now.

    Raises:
        InputError: there is no such device.
    """
    if name == "cpu":
        return measure_cpu()
    if name not in GPUS:
        raise InputError(f"no device is called '{name}'", fix=f"use {', '.join(NAMES)}")
    return GPUS[name]()


def _interpolate(timed: Mapping[int, float], rows: float) -> float:
    """Interpolate between timed batch sizes, both axes logarithmic; beyond the largest in proportion."""
    known = sorted(timed)
    if rows <= known[0]:
        return timed[known[0]]
    if rows >= known[-1]:
        return timed[known[-1]] * rows / known[-1]
    above = next(i for i, n in enumerate(known) if n >= rows)
    low, high = known[above - 1], known[above]
    share = math.log(rows / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(timed[low]) + share * math.log(timed[high]))


@torch.no_grad()
def measure_cpu() -> Device:
    """Time products of several sizes, reading, and the calls of small models: a few seconds."""
    out, width = MATRIX
    weight = torch.randn(out, width) * 0.02
    count = weight.numel()
    per_weight = {}
    for rows in TIMED_ROWS:
        states = torch.randn(rows, width)
        per_weight[rows] = _seconds(lambda x=states: F.linear(x, weight)) / count  # type: ignore[misc]
    per_int8: dict[int, float] = {}
    per_logit = 0.0
    try:
        head = ShortlistExactHead(weight)
    except InputError:
        pass
    else:
        for rows in TIMED_ROWS:
            states = torch.randn(rows, width)
            # Once or twice over the same weights, as the head does.
            passes = 2 if rows < MIN_ROWS_FOR_ONE_PASS else 1
            per_int8[rows] = _seconds(lambda x=states, p=passes: head.int8.multiply(x, p)) / count  # type: ignore[misc]
        # Like those of a trained model: one token is far ahead of the others.
        states, unbanned = 50 * weight[:PROOF_ROWS], torch.zeros(PROOF_ROWS, dtype=torch.bool)
        # Differences amplify noise, so the quickest call of each counts: nothing else held it up.
        picking = _seconds(lambda: head.argmax(states, [None] * PROOF_ROWS, unbanned, 0), 21, min)
        product = _seconds(lambda: head.int8.multiply(states, 1), 21, min)
        per_logit = max(0.0, picking - product) / (PROOF_ROWS * out)
    largest = TIMED_ROWS[-1]
    block, step = _overheads()

    return Device(
        name="cpu",
        memory_bytes=float(psutil.virtual_memory().total),
        element_size=4,
        bandwidth=4 / per_weight[1],
        flops=2 * largest / per_weight[largest],
        training_flops=2 * largest / per_weight[largest],
        block_seconds=block,
        step_seconds=step,
        per_weight=per_weight,
        per_int8_weight=per_int8,
        per_proved_logit=per_logit,
    )


def _overheads() -> tuple[float, float]:
    """Overheads of a block and of a step, in seconds, from models so small that nothing else takes time."""

    def step(layers: int) -> float:
        config = OPTConfig(
            vocab_size=64,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_attention_heads=2,
            num_hidden_layers=layers,
        )
        model: nn.Module = OPTForCausalLM(config).eval()
        ids = torch.full((1, 4), 5)
        settings = {"do_sample": False, "pad_token_id": 1, "attention_mask": torch.ones_like(ids)}

        def write(new: int) -> float:
            return _seconds(lambda: model.generate(ids, min_new_tokens=new, max_new_tokens=new, **settings))  # type: ignore[operator]

        return (write(25) - write(1)) / 24

    few, many = step(2), step(10)
    block = max(0.0, (many - few) / 8)
    return block, max(0.0, few - 2 * block)


def _seconds(
    call: Callable[[], object], repeats: int = 7, of: Callable[[list[float]], float] = statistics.median
) -> float:
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return of(times)
