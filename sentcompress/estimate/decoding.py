"""Before anything is built: what a recipe's model would cost beside its token-level twin, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from sentcompress.errors import InputError, SentCompressError
from sentcompress.estimate.devices import Device
from sentcompress.estimate.roofline import backbone_cache_bytes, products
from sentcompress.estimate.shapes import random_models
from sentcompress.generation.engine import TOGETHER
from sentcompress.generation.output_head import WORTH_IT
from sentcompress.modeling.pretrained import load_backbone_config
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.recipe import Recipe
from sentcompress.table import Table

BACKWARD = 3
"""A step of training costs three times its forward pass."""
CACHE_PASSES = 3
"""Times a step of a backbone goes over its cache: it is put together anew, of other texts or longer, and read."""
GENERATE_PASSES, LOGIT_PASSES = 8, 4
"""Times logits are written or read until the largest is known: in transformers ``generate`` (to fp32, a copy for its
processors, what they change), and in our full head."""
MOST_BLOCKS = 1000
"""Blocks are built one by one."""
TRAINED_BYTES = 12
"""Gradient and two moments of a weight that learns, in fp32, beside the weight."""


@dataclass(frozen=True)
class Estimate:
    """What is expected of both models on a device.

    Attributes:
        batch_size: rows written together.
        backbone_token, sentence_token: seconds until every row has one more token.
        backbone_prefill, sentence_prefill: seconds of reading a prompt for every row.
        backbone_cache, sentence_cache: bytes of cache a token of text.
        backbone_bytes, sentence_bytes: bytes of the weights.
        training_bytes: weights, gradients and moments of a graft that learns all of it; activations not counted.
        training_token, baseline_token: seconds a token of training text takes, graft and token-level twin.
    """

    batch_size: int
    backbone_token: float
    sentence_token: float
    backbone_prefill: float
    sentence_prefill: float
    backbone_cache: float
    sentence_cache: float
    backbone_bytes: float
    sentence_bytes: float
    training_bytes: float
    training_token: float
    baseline_token: float

    @property
    def output_ratio(self) -> float:
        return self.backbone_token / self.sentence_token

    @property
    def prefill_ratio(self) -> float:
        return self.backbone_prefill / self.sentence_prefill


def shapes(recipe: Recipe) -> tuple[SentenceLM, PreTrainedModel]:
    """Both models without weights.

    Raises:
        InputError: no such model can be built, or it has more blocks than any LLM; the field is named.
    """
    with explain_shape(recipe):
        spec = recipe.backbone.model_copy(update={"init": "random"})
        blocks = int(load_backbone_config(spec, weights=False).num_hidden_layers)
        _check_depth("backbone.model", blocks)
        _check_depth("vae.encoder_layers", recipe.vae.encoder_layers)
        _check_depth("vae.decoder_layers", recipe.vae.decoder_layers)
        with torch.device("meta"):
            return random_models(recipe)


@contextmanager
def explain_shape(recipe: Recipe) -> Iterator[None]:
    """Turn what a model makes of values that it was never given into a message that names them."""
    try:
        yield
    except SentCompressError:
        raise
    except Exception as error:  # it may be anything
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"no model like '{recipe.backbone.model}' can be made of backbone.config={recipe.backbone.config} and "
            f"this vae and fusion: {text[:200]}",
            fix="correct the field that is meant, or remove it for the backbone's own",
        ) from error


def _check_depth(field: str, blocks: int) -> None:
    if blocks > MOST_BLOCKS:
        raise InputError(
            f"{field}: {blocks:,} blocks are more than any LLM has", fix=f"use {MOST_BLOCKS:,} at most"
        )


def estimate(
    model: SentenceLM,
    backbone: PreTrainedModel,
    device: Device,
    *,
    batch_size: int,
    prompt_tokens: int,
    new_tokens: int,
    sentence_tokens: float,
) -> Estimate:
    """Expected seconds and bytes.

    Args:
        model, backbone: of any device, the meta device too.
        sentence_tokens: mean length of a sentence.
    """
    vae, k, b = model.vae, model.latents, batch_size
    config: Any = backbone.config
    text = prompt_tokens + new_tokens / 2
    head = vae.output_weight.numel()
    cache = backbone_cache_bytes(config, device.element_size)
    encoder, decoder = products(vae.encoder), products(vae.decoder)
    middle, whole = products(model.backbone), products(backbone.base_model)
    layers = config.num_hidden_layers
    prefix = int(getattr(vae.decoder, "prefix", 0))

    def picking(rows: float, passes: int) -> float:
        return device.read(passes * rows * 4 * vae.config.vocab_size)

    token = device.product(whole + head, b) + CACHE_PASSES * device.read(b * text * cache)
    token += picking(b, GENERATE_PASSES) + layers * device.block_seconds + device.step_seconds

    # Sentences are of uneven length: the backbone reads those of a share of the texts together, and until there are as
    # many they wait, half of that share on average.
    share = max(TOGETHER, 1 / b)
    going = b if b == 1 else b * (1 - share / 2)
    read = device.product(encoder, share * b * sentence_tokens) + device.product(middle, share * b * k)
    read += (layers + vae.config.encoder_layers) * device.block_seconds
    sentence = read / share + CACHE_PASSES * device.read(b * text / sentence_tokens * k * cache)
    step = device.product(decoder, going) + vae.config.decoder_layers * device.block_seconds
    proved = bool(device.per_int8_weight) and head >= WORTH_IT
    picked = device.product(head, going, int8=proved) + device.block_seconds
    if proved:
        picked += going * vae.config.vocab_size * device.per_proved_logit
    else:
        picked += picking(going, LOGIT_PASSES)
    written = (sentence_tokens + 1 + prefix) * step + (sentence_tokens + 1) * picked
    sentence += written * b / going

    rows = b * prompt_tokens
    cells = rows / sentence_tokens * k
    learned = encoder + decoder + head + middle * k / sentence_tokens
    # A graft reads each token once and writes it once; its twin does both at once.
    return Estimate(
        batch_size=b,
        backbone_token=token,
        sentence_token=sentence / sentence_tokens,
        backbone_prefill=device.product(whole, rows) + layers * device.block_seconds,
        sentence_prefill=device.product(encoder, rows)
        + device.product(middle, cells)
        + (layers + vae.config.encoder_layers) * device.block_seconds,
        backbone_cache=cache,
        sentence_cache=cache * k / sentence_tokens,
        backbone_bytes=_numel(backbone) * device.element_size,
        sentence_bytes=_numel(model) * device.element_size,
        training_bytes=_numel(model) * (4 + TRAINED_BYTES),
        training_token=BACKWARD * 2 * learned / device.training_flops,
        baseline_token=BACKWARD * 2 * (whole + head) / device.training_flops,
    )


def _numel(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in {id(p): p for p in module.parameters()}.values())


def table(
    estimates: Sequence[Estimate], device: Device, sentence_tokens: float, training_tokens: int
) -> Table:
    """The estimates side by side, a column a batch size."""

    def row(name: str, values: Sequence[str]) -> list[str]:
        return [name, *values]

    def rate(values: Sequence[float]) -> list[str]:
        return [f"{e.batch_size / seconds:,.1f}" for e, seconds in zip(estimates, values, strict=True)]

    first = estimates[0]
    lines = [
        row("backbone, output tokens/s", rate([e.backbone_token for e in estimates])),
        row("sentence model, output tokens/s", rate([e.sentence_token for e in estimates])),
        row("output ratio", [f"{e.output_ratio:.2f}x" for e in estimates]),
        row("prefill ratio", [f"{e.prefill_ratio:.2f}x" for e in estimates]),
    ]
    per_gib = 2**30
    weights = f"{first.backbone_bytes / per_gib:.2f} GiB, {first.sentence_bytes / per_gib:.2f} GiB"
    hours = [f"{training_tokens * t / 3600:.2f}" for t in (first.training_token, first.baseline_token)]
    where = "measured on this machine just now" if device.measured else "from data sheets; not run here"
    notes = [
        f"Device {device.name} ({where}): reads {device.bandwidth / 1e9:,.1f} GB/s, "
        f"{device.flops / 1e12:,.2f} TFLOP/s, {device.block_seconds * 1e6:,.0f} us a block called.",
        f"Sentences of {sentence_tokens:.1f} tokens. Weights: backbone and sentence model {weights}; cache a token of "
        f"text {first.backbone_cache:,.0f} and {first.sentence_cache:,.0f} bytes "
        f"(-{1 - first.sentence_cache / first.backbone_cache:.1%}).",
        f"Longest text of one row beside the weights in {device.memory_bytes / per_gib:.0f} GiB: "
        f"{_longest(device, first.backbone_bytes, first.backbone_cache):,} tokens and "
        f"{_longest(device, first.sentence_bytes, first.sentence_cache):,}.",
        f"Training on {training_tokens:,} tokens: graft {hours[0]} h, token-level twin {hours[1]} h "
        f"({first.baseline_token / first.training_token:.2f}x); weights, gradients and AdamW of the graft "
        f"{first.training_bytes / per_gib:.2f} GiB, activations not counted.",
    ]
    columns = ["", *(f"batch {e.batch_size}" for e in estimates)]
    return Table("Estimate, from shapes alone", columns, lines, notes)


def _longest(device: Device, weights: float, cache: float) -> int:
    return max(0, int((device.memory_bytes - weights) / cache))
