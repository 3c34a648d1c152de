"""``--dry-run``: what a recipe would build and cost, from shapes alone. Nothing is downloaded or written."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from sentcompress.modeling import SentenceVAE
from sentcompress.modeling.grafting import vae_config
from sentcompress.recipe import Recipe
from sentcompress.registry import get_registry
from sentcompress.training.inputs import backbone_shape

BYTES_TRAINED = 16
"""fp32 weight, gradient and two AdamW moments of a parameter that learns."""
TOKENS_A_SENTENCE = 15
"""Assumed where only sentences are counted; the corpus decides (``bench data`` prints it)."""


@dataclass(frozen=True)
class Plan:
    """Parameter counts, in numbers of weights."""

    encoder: int
    decoder: int
    vocabulary: int
    backbone: int
    termination: int

    @property
    def vae(self) -> int:
        return self.encoder + self.decoder + self.vocabulary

    @property
    def sentence_lm(self) -> int:
        return self.vae + self.backbone + self.termination


def count(recipe: Recipe) -> Plan:
    """Count the parameters of a recipe's models, built on the meta device."""
    shape = backbone_shape(recipe)
    # Only numbers are needed of the tokenizer, and the backbone's configuration has them.
    tokens = _Vocabulary(shape.config)
    segmenter = get_registry().create("segmenter", recipe.segmenter.name, recipe.segmenter.options)
    config = vae_config(recipe, shape.hidden_size, shape.num_heads, tokens, segmenter, shape.config)
    with torch.device("meta"):
        vae = SentenceVAE(config)
    vocabulary = _size(vae.embed_tokens)
    if not config.tie_embeddings:
        vocabulary += _size(vae.decoder_embed_tokens) + _size(vae.lm_head)
    start = config.latents * config.hidden_size if recipe.graft.start_latent else 0
    return Plan(
        encoder=_size(vae.encoder) + _size(vae.fusion) + (_size(vae.gaussian) if config.variational else 0),
        decoder=_size(vae.decoder),
        vocabulary=vocabulary,
        backbone=_size(shape),
        termination=2 * config.latents * config.hidden_size + 2 + start,
    )


def plan(recipe: Recipe) -> str:
    """The plan as text: parts, stages, memory, tokens."""
    if recipe.pretrain is not None:
        settings = recipe.pretrain
        tokens = (
            settings.steps
            * settings.gradient_accumulation
            * settings.sequences_per_batch
            * settings.sequence_length
        )
        return "\n".join(
            [
                _head(recipe),
                f"  pretrain   {settings.steps:,} steps, {tokens:,} tokens, vocabulary {settings.vocab_size:,}",
                "nothing was downloaded, built or written",
            ]
        )
    parts = count(recipe)
    vae, graft = recipe.train_vae, recipe.graft
    sentences, passages = _sentences(recipe), _passages(recipe)
    most = passages * graft.max_sentences
    lines = [
        _head(recipe),
        "parameters",
        f"  sentence encoder   {_millions(parts.encoder)}",
        f"  sentence decoder   {_millions(parts.decoder)}",
        f"  vocabulary         {_millions(parts.vocabulary)}",
        f"  SentenceVAE        {_millions(parts.vae)}",
        f"  backbone blocks    {_millions(parts.backbone)}",
        f"  SentenceLM         {_millions(parts.sentence_lm)}",
        "memory in fp32, activations not counted",
        f"  vae                {_gigabytes(parts.vae * BYTES_TRAINED)} (weights, gradients, AdamW)",
        f"  graft              {_gigabytes(_graft_bytes(recipe, parts))} (tune: {graft.tune})",
        f"  generate           {_gigabytes(parts.sentence_lm * 4)} (weights)",
        f"tokens, at {TOKENS_A_SENTENCE} a sentence",
        f"  vae                {vae.steps:,} steps, {sentences:,} sentences, {sentences * TOKENS_A_SENTENCE:,} tokens",
        f"  graft              {graft.steps:,} steps, {passages:,} passages, at most {most:,} sentences, "
        f"{most * TOKENS_A_SENTENCE:,} tokens",
        f"  baseline           {'the same passages and steps' if recipe.baseline.enabled else 'off'}",
        f"  bench              {', '.join(recipe.bench.metrics)}",
        "nothing was downloaded, built or written",
    ]
    return "\n".join(lines)


def budget(recipe: Recipe) -> dict[str, int]:
    """Tokens that each stage of a grafting recipe trains on at most, by its name."""
    tokens = {} if recipe.graft.vae else {"vae": _sentences(recipe) * TOKENS_A_SENTENCE}
    tokens["graft"] = _passages(recipe) * recipe.graft.max_sentences * TOKENS_A_SENTENCE
    return tokens | ({"baseline": tokens["graft"]} if recipe.baseline.enabled else {})


def _sentences(recipe: Recipe) -> int:
    vae = recipe.train_vae
    return vae.steps * vae.gradient_accumulation * vae.sentences_per_batch


def _passages(recipe: Recipe) -> int:
    graft = recipe.graft
    return graft.steps * graft.gradient_accumulation * graft.passages_per_batch


def _graft_bytes(recipe: Recipe, parts: Plan) -> int:
    learns = parts.sentence_lm
    if recipe.graft.tune != "full":
        learns -= parts.backbone  # adapters and last blocks are small beside the rest
    return parts.sentence_lm * 4 + learns * (BYTES_TRAINED - 4)


def _head(recipe: Recipe) -> str:
    return f"{recipe.name} ({recipe.digest()}): backbone {recipe.backbone.model}, data {recipe.data.name}"


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _millions(number: int) -> str:
    return f"{number / 1e6:10.2f} M"


def _gigabytes(number: float) -> str:
    return f"{number / 2**30:10.2f} GiB"


class _Vocabulary(SimpleNamespace):
    """What :func:`vae_config` asks of a tokenizer, from a backbone's configuration."""

    def __init__(self, config: object) -> None:
        super().__init__(
            size=int(config.vocab_size),  # type: ignore[attr-defined]
            bos_token_id=getattr(config, "bos_token_id", 2),
            eos_token_id=getattr(config, "eos_token_id", 2),
            pad_token_id=getattr(config, "pad_token_id", 1),
        )

    def __len__(self) -> int:
        return int(self.size)
