"""Which way to train fits on how many devices, how long it takes and what it costs: ``estimate --devices 4xA100``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
from transformers import PreTrainedModel

from sentcompress.errors import InputError
from sentcompress.estimate.decoding import BACKWARD, estimate, explain_shape, shapes
from sentcompress.estimate.devices import GPUS, Device, device
from sentcompress.estimate.plan import budget
from sentcompress.estimate.roofline import products
from sentcompress.estimate.training_memory import (
    Footprint,
    Sizes,
    Stage,
    footprints,
    saving_bytes,
    sizes,
    state_bytes,
)
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.recipe import GraftSettings, Recipe, TrainVAESettings
from sentcompress.table import Table
from sentcompress.training.jobs.token_level import TokenLM

GPU_CONTEXT = 1e9
"""Bytes that a GPU's driver and libraries take: an assumption."""
USABLE = 0.92
"""Share of a GPU's memory that can be used before fragments get in the way: an assumption."""
AGAIN = 4 / 3
"""Time with activations computed again: a third forward pass."""
Models = tuple[SentenceLM, PreTrainedModel]
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
    recipe: Recipe,
    stage: Stage,
    machine: Device,
    number: int,
    sentence_tokens: float,
    models: Models | None = None,
) -> tuple[Sizes, list[Way]]:
    """All ways to train a stage on so many devices, the fastest first.

    Args:
        sentence_tokens: mean length of a sentence.
        models: the recipe's, on the meta device; None builds them.
    """
    settings = _settings(recipe, stage)
    model, twin = models or shapes(recipe)
    on_cpu = machine.name == "cpu"
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and not on_cpu)
    process = psutil.Process().memory_info().rss  # before counting, which leaves some behind
    shape = TokenLM(twin) if stage == "baseline" else model
    with explain_shape(recipe):
        found = sizes(shape, recipe, stage, sentence_tokens, bf16=bf16)
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
    return found, sorted(result, key=lambda way: way.hours)


def fastest(possible: Sequence[Way]) -> Way | None:
    """The first way that fits, None where none does."""
    return next((way for way in possible if way.fits), None)


def _settings(recipe: Recipe, stage: Stage) -> GraftSettings | TrainVAESettings:
    return recipe.train_vae if stage == "vae" else recipe.graft  # the twin's are the graft's


def _token_seconds(
    model: SentenceLM, twin: PreTrainedModel, stage: Stage, machine: Device, sentence_tokens: float
) -> float:
    if stage == "vae":
        vae = model.vae
        learned = products(vae.encoder) + products(vae.decoder) + vae.output_weight.numel()
        return BACKWARD * 2 * learned / machine.training_flops
    both = estimate(
        model,
        twin,
        machine,
        batch_size=1,
        prompt_tokens=1,
        new_tokens=1,
        sentence_tokens=sentence_tokens,
    )
    return both.baseline_token if stage == "baseline" else both.training_token


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
) -> list[Table]:
    """The ways to train each stage of a recipe that takes steps, side by side, and all stages together.

    Args:
        sentence_tokens: mean length of a sentence.
        price: of a device for an hour.
    """
    models = shapes(recipe)
    found = {
        stage: ways(recipe, stage, machine, number, sentence_tokens, models) for stage in _stages(recipe)
    }
    result = [_table(recipe, stage, machine, number, price, *each) for stage, each in found.items()]
    chosen = {stage: fastest(possible) for stage, (_, possible) in found.items()}
    return [*result, _together(recipe, machine, number, price, chosen)]


def _stages(recipe: Recipe) -> list[Stage]:
    stages: list[Stage] = [] if recipe.graft.vae or not recipe.train_vae.steps else ["vae"]
    stages.append("graft")
    return [*stages, "baseline"] if recipe.baseline.enabled else stages


def _table(
    recipe: Recipe,
    stage: Stage,
    machine: Device,
    number: int,
    price: float | None,
    found: Sizes,
    possible: Sequence[Way],
) -> Table:
    rows = [_row(way, number, price) for way in possible]
    columns = ["", "weights", "gradients", "optimizer", "activations", "logits", "peak", "fits", "hours"]
    notes = [f"GiB on each device. {_verdict(possible, stage)}"]
    settings = _settings(recipe, stage)
    notes.append(
        f"A checkpoint has {(4 * found.weights + state_bytes(found, settings)) / _GIB:.2f} GiB; saving one takes "
        f"{saving_bytes(found, settings) / _GIB:.2f} GiB of the computer's memory (of the first process with ddp, of "
        "all together with fsdp)."
    )
    if stage == "graft" and recipe.graft.teacher:
        notes.append("graft.teacher is not counted: its weights, and its forward passes.")
    return Table(
        f"Training {stage} of {recipe.name} on {number} x {machine.name}",
        columns + ([] if price is None else ["cost"]),
        rows,
        notes,
    )


def _together(
    recipe: Recipe, machine: Device, number: int, price: float | None, chosen: Mapping[Stage, Way | None]
) -> Table:
    """Hours and cost of ``sentcompress run``, each stage in the fastest way that fits."""
    rows = []
    for stage, way in chosen.items():
        if way is None:
            rows.append([stage, "nothing fits", "-", "-"] + ([] if price is None else ["-"]))
        else:
            rows.append([stage, way.footprint.name, *_hours(way.hours, number, price)])
    fit = [way.hours for way in chosen.values() if way is not None]
    left_out = [stage for stage, way in chosen.items() if way is None]
    rows.append(
        ["together", f"without {', '.join(left_out)}" if left_out else "", *_hours(sum(fit), number, price)]
    )
    notes = []
    if price is None:
        notes.append("--price 2.5 (an hour of one device) gives the cost.")
    if not machine.measured:
        notes.append(
            "From data sheets, with 40% of the arithmetic reached and exchanges not hidden; nothing of it was run here."
        )
    return Table(
        f"All stages of {recipe.name}",
        ["", "way", "hours", "device-hours"] + ([] if price is None else ["cost"]),
        rows,
        notes,
    )


def _hours(hours: float, number: int, price: float | None) -> list[str]:
    both = [f"{hours:,.2f}", f"{hours * number:,.2f}"]
    return both if price is None else [*both, f"{hours * number * price:,.2f}"]


def _row(way: Way, number: int, price: float | None) -> list[str]:
    part = way.footprint
    sizes_ = (part.weights, part.gradients, part.optimizer, part.activations, part.logits, way.total)
    row = [part.name, *(f"{size / _GIB:.2f}" for size in sizes_)]
    row += ["yes" if way.fits else "no", f"{way.hours:,.2f}"]
    return row + ([] if price is None else [f"{way.hours * number * price:,.2f}"])


def _verdict(possible: Sequence[Way], stage: Stage) -> str:
    way = fastest(possible)
    if way is not None:
        return "The plain way fits." if way is possible[0] else f"What is needed: {way.footprint.name}."
    if stage == "vae":
        return "Nothing fits: lower train_vae.sentences_per_batch."
    fields = f"graft.passages_per_batch or graft.max_sentences, or set {stage}.tune=lora"
    return f"Nothing fits: lower {fields}."
