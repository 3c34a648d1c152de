"""The opponents of equal cost: the graft's LLM with fewer blocks or a window, trained on the graft's passages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from sentcompress.files import folder_digest
from sentcompress.modeling.llm_loading import load_backbone_config, load_causal_lm
from sentcompress.modeling.losses import TokenLoss
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
from sentcompress.training.teacher import TaughtLM, token_teacher

SIMILARITY_BATCHES = 8
"""Micro-batches of training passages on which blocks are compared."""


class OpponentJob(PassageJob):
    """An opponent of equal cost, trained on the passages of the graft in its order.

    Args:
        name: of the opponent in the recipe.
        found: its shape.
        teacher: folder of the LLM that ``graft.teacher`` names; None if it is the backbone itself.

    Raises:
        InputError: the LLM has too few blocks, or the settings do not fit it.
    """

    def __init__(
        self, recipe: Recipe, name: str, found: Match, text: Inputs, teacher: Path | None = None
    ) -> None:
        own, spec = recipe.opponents[name], recipe.backbone
        where = f"opponents.{name}"
        kept = ends(found.whole, found.blocks)
        if spec.init == "random":
            whole = load_backbone_config(spec, weights=False)
            config = opponent_config(whole, own, kept, found.feedforward, f"{where}.config", found.window)
            lm = load_causal_lm(spec, config=config)
        else:
            whole_lm = load_causal_lm(spec)
            if own.keep != "ends":
                batches = _batches(recipe, text, whole_lm)
                kept = least_similar(block_similarity(whole_lm, batches), found.blocks)
            lm = pruned(whole_lm, kept)
        rate = own.learning_rate or recipe.baseline.learning_rate
        super().__init__(recipe, opponent_stage(name), text, lm, own, rate, where)
        self.own, self.found, self.kept = own, found, kept
        self.inputs |= found.inputs()
        if own.taught:
            taught_by = token_teacher(recipe, text.tokenizer, lm, teacher)
            self.model = TaughtLM(self.model.lm, TokenLoss(gamma=0.0), taught_by)
            if teacher is not None:
                self.inputs["teacher"] = folder_digest(teacher)

    def card(self) -> Card:
        kept = ", ".join(map(str, self.kept))
        made = "built anew" if self.recipe.backbone.init == "random" else f"pruned to its blocks {kept}"
        return Card(
            title=f"{self.recipe.backbone.model} with {self.found.blocks} of its {self.found.whole} blocks",
            summary=f"An opponent of a SentenceLM: {self.recipe.backbone.model}, {made}, {self.parameters}, trained "
            f"token by token on the same passages for the same number of steps. {self.found} "
            f"({self.own.text_tokens:,} tokens into a text, computed from shapes).",
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
