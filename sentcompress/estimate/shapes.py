"""Models with random weights for speed and memory: ``bench speed --backbone opt-125m --init random``."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from sentcompress.modeling.configuration import SentenceLMConfig
from sentcompress.modeling.grafting import plain_config, vae_config
from sentcompress.modeling.pretrained import adapter_name, load_backbone_config, load_causal_lm
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.recipe import Recipe
from sentcompress.registry import get_registry


class _Tokens:
    """Stands for a tokenizer where only its ids matter: there may be none to load offline."""

    def __init__(self, config: Any) -> None:
        self.size = int(config.vocab_size)
        self.bos_token_id, self.eos_token_id = config.bos_token_id, config.eos_token_id
        self.pad_token_id = config.eos_token_id if config.pad_token_id is None else config.pad_token_id

    def __len__(self) -> int:
        return self.size


def random_models(recipe: Recipe) -> tuple[SentenceLM, PreTrainedModel]:
    """A SentenceLM and its backbone in the shapes of a recipe, weights drawn from its seed."""
    spec = recipe.backbone.model_copy(update={"init": "random"})
    config = load_backbone_config(spec, weights=False)
    segmenter = get_registry().create("segmenter", recipe.segmenter.name, recipe.segmenter.options)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        backbone = load_causal_lm(spec).eval()
        vae = vae_config(
            recipe,
            int(config.hidden_size),
            int(config.num_attention_heads),
            _Tokens(config),
            segmenter,
            config,
        )
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


def random_sentences(lengths: list[int], vocab_size: int, seed: int, first: int = 4) -> list[list[int]]:
    """Random token ids in sentences of the given lengths, special ids left out."""
    generator = torch.Generator().manual_seed(seed)
    low = min(first, vocab_size - 1)
    return [torch.randint(low, vocab_size, (n,), generator=generator).tolist() for n in lengths]
