"""A recipe's models in their real shapes: with random weights for speed and memory, or on the meta device without any.

``bench speed --backbone opt-125m --init random`` times the former; predictions are computed from the latter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sentcompress.errors import InputError, SentCompressError
from sentcompress.modeling.configuration import SentenceLMConfig, SentenceVAEConfig
from sentcompress.modeling.grafting import plain_config, vae_config
from sentcompress.modeling.llm_loading import adapter_name, load_backbone_config, load_causal_lm
from sentcompress.modeling.saved_models import read_config
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.modeling.split import split
from sentcompress.recipe import Recipe
from sentcompress.registry import get_registry

MAX_BLOCKS = 1000
"""Blocks are built one by one, so a mistyped depth would take for ever."""


class _Vocabulary:
    """Stands in for the tokenizer: only its size and special ids matter, and the backbone's configuration has them."""

    def __init__(self, config: Any) -> None:
        self.size = int(config.vocab_size)
        self.bos_token_id = getattr(config, "bos_token_id", None)
        self.eos_token_id = getattr(config, "eos_token_id", None)
        pad = getattr(config, "pad_token_id", None)
        self.pad_token_id = self.eos_token_id if pad is None else pad

    def get_vocab(self) -> dict[str, int]:
        return {"the last token": self.size - 1}


def vae_shape(recipe: Recipe, config: Any, hidden_size: int, num_heads: int) -> SentenceVAEConfig:
    """The configuration of a recipe's SentenceVAE, without loading a tokenizer.

    Args:
        config: the backbone's transformers configuration.
        hidden_size, num_heads: of the backbone.

    Raises:
        InputError: the heads do not divide the width, or more blocks are asked for than the LLM has.
    """
    segmenter = get_registry().create("segmenter", recipe.segmenter.name, recipe.segmenter.options)
    return vae_config(recipe, hidden_size, num_heads, _Vocabulary(config), segmenter, config)


def random_models(recipe: Recipe) -> tuple[SentenceLM, PreTrainedModel]:
    """A SentenceLM and its backbone in the shapes of a recipe, weights drawn from its seed.

    Raises:
        InputError: the recipe has a split LLM instead.
    """
    if recipe.graft.split is not None:
        raise InputError(
            "graft.split: sentcompress cannot predict the speed and memory of a split LLM yet",
            fix="leave graft.split out",
        )
    spec = recipe.backbone.model_copy(update={"init": "random"})
    config = load_backbone_config(spec, weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        backbone = load_causal_lm(spec).eval()
        backbone.tie_weights()  # which transformers 5.0 leaves undone on the meta device
        trained = Path(recipe.graft.vae or "")
        if recipe.graft.vae and trained.is_dir():
            vae = SentenceVAEConfig(**read_config(trained, SentenceVAEConfig.model_type))
        else:
            vae = vae_shape(recipe, config, int(config.hidden_size), int(config.num_attention_heads))
        model = SentenceLM(
            SentenceLMConfig(
                vae=vae.to_dict(),
                backbone_name=adapter_name(spec),
                backbone_options=spec.options,
                backbone_config=plain_config(config),
                start_latent=recipe.graft.start_latent,
                shortlist_rank=recipe.graft.shortlist_rank,
            )
        ).eval()
    return model, backbone


def meta_models(recipe: Recipe) -> tuple[SentenceLM, PreTrainedModel]:
    """A recipe's SentenceLM and its backbone on the meta device, without weights.

    Raises:
        InputError: no such model can be built, or it has more blocks than any LLM; the field is named.
    """
    with explain_shape(recipe):
        spec = recipe.backbone.model_copy(update={"init": "random"})
        _check_depth("backbone.model", int(load_backbone_config(spec, weights=False).num_hidden_layers))
        _check_depth("vae.encoder_layers", recipe.vae.encoder_layers)
        _check_depth("vae.decoder_layers", recipe.vae.decoder_layers)
        with torch.device("meta"):
            return random_models(recipe)


def meta_graft(recipe: Recipe) -> SentenceLM | PreTrainedModel:
    """What a recipe grafts, a SentenceLM or a split LLM, on the meta device.

    Raises:
        InputError: no such model can be built; the field is named.
    """
    own = recipe.graft.split
    if own is None:
        return meta_models(recipe)[0]
    with explain_shape(recipe), torch.device("meta"):
        lm = load_causal_lm(recipe.backbone.model_copy(update={"init": "random"})).eval()
        lm.tie_weights()  # which transformers 5.0 leaves undone on the meta device
    split(lm, None, own.first_blocks, own.last_blocks)
    return lm


@contextmanager
def explain_shape(recipe: Recipe) -> Iterator[None]:
    """Turn whatever a model raises for values it cannot be built from into a message that names them."""
    try:
        yield
    except SentCompressError:
        raise
    except Exception as error:  # models raise anything
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"cannot build a model like '{recipe.backbone.model}' with backbone.config={recipe.backbone.config} and "
            f"this vae and fusion: {text[:200]}",
            fix="correct the field the message is about, or remove it to use the backbone's own value",
        ) from error


def _check_depth(field: str, blocks: int) -> None:
    if blocks > MAX_BLOCKS:
        raise InputError(
            f"{field}: {blocks:,} blocks are more than any LLM has", fix=f"use at most {MAX_BLOCKS:,}"
        )


def count_weights(source: nn.Module | Iterable[torch.Tensor]) -> int:
    """Number of weights of a module, or of parameters; shared ones count once."""
    parameters = source.parameters() if isinstance(source, nn.Module) else source
    return sum(p.numel() for p in {id(p): p for p in parameters}.values())


def random_sentences(lengths: list[int], vocab_size: int, seed: int, first: int = 4) -> list[list[int]]:
    """Random token ids in sentences of the given lengths, special ids left out."""
    generator = torch.Generator().manual_seed(seed)
    low = min(first, vocab_size - 1)
    return [torch.randint(low, vocab_size, (n,), generator=generator).tolist() for n in lengths]
