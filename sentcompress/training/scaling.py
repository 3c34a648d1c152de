"""Which way to train fits on how many devices, how long it takes and what it costs: ``estimate --devices 4xA100``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
from transformers import PreTrainedModel

from sentcompress.benchmark.cells import Plain
from sentcompress.benchmark.devices import GPUS, Device, device
from sentcompress.benchmark.estimate import BACKWARD, estimate, shapes
from sentcompress.benchmark.roofline import products
from sentcompress.errors import InputError
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.recipe import GraftSettings, Recipe, TrainVAESettings
from sentcompress.training.footprint import (
    Footprint,
    Sizes,
    Stage,
    footprints,
    saving_bytes,
    sizes,
    state_bytes,
)
from sentcompress.training.plan import budget

GPU_CONTEXT = 1e9
"""Bytes that a GPU's driver and libraries take: an assumption."""
USABLE = 0.92
"""Share of a GPU's memory that can be used before fragments get in the way: an assumption."""
AGAIN = 4 / 3
"""Time with activations computed again: a third forward pass."""
_GIB = 2**30


@dataclass(frozen=True)
class Way:
    """A way to train, on each of the devices.

    Attributes:
        footprint: its memory by part.
        total: bytes at the worst moment, those of the process itself and of saving included.
        hours: of the whole stage.
        fits: whether the device has as much.
    """

    footprint: Footprint
    total: float
    hours: float
    fits: bool


def parse_devices(text: str) -> tuple[int, Device]:
    """``4xA100`` to their number and what one can do.

    Raises:
        InputError: it is something else.
    """
    match = re.fullmatch(r"([0-9]{1,5})\s*[xX*]\s*([\w-]+)", text.strip())
    number, name = (int(match[1]), match[2].lower()) if match else (0, "")
    if name == "cpu" and number > 1:
        raise InputError(
            f"--devices: '{text}': several processes on this machine's CPU share its memory and its cores",
            fix="write 1xcpu",
        )
    if number < 1 or name not in ("cpu", *GPUS):
        raise InputError(
            f"--devices: '{text}' is not a number of devices",
            fix=f"write 4xA100, with one of {', '.join(GPUS)}; or 1xcpu",
        )
    return number, device(name)


def ways(
    recipe: Recipe, stage: Stage, machine: Device, number: int, sentence_tokens: float
) -> tuple[Sizes, list[Way]]:
    """All ways to train a stage on so many devices, the fastest first.

    Args:
        sentence_tokens: mean length of a sentence.
    """
    settings, (model, twin) = _settings(recipe, stage), shapes(recipe)
    on_cpu = machine.name == "cpu"
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and not on_cpu)
    process = psutil.Process().memory_info().rss  # before counting, which leaves some behind
    found = sizes(model, recipe, stage, sentence_tokens, bf16=bf16)
    tokens = budget(recipe).get(stage, 0)
    micro_batches = settings.steps * settings.gradient_accumulation
    called = found.blocks * BACKWARD * machine.block_seconds * micro_batches
    compute = (tokens * _token_seconds(model, twin, stage, machine, sentence_tokens) + called) / number
    result = []
    for footprint in footprints(found, settings, number):
        seconds = compute * (AGAIN if footprint.recomputed else 1.0)
        seconds += _exchange_bytes(found, settings, number, spread=footprint.spread) / machine.link
        total = footprint.peak
        if on_cpu:
            saving = footprint.weights + footprint.optimizer + saving_bytes(found, settings)
            total = max(total, saving) + process
        else:
            total += GPU_CONTEXT
        usable = machine.memory_bytes * (1.0 if on_cpu else USABLE)
        result.append(Way(footprint, total, seconds / 3600, total <= usable))
    return found, result


def _settings(recipe: Recipe, stage: Stage) -> GraftSettings | TrainVAESettings:
    return recipe.graft if stage == "graft" else recipe.train_vae


