"""``estimate``: speed, memory and training cost of a recipe's model and of its token-level LLMs, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedModel

from sentcompress.estimate.devices import Device
from sentcompress.estimate.roofline import (
    attended_positions,
    backbone_cache_bytes,
    products,
    products_per_token,
    training_flops,
)
from sentcompress.estimate.shapes import count_weights
from sentcompress.estimate.training_memory import FP32_BYTES, training_bytes
from sentcompress.generation.output_head import MIN_WEIGHTS_FOR_SHORTLIST
from sentcompress.generation.text_batch import BACKBONE_BATCH_SHARE
from sentcompress.modeling.pruning import Match
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.table import GIB, Table

CACHE_PASSES = 3
"""Times a step goes over a backbone's cache: it is copied, longer or for other texts (read and written), then read."""
GENERATE_PASSES = 8
"""Times transformers ``generate`` reads or writes logits: cast to fp32, its processors' copy and changes, argmax."""
LOGIT_PASSES = 4
"""The same for our full output head."""


@dataclass(frozen=True)
class ModelEstimate:
    """What one model is expected to cost.

    Attributes:
        seconds_per_token: until every text of the batch has one more token.
        prefill_seconds: of reading a prompt for every text.
        cache_bytes_per_token: of text.
        weight_bytes: in the device's precision.
        training_seconds_per_token: of training text.
        training_bytes: weights, gradients and AdamW state where all of it is trained, without activations.
    """

    seconds_per_token: float
    prefill_seconds: float
    cache_bytes_per_token: float
    weight_bytes: float
    training_seconds_per_token: float
    training_bytes: float


@dataclass(frozen=True)
class Estimate:
    """What the models are expected to cost on a device.

    Attributes:
        batch_size: texts written together.
        opponents: token-level LLMs of equal cost, by their names in the recipe.
    """

    batch_size: int
    backbone: ModelEstimate
    sentence: ModelEstimate
    opponents: dict[str, ModelEstimate]

    @property
    def output_ratio(self) -> float:
        return self.backbone.seconds_per_token / self.sentence.seconds_per_token

    @property
    def prefill_ratio(self) -> float:
        return self.backbone.prefill_seconds / self.sentence.prefill_seconds


def estimate(
    model: SentenceLM,
    backbone: PreTrainedModel,
    device: Device,
    *,
    batch_size: int,
    prompt_tokens: int,
    new_tokens: int,
    sentence_tokens: float,
    opponents: Mapping[str, PreTrainedModel] = MappingProxyType({}),
) -> Estimate:
    """Expected seconds and bytes.

    Args:
        model, backbone: on any device, the meta device too.
        sentence_tokens: mean length of a sentence.
        opponents: on any device, by name.
    """
    text_tokens = prompt_tokens + new_tokens / 2
    prompts = batch_size * prompt_tokens
    cache = backbone_cache_bytes(backbone.config, device.element_size)

    def token_level(llm: PreTrainedModel) -> ModelEstimate:
        return ModelEstimate(
            seconds_per_token=_backbone_step(model, llm, device, batch_size, text_tokens),
            prefill_seconds=device.product(products(llm.base_model), prompts)
            + _blocks(llm) * device.block_seconds,
            cache_bytes_per_token=backbone_cache_bytes(llm.config, device.element_size),
            weight_bytes=count_weights(llm) * device.element_size,
            training_seconds_per_token=_training_seconds(token_products(model, llm), device),
            training_bytes=training_bytes(count_weights(llm), count_weights(llm)),
        )

    return Estimate(
        batch_size=batch_size,
        backbone=token_level(backbone),
        opponents={name: token_level(llm) for name, llm in opponents.items()},
        sentence=ModelEstimate(
            seconds_per_token=_sentence_step(
                model, backbone, device, batch_size, text_tokens, sentence_tokens
            ),
            prefill_seconds=_sentence_prefill(model, backbone, device, prompts, sentence_tokens),
            cache_bytes_per_token=cache * model.latents / sentence_tokens,
            weight_bytes=count_weights(model) * device.element_size,
            training_seconds_per_token=_training_seconds(graft_products(model, sentence_tokens), device),
            training_bytes=training_bytes(count_weights(model), count_weights(model)),
        ),
    )


