"""``--dry-run``: what a recipe would build and cost, from shapes alone. Nothing is downloaded or written."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sentcompress.estimate.equal_cost import match
from sentcompress.estimate.shapes import count_weights, meta_graft, vae_shape
from sentcompress.estimate.training_memory import training_bytes, weight_bytes
from sentcompress.modeling import SentenceVAE
from sentcompress.recipe import MemorySettings, Recipe, SplitSettings
from sentcompress.table import GIB
from sentcompress.training.inputs import backbone_shape
from sentcompress.training.run_folder import BASELINE, opponent_stage

TOKENS_PER_SENTENCE = 15
"""Assumed where only sentences are counted; the corpus decides (``bench data`` prints it)."""
UNTOUCHED = "nothing was downloaded, built or written"


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
    backbone = backbone_shape(recipe)
    config = vae_shape(recipe, backbone.config, backbone.hidden_size, backbone.num_heads)
    with torch.device("meta"):
        vae = SentenceVAE(config)
    vocabulary = count_weights(vae.embed_tokens)
    if not config.tie_embeddings:
        vocabulary += count_weights(vae.decoder_embed_tokens) + count_weights(vae.lm_head)
    encoder = count_weights(vae.encoder) + count_weights(vae.fusion)
    start = config.latents * config.hidden_size if recipe.graft.start_latent else 0
    return Plan(
        encoder=encoder + (count_weights(vae.gaussian) if config.variational else 0),
        decoder=count_weights(vae.decoder),
        vocabulary=vocabulary,
        backbone=count_weights(backbone),
        termination=2 * config.latents * config.hidden_size + 2 + start,
    )


def plan(recipe: Recipe) -> str:
    """The plan as text: parts, stages, memory, tokens."""
    if recipe.pretrain is not None:
        settings = recipe.pretrain
        sequences = settings.steps * settings.gradient_accumulation * settings.sequences_per_batch
        tokens = sequences * settings.sequence_length
        return "\n".join(
            [
                _title(recipe),
                f"  pretrain   {settings.steps:,} steps, {tokens:,} tokens, vocabulary {settings.vocab_size:,}",
                UNTOUCHED,
            ]
        )
    if recipe.memory is not None:
        return _memory_plan(recipe, recipe.memory)
    if recipe.graft.split is not None:
        return _split_plan(recipe, recipe.graft.split)
    parts = count(recipe)
    vae, graft = recipe.train_vae, recipe.graft
    sentences, passages = _sentences(recipe), _passages(recipe)
    vae_tokens = sentences * TOKENS_PER_SENTENCE
    most = passages * graft.max_sentences
    # Adapters and last blocks are small compared with the rest.
    trainable = parts.sentence_lm - (0 if graft.tune == "full" else parts.backbone)
    lines = [
        _title(recipe),
        "parameters",
        f"  sentence encoder   {_millions(parts.encoder)}",
        f"  sentence decoder   {_millions(parts.decoder)}",
        f"  vocabulary         {_millions(parts.vocabulary)}",
        f"  SentenceVAE        {_millions(parts.vae)}",
        f"  backbone blocks    {_millions(parts.backbone)}",
        f"  SentenceLM         {_millions(parts.sentence_lm)}",
        "memory in fp32, activations not included",
        f"  vae                {_gib(training_bytes(parts.vae, parts.vae))} (weights, gradients, AdamW)",
        f"  graft              {_gib(training_bytes(parts.sentence_lm, trainable))} (tune: {graft.tune})",
        f"  generate           {_gib(weight_bytes(parts.sentence_lm))} (weights)",
        f"tokens, at {TOKENS_PER_SENTENCE} per sentence",
        f"  vae                {vae.steps:,} steps, {sentences:,} sentences, {vae_tokens:,} tokens",
        f"  graft              {graft.steps:,} steps, {passages:,} passages, at most {most:,} sentences, "
        f"{most * TOKENS_PER_SENTENCE:,} tokens",
        *_compared(recipe),
        f"  bench              {', '.join(recipe.bench.metrics)}",
        UNTOUCHED,
    ]
    return "\n".join(lines)


def _memory_plan(recipe: Recipe, memory: MemorySettings) -> str:
    """The plan of a recipe that fine-tunes an LLM for a memory."""
    passages = _passages(recipe)
    most = passages * memory.max_sentences
    drawn = ", ".join(f"{name} {least} to {most}" for name, (least, most) in (memory.draw or {}).items())
    return "\n".join(
        [
            _title(recipe),
            f"  backbone blocks    {_millions(count_weights(backbone_shape(recipe)))} (tune: {memory.tune})",
            f"  memory             {memory.name}" + (f", drawn: {drawn}" if drawn else ""),
            f"                     {memory.steps:,} steps, {passages:,} passages, at most {most:,} sentences, "
            f"{most * TOKENS_PER_SENTENCE:,} tokens at {TOKENS_PER_SENTENCE} per sentence",
            f"  baseline           {'the same passages and steps' if recipe.baseline.enabled else 'off'}",
            f"  bench              {', '.join(recipe.bench.metrics) or 'nothing'}",
            UNTOUCHED,
        ]
    )


def _split_plan(recipe: Recipe, split: SplitSettings) -> str:
    """The plan of a recipe that grafts a split LLM."""
    graft, passages = recipe.graft, _passages(recipe)
    most, number = passages * graft.max_sentences, int(backbone_shape(recipe).config.num_hidden_layers)
    lm = meta_graft(recipe)
    size, middle = count_weights(lm), number - split.first_blocks - split.last_blocks
    return "\n".join(
        [
            _title(recipe),
            f"  split              {split.first_blocks} first and {split.last_blocks} last blocks at every token, "
            f"{middle} middle blocks once per sentence",
            f"  parameters         {_millions(size)} (tune: {graft.tune})",
            f"  graft              {_gib(training_bytes(size, size))} (weights, gradients, AdamW in fp32, activations "
            "not included)",
            f"                     {graft.steps:,} steps, {passages:,} passages, at most {most:,} sentences, "
            f"{most * TOKENS_PER_SENTENCE:,} tokens at {TOKENS_PER_SENTENCE} per sentence",
            *_compared(recipe),
            f"  bench              {', '.join(recipe.bench.metrics) or 'nothing'}",
            UNTOUCHED,
        ]
    )


def _compared(recipe: Recipe) -> list[str]:
    """The lines of what a graft is compared with."""
    return [
        f"  baseline           {'the same passages and steps' if recipe.baseline.enabled else 'off'}",
        *(
            f"  opponent           {name}: {match(recipe, name, TOKENS_PER_SENTENCE)}"
            for name in recipe.opponents
        ),
    ]


def token_budget(recipe: Recipe) -> dict[str, int]:
    """Tokens that each stage of a grafting recipe trains on at most, by the stage's name."""
    tokens = {} if not recipe.trains_vae else {"vae": _sentences(recipe) * TOKENS_PER_SENTENCE}
    tokens["graft"] = _passages(recipe) * recipe.graft.max_sentences * TOKENS_PER_SENTENCE
    others = [BASELINE.name] if recipe.baseline.enabled else []
    others += [opponent_stage(name).name for name in recipe.opponents]
    return tokens | dict.fromkeys(others, tokens["graft"])


def _sentences(recipe: Recipe) -> int:
    vae = recipe.train_vae
    return vae.steps * vae.gradient_accumulation * vae.sentences_per_batch


def _passages(recipe: Recipe) -> int:
    settings = recipe.passages
    return settings.steps * settings.gradient_accumulation * settings.passages_per_batch


def _title(recipe: Recipe) -> str:
    return f"{recipe.name} ({recipe.digest()}): backbone {recipe.backbone.model}, data {recipe.data.name}"


def _millions(weights: int) -> str:
    return f"{weights / 1e6:10.2f} M"


def _gib(size: float) -> str:
    return f"{size / GIB:10.2f} GiB"
