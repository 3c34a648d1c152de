"""The inputs of every stage: tokenizer, segmenter and tokenized corpus of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sentcompress.contracts import Segmenter
from sentcompress.contracts.backbone import Backbone
from sentcompress.modeling.backbone_config import explain_build
from sentcompress.modeling.llm_loading import (
    adapter_name,
    load_backbone_config,
    load_backbone_tokenizer,
)
from sentcompress.recipe import Recipe
from sentcompress.registry import get_registry
from sentcompress.text.corpus import Corpus, build_corpus


@dataclass
class Inputs:
    """A recipe's text, ready to be sampled."""

    recipe: Recipe
    tokenizer: Any
    segmenter: Segmenter
    corpus: Corpus

    def describe(self) -> str:
        """A line about the data, for model cards."""
        documents = len(self.corpus.train)
        return (
            f"dataset '{self.recipe.data.name}', {documents} training documents, {len(self.corpus.heldout)} held out; "
            f"segmenter '{self.recipe.segmenter.name}'"
        )


def load_inputs(recipe: Recipe, tokenizer: Any | None = None) -> Inputs:
    """Build the recipe's dataset and segmenter, and tokenize its corpus or find it in the cache.

    Args:
        tokenizer: None uses the backbone's.

    Raises:
        InputError: the data or the backbone cannot be read.
        PluginError: a component is missing or broken.
    """
    registry = get_registry()
    tokenizer = tokenizer or load_backbone_tokenizer(recipe.backbone)
    dataset = registry.create("dataset", recipe.data.name, recipe.data.options)
    segmenter = registry.create("segmenter", recipe.segmenter.name, recipe.segmenter.options)
    return Inputs(recipe, tokenizer, segmenter, build_corpus(dataset, segmenter, tokenizer))


def backbone_shape(recipe: Recipe) -> Backbone:
    """The recipe's backbone on the meta device, without weights: for its width, heads and parameter counts."""
    config = load_backbone_config(recipe.backbone, weights=False)
    registry = get_registry()
    name = adapter_name(recipe.backbone)
    options = registry.options("backbone", name, recipe.backbone.options, "backbone.options")
    with explain_build(recipe.backbone, config), torch.device("meta"):
        return registry.get("backbone", name).from_config(config, options)  # type: ignore[attr-defined]
