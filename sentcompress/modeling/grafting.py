"""Builds the models: a new SentenceVAE for a backbone, and the graft of the two."""

from __future__ import annotations

import inspect
import math
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sentcompress.contracts import Segmenter
from sentcompress.contracts.backbone import Backbone
from sentcompress.contracts.proof import prove_backbone, reference_of
from sentcompress.errors import InputError, is_out_of_memory
from sentcompress.modeling.configuration import SentenceLMConfig, SentenceVAEConfig, plugin_record
from sentcompress.modeling.llm_blocks import LLMDecoder, LLMEncoder
from sentcompress.modeling.llm_loading import adapter_name
from sentcompress.modeling.pruning import copy_blocks
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.modeling.vae import SentenceVAE
from sentcompress.recipe import BackboneSpec, Recipe, VAESpec
from sentcompress.registry import get_registry


def wrap_backbone(spec: BackboneSpec, causal_lm: PreTrainedModel) -> Backbone:
    """The adapter around a loaded LLM, checked on random input (:mod:`sentcompress.contracts.proof`).

    Raises:
        InputError: the LLM cannot be a backbone, or its adapter is wrong; the message names the failed checks.
    """
    registry = get_registry()
    name = adapter_name(spec)
    options = registry.options("backbone", name, spec.options, "backbone.options")
    cause: Exception | None = None
    try:
        reference = reference_of(causal_lm)
        backbone: Backbone = registry.get("backbone", name).from_causal_lm(causal_lm, options)  # type: ignore[attr-defined]
        failed = [finding for finding in prove_backbone(backbone, reference) if not finding.passed]
        problems = [finding.problem for finding in failed]
        cause = next((finding.cause for finding in failed if finding.cause), None)
    except Exception as error:  # models and adapters raise anything
        if is_out_of_memory(error):
            raise
        cause = error
        problems = [str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"]
    if problems:
        package = registry.owner("backbone", name).package
        raise InputError(
            f"backbone.model: '{spec.model}' (type '{causal_lm.config.model_type}') cannot be grafted with the "
            f"adapter '{name}' of package '{package}':\n"
            + "\n".join(f"  - {problem}" for problem in problems),
            fix="use another LLM, or an adapter made for this one (docs/plugins-guide.md)",
        ) from cause
    return backbone


def vae_config(
    recipe: Recipe,
    hidden_size: int,
    num_heads: int,
    tokenizer: Any,
    segmenter: Segmenter,
    backbone_config: Any = None,
) -> SentenceVAEConfig:
    """The configuration of a recipe's SentenceVAE for a backbone of the given width and heads.

    Args:
        backbone_config: the LLM's transformers configuration; needed for ``vae.init: backbone``.

    Raises:
        InputError: the heads do not divide the width, or the recipe asks for more blocks than the LLM has.
    """
    heads = recipe.vae.num_heads or _heads_for(hidden_size, num_heads)
    if hidden_size % heads:
        raise InputError(
            f"vae.num_heads: {heads} does not divide the backbone's hidden size {hidden_size}",
            fix=f"use a divisor, such as {_heads_for(hidden_size, heads)}",
        )
    name = adapter_name(recipe.backbone)
    backbone: dict[str, Any] = {"name": name, "model": recipe.backbone.model}
    plugins = [plugin_record("fusion", recipe.fusion.name), plugin_record("segmenter", recipe.segmenter.name)]
    own = recipe.vae.init != "backbone"
    if not own:
        backbone |= {"options": recipe.backbone.options, "config": plain_config(backbone_config)}
        plugins.append(plugin_record("backbone", name))
        for field in ("encoder_layers", "decoder_layers"):
            if getattr(recipe.vae, field) > backbone_config.num_hidden_layers:
                raise InputError(
                    f"vae.{field}: {getattr(recipe.vae, field)}, but the backbone {recipe.backbone.model} has "
                    f"{backbone_config.num_hidden_layers} blocks to start from",
                    fix=f"set it to at most {backbone_config.num_hidden_layers}",
                )
    if recipe.vae.decoder_context and hidden_size // heads % 2:
        raise InputError(
            f"vae.decoder_context: its rotary positions need heads of even width, but {heads} heads have width "
            f"{hidden_size // heads}",
            fix="set vae.num_heads",
        )
    fusion = get_registry().create(
        "fusion", recipe.fusion.name, recipe.fusion.options, hidden_size=hidden_size
    )
    shared = inspect.signature(SentenceVAEConfig).parameters.keys() & VAESpec.model_fields.keys()
    same = {name: getattr(recipe.vae, name) for name in shared - {"num_heads"}}
    return SentenceVAEConfig(
        vocab_size=1 + max(tokenizer.get_vocab().values()),  # ids may have holes
        hidden_size=hidden_size,
        num_heads=heads,
        feedforward_size=round(recipe.vae.feedforward_multiple * hidden_size),
        fusion=recipe.fusion.model_dump(),
        latents=fusion.latents,
        max_sentence_tokens=segmenter.max_tokens,
        variational=recipe.train_vae.kl_weight > 0,
        segmenter={**recipe.segmenter.model_dump(), "state": segmenter.state()},
        backbone=backbone,
        blocks="own" if own else "backbone",
        plugins=plugins,
        bos_token_id=tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **same,
    )


def _heads_for(hidden_size: int, most: int) -> int:
    """The largest number of heads up to ``most`` that divides the width; that of some LLMs does not."""
    return next(heads for heads in range(min(most, hidden_size), 0, -1) if hidden_size % heads == 0)


@torch.no_grad()
def start_from_backbone(vae: SentenceVAE, causal_lm: PreTrainedModel, spec: BackboneSpec) -> None:
    """``vae.init: embeddings`` or ``backbone``: start from the LLM's weights instead of random ones.

    The token embeddings are the LLM's. The output head is the LLM's, or the embeddings if it is tied or has another
    width. With ``blocks: backbone``, encoder and decoder are its first and last blocks.
    """
    output = causal_lm.get_output_embeddings()
    head = None if output is None else output.weight.detach().float()
    backbone = wrap_backbone(spec, causal_lm)
    table = token_table(backbone, vae.config.vocab_size)
    vae.embed_tokens.weight.copy_(table)
    if not vae.config.tie_embeddings:
        vae.decoder_embed_tokens.weight.copy_(table)
        fits = head is not None and head.shape[1] == table.shape[1] and len(head) >= len(table)
        vae.lm_head.weight.copy_(head[: len(table)] if head is not None and fits else table)
    if vae.config.blocks == "backbone":
        encoder, decoder = cast(LLMEncoder, vae.encoder), cast(LLMDecoder, vae.decoder)
        number, first, last = len(backbone.blocks), len(encoder.llm.blocks), len(decoder.llm.blocks)
        copy_blocks(backbone, encoder.llm, backbone.blocks, range(first))
        copy_blocks(backbone, decoder.llm, backbone.blocks, range(number - last, number))
        decoder.latent_gain.fill_(table.square().mean().sqrt())


def freeze_embeddings(vae: SentenceVAE) -> None:
    """``vae.freeze: embeddings``: stop training token embeddings and output head."""
    vae.embed_tokens.requires_grad_(False)
    if not vae.config.tie_embeddings:
        vae.decoder_embed_tokens.requires_grad_(False)
        vae.lm_head.requires_grad_(False)


def check_vocabulary(vocab_size: int, backbone: Backbone) -> None:
    """Refuse a tokenizer with more tokens than the LLM has embeddings."""
    known = backbone.config.vocab_size
    if vocab_size > known:
        raise InputError(
            f"the tokenizer has {vocab_size} tokens, but the LLM has embeddings for {known}",
            fix="resize the LLM's embeddings (resize_token_embeddings) and save it, or use its own tokenizer",
        )


@torch.no_grad()
def token_table(backbone: Backbone, vocab_size: int) -> Tensor:
    """``[V, H]``: every token's embedding as input of the backbone's blocks.

    Raises:
        InputError: the tokenizer has more tokens than the LLM has embeddings.
    """
    check_vocabulary(vocab_size, backbone)
    device = next(backbone.parameters()).device
    return backbone.token_embeddings(torch.arange(vocab_size, device=device)).float()


@torch.no_grad()
def graft(recipe: Recipe, vae: SentenceVAE, backbone: Backbone) -> SentenceLM:
    """Put a backbone between a SentenceVAE's encoder and decoder (paper section 3.2).

    The latents are scaled to the measured scale of the token embeddings, which the blocks expect. The start latent is
    initialized with the embedding of the start token. The backbone's token embeddings are dropped.

    Raises:
        InputError: the SentenceVAE does not fit the backbone.
    """
    if vae.config.hidden_size != backbone.hidden_size:
        raise InputError(
            f"the SentenceVAE has hidden size {vae.config.hidden_size}, but the backbone {recipe.backbone.model} "
            f"has {backbone.hidden_size}",
            fix=f"train one for it: sentcompress train-vae --backbone {recipe.backbone.model}",
        )
    table = token_table(backbone, vae.config.vocab_size)
    expected = _probe(backbone)
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
        shortlist_rank=recipe.graft.shortlist_rank,
        plugins=[*vae.config.plugins, plugin_record("backbone", adapter_name(recipe.backbone))],
    )
    model = SentenceLM(config)
    model.vae.load_state_dict(vae.state_dict())
    model.backbone.load_state_dict(backbone.state_dict())
    # The blocks' results depend on the configuration, which some versions of transformers save incompletely.
    if not torch.allclose(_probe(model.backbone), expected, atol=1e-4, rtol=1e-4):
        raise InputError(
            f"backbone.model: {recipe.backbone.model} (type '{config.backbone_config['model_type']}') computes "
            "different results when it is rebuilt from its saved configuration: transformers loses one of its fields",
            fix="use a newer transformers",
        )
    if config.start_latent:
        model.start.copy_(start.expand_as(model.start))
    return model


def _probe(backbone: Backbone) -> Tensor:
    """``[1, 3, H]``: a backbone's hidden states for a fixed input, in eval mode."""
    reference = next(backbone.parameters())
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 3, backbone.hidden_size, generator=generator).to(reference)
    causal = torch.ones(1, 1, 3, 3, dtype=torch.bool, device=reference.device).tril()
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    states, _ = backbone(inputs, causal, torch.arange(3, device=reference.device)[None])
    for module, training in modes:
        module.training = training
    return states


def plain_config(config: Any) -> dict[str, Any]:
    """A transformers configuration as JSON values, as it would be saved."""
    settings = config.to_diff_dict()
    settings["model_type"] = config.model_type
    for key in ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"):
        settings.pop(key, None)
    return settings