def vae_products(model: SentenceLM) -> float:
    """Weights that a token is multiplied by when the SentenceVAE trains."""
    return products(model.vae.encoder) + products(model.vae.decoder) + model.vae.output_weight.numel()


def graft_products(model: SentenceLM, sentence_tokens: float) -> float:
    """The same for the graft: it reads each token once and writes it once."""
    return products_per_token(vae_products(model), products(model.backbone), sentence_tokens / model.latents)


def token_products(model: SentenceLM, backbone: PreTrainedModel) -> float:
    """The same for the token-level LLM, whose vocabulary is the sentence model's."""
    return products(backbone.base_model) + model.vae.output_weight.numel()


def _training_seconds(weights: float, device: Device) -> float:
    return training_flops(weights) / device.training_flops


def _blocks(backbone: PreTrainedModel) -> int:
    config: Any = backbone.config
    return int(config.num_hidden_layers)


def _logits(model: SentenceLM, device: Device, texts: float, passes: int) -> float:
    """Seconds of going over the logits of so many texts."""
    return device.read(passes * texts * FP32_BYTES * model.vae.config.vocab_size)


def _backbone_step(
    model: SentenceLM, backbone: PreTrainedModel, device: Device, batch_size: int, text_tokens: float
) -> float:
    """Seconds until every text has one more token, in transformers ``generate``."""
    cache = backbone_cache_bytes(backbone.config, device.element_size)
    seconds = device.product(token_products(model, backbone), batch_size)
    positions = attended_positions(backbone.config, text_tokens)
    seconds += CACHE_PASSES * device.read(batch_size * positions * cache)
    logits = _logits(model, device, batch_size, GENERATE_PASSES)
    return seconds + (logits + _blocks(backbone) * device.block_seconds + device.step_seconds)


def _sentence_step(
    model: SentenceLM,
    backbone: PreTrainedModel,
    device: Device,
    batch_size: int,
    text_tokens: float,
    sentence_tokens: float,
) -> float:
    """Seconds until every text has one more token, in the sentence model."""
    vae, latents, b = model.vae, model.latents, batch_size
    cache = backbone_cache_bytes(backbone.config, device.element_size)
    # Sentences differ in length, so texts end theirs at different times. The backbone reads them when a share of the
    # batch waits for it: half of that share waits on average.
    share = max(BACKBONE_BATCH_SHARE, 1 / b)
    writing = b if b == 1 else b * (1 - share / 2)
    read = device.product(products(vae.encoder), share * b * sentence_tokens)
    read += device.product(products(model.backbone), share * b * latents)
    read += (_blocks(backbone) + vae.config.encoder_layers) * device.block_seconds
    positions = attended_positions(backbone.config, text_tokens / sentence_tokens * latents)
    seconds = read / share + CACHE_PASSES * device.read(b * positions * cache)
    step = device.product(products(vae.decoder), writing) + vae.config.decoder_layers * device.block_seconds
    head = vae.output_weight.numel()
    proves = bool(device.per_int8_weight) and head >= MIN_WEIGHTS_FOR_SHORTLIST
    pick = device.product(head, writing, int8=proves) + device.block_seconds
    if proves:
        pick += writing * vae.config.vocab_size * device.per_proved_logit
    else:
        pick += _logits(model, device, writing, LOGIT_PASSES)
    prefix = int(getattr(vae.decoder, "prefix", 0))
    seconds += ((sentence_tokens + 1 + prefix) * step + (sentence_tokens + 1) * pick) * b / writing
    return seconds / sentence_tokens


