"""Tiny models with random weights that have every module of the real ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from sentcompress.modeling import SentenceLM, SentenceVAE, SentenceVAEConfig
from sentcompress.modeling.grafting import graft, wrap_backbone
from sentcompress.recipe import Recipe

OPT_TWINS: dict[str, dict[str, Any]] = {
    "125m": {},
    "350m": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "1.3b": {"num_hidden_layers": 4},
    "30b": {"num_attention_heads": 8, "num_hidden_layers": 5, "enable_bias": True},
}
"""Tiny versions of the published OPT shapes; 350M has projections and post-norm."""


def tiny_opt(vocab_size: int = 500, seed: int = 0, **settings: Any) -> OPTForCausalLM:
    """An OPT of hidden size 32 with random weights, in eval mode."""
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 3,
        "ffn_dim": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "init_std": 0.1,
    }
    return OPTForCausalLM(OPTConfig(vocab_size=vocab_size, **{**shape, **settings})).eval()


def tiny_vae(vocab_size: int = 500, seed: int = 0, **settings: Any) -> SentenceVAE:
    """A SentenceVAE of hidden size 32 with random weights, in eval mode."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_heads": 4, "max_sentence_tokens": 24, "embed_init_std": 0.1}
    return SentenceVAE(SentenceVAEConfig(vocab_size=vocab_size, **{**shape, **settings})).eval()


def tiny_sentence_lm(
    vocab_size: int = 500, recipe: Recipe | None = None, vae: dict[str, Any] | None = None, **settings: Any
) -> SentenceLM:
    """A tiny OPT grafted with a tiny SentenceVAE, in eval mode; ``settings`` go to the OPT."""
    recipe = recipe or Recipe(name="tiny")
    backbone = wrap_backbone(recipe.backbone, tiny_opt(vocab_size, **settings))
    return graft(recipe, tiny_vae(vocab_size, **(vae or {})), backbone).eval()


def tiny_passages(vocab_size: int = 500, seed: int = 0, start: bool = True) -> dict[str, Tensor]:
    """A SentenceLM batch: 9 sentences of 1 to 7 tokens in three passages, two of them packed in one row."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([7, 1, 5, 3, 6, 2, 4, 7, 1])
    mask = torch.arange(7) < lengths[:, None]
    input_ids = torch.randint(4, vocab_size, mask.shape, generator=generator).masked_fill(~mask, 1)
    first = -2 if start else -1
    sentence_index = torch.tensor([[first, 0, 1, 2, 3, -1], [first, 4, 5, 6, 7, 8]])
    passage_ids = torch.tensor([[0, 0, 0, 0, 0, -1], [1, 1, 1, 2, 2, 2]])
    if not start:
        passage_ids[:, 0] = -1
    return {
        "input_ids": input_ids,
        "attention_mask": mask.long(),
        "sentence_index": sentence_index,
        "passage_ids": passage_ids,
        "scored": torch.tensor([1, 1, 1, 1, 1, 1, 0, 1, 1]).bool(),
        "last": torch.tensor([0, 0, 0, 1, 0, 1, 0, 0, 1]).bool(),
    }
