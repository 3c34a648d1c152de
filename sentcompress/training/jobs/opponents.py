"""The opponents of equal cost: the graft's LLM with fewer blocks, trained on the graft's passages."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from transformers import PreTrainedModel

from sentcompress.errors import InputError
from sentcompress.modeling.device_map import blocks_of
from sentcompress.modeling.llm_loading import load_backbone_config, load_causal_lm
from sentcompress.modeling.pruning import (
    Match,
    block_similarity,
    ends,
    least_similar,
    opponent_config,
    pruned,
)
from sentcompress.recipe import Recipe
from sentcompress.training.card import Card
from sentcompress.training.inputs import Inputs
from sentcompress.training.jobs.token_level import USAGE, PassageJob, passage_samplers
from sentcompress.training.run_folder import opponent_stage

SIMILARITY_BATCHES = 8
"""Micro-batches of training passages on which blocks are compared."""


class OpponentJob(PassageJob):
    """An opponent of equal cost, trained on the passages of the graft in its order.

    Args:
        name: of the opponent in the recipe.
        found: its shape.

    Raises:
        InputError: the LLM has too few blocks, or the settings do not fit it.
    """

    def __init__(self, recipe: Recipe, name: str, found: Match, text: Inputs) -> None:
        own, spec = recipe.opponents[name], recipe.backbone
        where = f"opponents.{name}"
        if own.config and spec.init != "random":
            raise InputError(
                f"{where}.config: the LLM is pretrained, so its configuration is what it is",
                fix="remove it, or use backbone.init: random",
            )
        if spec.init == "random":
            whole = load_backbone_config(spec, weights=False)
            self.number = int(whole.num_hidden_layers)
            kept = ends(self.number, found.blocks)
            lm = load_causal_lm(spec, config=opponent_config(whole, own, kept, found.feedforward))
        else:
            whole_lm = load_causal_lm(spec)
            self.number = len(blocks_of(whole_lm))
            kept = ends(self.number, found.blocks)
            if own.keep == "least-similar":
                kept = least_similar(
                    block_similarity(whole_lm, _batches(recipe, text, whole_lm)), found.blocks
                )
            lm = pruned(whole_lm, kept)
        rate = own.learning_rate or recipe.baseline.learning_rate
        super().__init__(recipe, opponent_stage(name), text, lm, own, rate, where)
        self.own, self.found, self.kept = own, found, kept
        self.inputs["blocks"] = " ".join(map(str, kept))
        self.inputs |= {field: str(width) for field, width in found.feedforward.items()}

    def card(self) -> Card:
        kept = ", ".join(map(str, self.kept))
        if self.recipe.backbone.init == "random":
            shape = f"built with {len(self.kept)} of its {self.number} blocks"
            shape += "".join(f" and {field} {width}" for field, width in self.found.feedforward.items())
        else:
            shape = f"pruned to {len(self.kept)} of its {self.number} blocks (numbers {kept})"
        equal = "operations per token at batch 1"
        if self.own.cost == "serving":
            equal = f"bytes read per token in the largest batch that fits into {self.own.serving_bytes:,.0f} bytes"
        return Card(
            title=f"{self.recipe.backbone.model} with {len(self.kept)} of its {self.number} blocks",
            summary=f"An opponent of a SentenceLM: {self.recipe.backbone.model}, {shape}, {self.parameters}, trained "
            "token by token on the same passages for the same number of steps. Decoding costs "
            f"{self.found.share:.2f} times what the SentenceLM costs ({equal}, {self.own.text_tokens:,} tokens into "
            "a text, computed from shapes).",
            data=self.text.describe(),
            heldout="On held-out passages, each without the text before it in its document; "
            "use `sentcompress bench quality` to compare models.",
            usage=USAGE,
            tags=("token-level-opponent",),
        )


def _batches(recipe: Recipe, text: Inputs, lm: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Training passages on which blocks are compared."""
    train, _ = passage_samplers(recipe, text, lm.config)
    return (train.batch(index) for index in range(SIMILARITY_BATCHES))