def _token_seconds(
    model: SentenceLM, twin: PreTrainedModel, stage: Stage, machine: Device, sentence_tokens: float
) -> float:
    if stage == "graft":
        return estimate(
            model,
            twin,
            machine,
            batch_size=1,
            prompt_tokens=1,
            new_tokens=1,
            sentence_tokens=sentence_tokens,
        ).training_token
    vae = model.vae
    learned = products(vae.encoder) + products(vae.decoder) + vae.output_weight.numel()
    return BACKWARD * 2 * learned / machine.training_flops


def _exchange_bytes(
    found: Sizes, settings: GraftSettings | TrainVAESettings, number: int, *, spread: bool
) -> float:
    """Bytes that each device sends over the whole stage."""
    share = (number - 1) / number
    # Each device has its share of the micro-batches; there are as many steps unless that is less than one a step.
    micro_batches = settings.steps * settings.gradient_accumulation / number
    if not spread:  # once a step: gradients there and back
        return min(settings.steps, micro_batches) * 8 * found.learned * share
    # Every micro-batch: weights for the forward pass and again for the backward pass, and gradients.
    return micro_batches * (8 * found.weights + 4 * found.learned) * share


def tables(
    recipe: Recipe, number: int, machine: Device, sentence_tokens: float, price: float | None = None
) -> list[Plain]:
    """The ways to train each stage of a recipe that takes steps, side by side.

    Args:
        sentence_tokens: mean length of a sentence.
        price: of a device for an hour.
    """
    alone = recipe.graft.vae or not recipe.train_vae.steps
    stages: tuple[Stage, ...] = ("graft",) if alone else ("vae", "graft")
    return [_table(recipe, stage, machine, number, sentence_tokens, price) for stage in stages]


def _table(
    recipe: Recipe, stage: Stage, machine: Device, number: int, sentence_tokens: float, price: float | None
) -> Plain:
    found, possible = ways(recipe, stage, machine, number, sentence_tokens)
    rows = [_row(way, number, price) for way in possible]
    columns = ["", "weights", "gradients", "optimizer", "activations", "logits", "peak", "fits", "hours"]
    notes = [f"GiB on each device. {_verdict(possible, stage)}"]
    if price is None:
        hours = min(way.hours for way in possible) * number
        notes.append(f"{hours:,.2f} device-hours; --price 2.5 (an hour of one) gives the cost.")
    settings = _settings(recipe, stage)
    notes.append(
        f"A checkpoint has {(4 * found.weights + state_bytes(found, settings)) / _GIB:.2f} GiB; saving one takes "
        f"{saving_bytes(found, settings) / _GIB:.2f} GiB of the computer's memory (of the first process with ddp, of "
        "all together with fsdp)."
    )
    if not machine.measured:
        notes.append(
            "From data sheets, with 40% of the arithmetic reached and exchanges not hidden; nothing of it was run here."
        )
    return Plain(
        f"Training {stage} of {recipe.name} on {number} x {machine.name}",
        columns + ([] if price is None else ["cost"]),
        rows,
        notes,
    )


def _row(way: Way, number: int, price: float | None) -> list[str]:
    part = way.footprint
    sizes_ = (part.weights, part.gradients, part.optimizer, part.activations, part.logits, way.total)
    row = [part.name, *(f"{size / _GIB:.2f}" for size in sizes_)]
    row += ["yes" if way.fits else "no", f"{way.hours:,.2f}"]
    return row + ([] if price is None else [f"{way.hours * number * price:,.0f}"])


def _verdict(possible: Sequence[Way], stage: Stage) -> str:
    for way in possible:
        if way.fits:
            first = way is possible[0]
            return "The plain way fits." if first else f"What is needed: {way.footprint.name}."
    fields = "graft.passages_per_batch or graft.max_sentences, or set graft.tune=lora"
    return f"Nothing fits: lower {fields if stage == 'graft' else 'train_vae.sentences_per_batch'}."
