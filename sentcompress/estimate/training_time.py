"""``estimate --devices 4xA100``: which training mode fits on these devices, how long it takes and what it costs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
from transformers import PreTrainedModel

from sentcompress.errors import InputError
from sentcompress.estimate.decoding import graft_products, token_products, vae_products
from sentcompress.estimate.devices import GPU_UTILIZATION, GPUS, Device, device
from sentcompress.estimate.equal_cost import meta_opponent
from sentcompress.estimate.plan import token_budget
from sentcompress.estimate.roofline import TRAINING_PASSES, training_flops
from sentcompress.estimate.shapes import explain_shape, meta_models
from sentcompress.estimate.training_memory import (
    DeviceMemory,
    ModelSizes,
    StageName,
    device_memory,
    gradient_bytes,
    model_sizes,
    saving_bytes,
    state_bytes,
    tuning,
    weight_bytes,
)
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.recipe import GraftSettings, Recipe, TrainVAESettings
from sentcompress.table import GIB, Table, gib
from sentcompress.training.jobs.token_level import TokenLM
from sentcompress.training.run_folder import BASELINE, GRAFT, OPPONENT, VAE, opponent_stage

GPU_CONTEXT_BYTES = 1e9
"""What a GPU's driver and libraries take: an assumption."""
USABLE_MEMORY = 0.92
"""Share of a GPU's memory that can be used before fragmentation gets in the way: an assumption."""
RECOMPUTATION_TIME = (TRAINING_PASSES + 1) / TRAINING_PASSES
"""Training time with activation checkpointing over that without: one more forward pass."""
Models = tuple[SentenceLM, PreTrainedModel]


@dataclass(frozen=True)
class TrainingMode:
    """DDP or FSDP, with or without gradient checkpointing.

    Attributes:
        memory: of each device.
        total: bytes at the worst moment, with those of the process itself and of saving.
        hours: of the whole stage.
        fits: whether each device has that much memory.
    """

    memory: DeviceMemory
    total: float
    hours: float
    fits: bool

    @property
    def name(self) -> str:
        return self.memory.name