def _sentence_prefill(
    model: SentenceLM, backbone: PreTrainedModel, device: Device, tokens: int, sentence_tokens: float
) -> float:
    """Seconds of reading prompts of so many tokens in all."""
    seconds = device.product(products(model.vae.encoder), tokens)
    seconds += device.product(products(model.backbone), tokens / sentence_tokens * model.latents)
    return seconds + (_blocks(backbone) + model.vae.config.encoder_layers) * device.block_seconds


def estimate_table(
    estimates: Sequence[Estimate],
    device: Device,
    sentence_tokens: float,
    training_tokens: int,
    shapes: Mapping[str, Match],
) -> Table:
    """The estimates side by side, with a column for each batch size.

    Args:
        shapes: of the opponents.
    """
    backbone, sentence = estimates[0].backbone, estimates[0].sentence
    rows = [
        ["backbone, output tokens/s", *(_rate(e, e.backbone) for e in estimates)],
        *(
            [f"opponent {name}, output tokens/s", *(_rate(e, e.opponents[name]) for e in estimates)]
            for name in shapes
        ),
        ["sentence model, output tokens/s", *(_rate(e, e.sentence) for e in estimates)],
        ["output ratio", *(f"{e.output_ratio:.2f}x" for e in estimates)],
        ["prefill ratio", *(f"{e.prefill_ratio:.2f}x" for e in estimates)],
    ]
    both = (sentence, backbone)
    graft_hours, baseline_hours = (training_tokens * m.training_seconds_per_token / 3600 for m in both)
    speedup = backbone.training_seconds_per_token / sentence.training_seconds_per_token
    source = "measured on this machine just now" if device.measured else "from data sheets; not run here"
    saved = 1 - sentence.cache_bytes_per_token / backbone.cache_bytes_per_token
    notes = [
        f"Device {device.name} ({source}): reads {device.bandwidth / 1e9:,.1f} GB/s, "
        f"{device.flops / 1e12:,.2f} TFLOP/s, {device.block_seconds * 1e6:,.0f} us of overhead per block.",
        f"Sentences of {sentence_tokens:.1f} tokens. Weights of the backbone and the sentence model: "
        f"{backbone.weight_bytes / GIB:.2f} GiB, {sentence.weight_bytes / GIB:.2f} GiB; cache per token of text "
        f"{backbone.cache_bytes_per_token:,.0f} and {sentence.cache_bytes_per_token:,.0f} bytes (-{saved:.1%}).",
        f"Longest single text that fits with the weights in {device.memory_bytes / GIB:.0f} GiB: "
        f"{_longest(device, backbone):,} tokens and {_longest(device, sentence):,}.",
        f"Training on {training_tokens:,} tokens: graft {graft_hours:.2f} h, token-level baseline "
        f"{baseline_hours:.2f} h ({speedup:.2f}x); weights, gradients and AdamW state "
        f"{sentence.training_bytes / GIB:.2f} and {backbone.training_bytes / GIB:.2f} GiB, activations not included.",
    ]
    for name, shape in shapes.items():
        opponent = estimates[0].opponents[name]
        kept = "" if shape.window is None else f", of {shape.window:,} tokens at most"
        hours = training_tokens * opponent.training_seconds_per_token / 3600
        notes.append(
            f"Opponent {name}: {shape}. Weights {opponent.weight_bytes / GIB:.2f} GiB; cache per token of text "
            f"{opponent.cache_bytes_per_token:,.0f} bytes{kept}; training on as many tokens {hours:.2f} h; weights, "
            f"gradients and AdamW state {opponent.training_bytes / GIB:.2f} GiB."
        )
    columns = ["", *(f"batch {e.batch_size}" for e in estimates)]
    return Table("Estimate, from shapes alone", columns, rows, notes)


def _rate(estimate: Estimate, model: ModelEstimate) -> str:
    return f"{estimate.batch_size / model.seconds_per_token:,.1f}"


def _longest(device: Device, model: ModelEstimate) -> int:
    return max(0, int((device.memory_bytes - model.weight_bytes) / model.cache_bytes_per_token))
