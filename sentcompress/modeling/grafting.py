"""Building the models from their parts: a fresh SentenceVAE for a backbone, and the graft itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sentcompress.contracts import Segmenter
from sentcompress.contracts.backbone import Backbone
from sentcompress.contracts.proof import prove_backbone, reference_of
from sentcompress.errors import InputError
from sentcompress.modeling.configuration import SentenceLMConfig, SentenceVAEConfig, plugin_record
from sentcompress.modeling.pretrained import adapter_name
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.modeling.vae import SentenceVAE
from sentcompress.recipe import BackboneSpec, Recipe
from sentcompress.registry import get_registry


def wrap_backbone(spec: BackboneSpec, causal_lm: PreTrainedModel) -> Backbone:
    """The adapter around a loaded LLM, proven on random input (:mod:`sentcompress.contracts.proof`).

    Raises:
        InputError: the LLM cannot be a backbone, or its adapter is wrong: what fails is named.
    """
    registry = get_registry()
    name = adapter_name(spec)
    options = registry.options("backbone", name, spec.options, "backbone.options")
    try:
        reference = reference_of(causal_lm)
        backbone: Backbone = registry.get("backbone", name).from_causal_lm(causal_lm, options)  # type: ignore[attr-defined]
        problems = [finding.problem for finding in prove_backbone(backbone, reference) if not finding.passed]
    except (ValueError, AttributeError) as error:
        problems = [str(error)]
    if problems:
        package = registry.owner("backbone", name).package
        raise InputError(
            f"backbone.model: '{spec.model}' (type '{causal_lm.config.model_type}') cannot be grafted with the "
            f"adapter '{name}' of package '{package}':\n"
            + "\n".join(f"  - {problem}" for problem in problems),
            fix="use another LLM, or an adapter made for this one (docs/plugins-guide.md)",
        )
    return backbone


def vae_config(
    recipe: Recipe, hidden_size: int, num_heads: int, tokenizer: Any, segmenter: Segmenter
) -> SentenceVAEConfig:
    """The configuration of a recipe's SentenceVAE for a backbone of the given width and heads.

    Raises:
        InputError: the heads do not divide the width.
    """
    heads = recipe.vae.num_heads or num_heads
    if hidden_size % heads:
        raise InputError(f"vae.num_heads: {heads} does not divide the backbone's hidden size {hidden_size}")
    fusion = get_registry().create(
        "fusion", recipe.fusion.name, recipe.fusion.options, hidden_size=hidden_size
    )
    return SentenceVAEConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_heads=heads,
        encoder_layers=recipe.vae.encoder_layers,
        decoder_layers=recipe.vae.decoder_layers,
        feedforward_size=round(recipe.vae.feedforward_multiple * hidden_size),
        dropout=recipe.vae.dropout,
        conditioning=recipe.vae.conditioning,
        fusion=recipe.fusion.model_dump(),
        latents=fusion.latents,
        max_sentence_tokens=segmenter.max_tokens,
        tie_embeddings=recipe.vae.tie_embeddings,
        variational=recipe.train_vae.kl_weight > 0,
        segmenter={**recipe.segmenter.model_dump(), "state": segmenter.state()},
        backbone={"name": adapter_name(recipe.backbone), "model": recipe.backbone.model},
        plugins=[
            plugin_record("fusion", recipe.fusion.name),
            plugin_record("segmenter", recipe.segmenter.name),
        ],
        bos_token_id=tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def start_from_embeddings(vae: SentenceVAE, backbone: Backbone) -> None:
    """``vae.init: embeddings``: begin with the backbone's token embeddings instead of random ones."""
    table = token_table(backbone, vae.config.vocab_size)
    vae.embed_tokens.weight.copy_(table)
    if not vae.config.tie_embeddings:
        vae.decoder_embed_tokens.weight.copy_(table)
        vae.lm_head.weight.copy_(table)


@torch.no_grad()
def token_table(backbone: Backbone, vocab_size: int) -> Tensor:
    """``[V, H]``: every token's embedding as the backbone's blocks read it."""
    device = next(backbone.parameters()).device
    return backbone.token_embeddings(torch.arange(vocab_size, device=device)).float()


@torch.no_grad()
def graft(recipe: Recipe, vae: SentenceVAE, backbone: Backbone) -> SentenceLM:
    """Put a backbone between a SentenceVAE's encoder and decoder (paper section 3.2).

    The latents are scaled to the size of the token embeddings the blocks are used to (measured), and the start
    latent begins as the embedding of the start token. The backbone's token embeddings are dropped.

    Raises:
        InputError: the SentenceVAE does not fit the backbone.
    """
    if vae.config.hidden_size != backbone.hidden_size:
        raise InputError(
            f"the SentenceVAE has hidden size {vae.config.hidden_size}, the backbone {recipe.backbone.model} "
            f"{backbone.hidden_size}",
            fix=f"train one for it: sentcompress train-vae --backbone {recipe.backbone.model}",
        )
    table = token_table(backbone, vae.config.vocab_size)
    scale = float(table.square().mean().sqrt()) if recipe.graft.match_scale else 1.0
    start = table[vae.config.bos_token_id]
    backbone.drop_token_embeddings()
    config = SentenceLMConfig(
        vae=vae.config.to_dict(),
        backbone_name=adapter_name(recipe.backbone),
        backbone_options=recipe.backbone.options,
        backbone_config=plain_config(backbone.config),
        # A latent leaves the fusion's LayerNorm with a root mean square near 1.
        latent_scale=scale if math.isfinite(scale) and scale > 0 else 1.0,
        start_latent=recipe.graft.start_latent,
        plugins=[*vae.config.plugins, plugin_record("backbone", adapter_name(recipe.backbone))],
    )
    model = SentenceLM(config)
    model.vae.load_state_dict(vae.state_dict())
    model.backbone.load_state_dict(backbone.state_dict())
    if config.start_latent:
        model.start.copy_(start.expand_as(model.start))
    return model


def plain_config(config: Any) -> dict[str, Any]:
    """A transformers configuration as the JSON values it would be saved as."""
    settings = config.to_diff_dict()
    settings["model_type"] = config.model_type
    for key in ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"):
        settings.pop(key, None)
    return settings