def parse_devices(text: str) -> tuple[int, Device]:
    """``4xA100`` as the number of devices and what one of them can do.

    Raises:
        InputError: it cannot be read, or there is no such device.
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


def training_modes(
    recipe: Recipe,
    stage: StageName,
    machine: Device,
    number: int,
    sentence_tokens: float,
    models: Models | None = None,
) -> tuple[ModelSizes, list[TrainingMode]]:
    """Every mode to train a stage in on so many devices, the fastest first.

    Args:
        sentence_tokens: mean length of a sentence.
        models: the recipe's, or its sentence model and the opponent of the stage, on the meta device; None builds them.
    """
    settings = _settings(recipe, stage)
    model, llm = models or _models(recipe, stage, sentence_tokens)
    on_cpu = machine.name == "cpu"
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and not on_cpu)
    process = psutil.Process().memory_info().rss  # before counting, which leaves some memory behind
    of_sentences = stage in (VAE.name, GRAFT.name)
    trained = model if of_sentences else TokenLM(llm)
    with explain_shape(recipe):
        sizes = model_sizes(trained, recipe, stage, sentence_tokens, bf16=bf16)
    if of_sentences:
        products = vae_products(model) if stage == VAE.name else graft_products(model, sentence_tokens)
    else:
        products = token_products(model, llm)
    compute = token_budget(recipe).get(stage, 0) * (training_flops(products) / machine.training_flops)
    micro_batches = settings.steps * settings.gradient_accumulation
    compute += sizes.blocks * TRAINING_PASSES * machine.block_seconds * micro_batches
    modes = []
    for memory in device_memory(sizes, settings, number):
        seconds = compute / number * (RECOMPUTATION_TIME if memory.recomputed else 1.0)
        seconds += _exchanged_bytes(sizes, settings, number, sharded=memory.sharded) / machine.link
        total = memory.peak
        if on_cpu:
            total = max(total, memory.weights + memory.optimizer + saving_bytes(sizes, settings)) + process
        else:
            total += GPU_CONTEXT_BYTES
        usable = machine.memory_bytes * (1.0 if on_cpu else USABLE_MEMORY)
        modes.append(TrainingMode(memory, total, seconds / 3600, total <= usable))
    return sizes, sorted(modes, key=lambda mode: mode.hours)


def _models(recipe: Recipe, stage: StageName, sentence_tokens: float) -> Models:
    if stage.startswith(OPPONENT):
        opponent = meta_opponent(recipe, stage.removeprefix(OPPONENT), sentence_tokens)[1]
        return meta_models(recipe)[0], opponent
    return meta_models(recipe)


def fastest(modes: Sequence[TrainingMode]) -> TrainingMode | None:
    """The first mode that fits, None where none does."""
    return next((mode for mode in modes if mode.fits), None)


def _settings(recipe: Recipe, stage: StageName) -> GraftSettings | TrainVAESettings:
    # Token-level LLMs are trained like the graft.
    return recipe.train_vae if stage == VAE.name else recipe.graft


def _exchanged_bytes(
    sizes: ModelSizes, settings: GraftSettings | TrainVAESettings, number: int, *, sharded: bool
) -> float:
    """Bytes that each device sends over the whole stage."""
    share = (number - 1) / number
    gradients = gradient_bytes(sizes.trainable)
    # Each device gets its share of the micro-batches. The number of steps stays, unless that is less than one per step.
    micro_batches = settings.steps * settings.gradient_accumulation / number
    if not sharded:  # gradients there and back, once per step
        return min(settings.steps, micro_batches) * 2 * gradients * share
    # For every micro-batch: weights for the forward pass and again for the backward pass, and gradients.
    return micro_batches * (2 * weight_bytes(sizes.weights) + gradients) * share


def mode_tables(
    recipe: Recipe, number: int, machine: Device, sentence_tokens: float, price: float | None = None
) -> list[Table]:
    """A table of training modes for each stage of a recipe that takes steps, and one of all stages together.

    Args:
        sentence_tokens: mean length of a sentence.
        price: of one device for an hour.
    """
    model, backbone = meta_models(recipe)
    opponents = {
        opponent_stage(name).name: meta_opponent(recipe, name, sentence_tokens) for name in recipe.opponents
    }
    tables, chosen = [], {}
    for stage in _stages(recipe):
        shape, llm = opponents.get(stage, (None, backbone))
        sizes, modes = training_modes(recipe, stage, machine, number, sentence_tokens, (model, llm))
        tables.append(_stage_table(recipe, stage, machine, number, price, sizes, modes))
        tables[-1].notes.extend([f"{shape}."] if shape else [])
        chosen[stage] = fastest(modes)
    return [*tables, _total_table(recipe, machine, number, price, chosen)]


def _stages(recipe: Recipe) -> list[StageName]:
    stages: list[StageName] = [] if not (recipe.trains_vae and recipe.train_vae.steps) else ["vae"]
    stages.append("graft")
    stages += [BASELINE.name] if recipe.baseline.enabled else []
    return stages + [opponent_stage(name).name for name in recipe.opponents]


def _stage_table(
    recipe: Recipe,
    stage: StageName,
    machine: Device,
    number: int,
    price: float | None,
    sizes: ModelSizes,
    modes: Sequence[TrainingMode],
) -> Table:
    settings = _settings(recipe, stage)
    checkpoint = weight_bytes(sizes.weights) + state_bytes(sizes, settings)
    notes = [
        f"GiB on each device. {_verdict(modes, recipe, stage)}",
        f"A checkpoint takes {checkpoint / GIB:.2f} GiB on disk; saving one takes "
        f"{saving_bytes(sizes, settings) / GIB:.2f} GiB of main memory (in the first process with ddp, in all "
        "processes together with fsdp).",
    ]
    if stage == "graft" and recipe.graft.teacher:
        notes.append("Not included: the weights and forward passes of graft.teacher.")
    columns = ["", "weights", "gradients", "optimizer", "activations", "logits", "peak", "fits", "hours"]
    return Table(
        f"Training {stage} of {recipe.name} on {number} x {machine.name}",
        columns + ([] if price is None else ["cost"]),
        [_mode_row(mode, number, price) for mode in modes],
        notes,
    )


def _mode_row(mode: TrainingMode, number: int, price: float | None) -> list[str]:
    memory = mode.memory
    sizes = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.logits)
    row = [mode.name, *map(gib, sizes), gib(mode.total), "yes" if mode.fits else "no", f"{mode.hours:,.2f}"]
    return row + _cost(mode.hours * number, price)


def _cost(device_hours: float, price: float | None) -> list[str]:
    return [] if price is None else [f"{device_hours * price:,.2f}"]


def _total_table(
    recipe: Recipe,
    machine: Device,
    number: int,
    price: float | None,
    chosen: Mapping[StageName, TrainingMode | None],
) -> Table:
    """Hours and cost of ``sentcompress run``, each stage in the fastest mode that fits."""

    def hours(total: float) -> list[str]:
        return [f"{total:,.2f}", f"{total * number:,.2f}", *_cost(total * number, price)]

    rows = []
    for stage, mode in chosen.items():
        if mode is None:
            rows.append([stage, "nothing fits", "-", "-"] + ([] if price is None else ["-"]))
        else:
            rows.append([stage, mode.name, *hours(mode.hours)])
    total = sum(mode.hours for mode in chosen.values() if mode is not None)
    left_out = ", ".join(stage for stage, mode in chosen.items() if mode is None)
    rows.append(["together", f"without {left_out}" if left_out else "", *hours(total)])
    notes = []
    if price is None:
        notes.append("Add --price 2.5 (the price of one device per hour) to see the cost.")
    if not machine.measured:
        notes.append(
            f"Computed from data sheets, not run here: {GPU_UTILIZATION:.0%} of the peak arithmetic is reached, and "
            "communication does not overlap with it."
        )
    return Table(
        f"All stages of {recipe.name}",
        ["", "mode", "hours", "device-hours"] + ([] if price is None else ["cost"]),
        rows,
        notes,
    )


def _verdict(modes: Sequence[TrainingMode], recipe: Recipe, stage: StageName) -> str:
    mode = fastest(modes)
    if mode is not None:
        return "The fastest mode fits." if mode is modes[0] else f"The fastest mode that fits: {mode.name}."
    if stage == "vae":
        return "Nothing fits: lower train_vae.sentences_per_batch."
    section, _ = tuning(recipe, stage)
    fields = f"graft.passages_per_batch or graft.max_sentences, or set {section}.tune=lora"
    return f"Nothing fits: lower {fields}."
