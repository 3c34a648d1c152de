"""The token-level LLM of fewer blocks whose decoding costs as much as the sentence model's, found from shapes."""

from __future__ import annotations

from bisect import bisect_left
from functools import cache

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sentcompress.errors import InputError
from sentcompress.estimate.roofline import decoding_cost, serving_cost
from sentcompress.estimate.shapes import explain_shape, meta_models
from sentcompress.modeling.llm_loading import load_backbone_config
from sentcompress.modeling.pruning import Match, ends, opponent_config
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.recipe import OpponentSettings, Recipe

FEEDFORWARD = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
"""Names that configurations give the width of their feed-forward layers."""
STEP = 8
"""Feed-forward widths are multiples of this."""


def match(recipe: Recipe, settings: OpponentSettings, sentence_tokens: float) -> Match:
    """The shape whose cost is closest to that of a recipe's sentence model.

    Args:
        sentence_tokens: mean length of a sentence.

    Raises:
        InputError: the LLM has one block, or fewer than asked for; a batch has no room in ``serving_bytes``.
    """
    spec = recipe.backbone
    whole = load_backbone_config(spec, weights=False)
    number = int(whole.num_hidden_layers)
    most = number if settings.blocks else number - 1
    if not most or (settings.blocks or 1) > most:
        raise InputError(
            f"opponents: {settings.blocks or 'fewer'} blocks, but '{spec.model}' has {number}",
            fix="choose fewer, or leave the opponents out",
        )

    def cost(candidate: SentenceLM | PreTrainedModel) -> float:
        if settings.cost == "serving":
            return serving_cost(candidate, settings.text_tokens, sentence_tokens, settings.serving_bytes)
        return decoding_cost(candidate, settings.text_tokens, sentence_tokens)[0]

    target = cost(meta_models(recipe)[0])

    @cache
    def share(blocks: int, width: int | None = None) -> float:
        with explain_shape(recipe), torch.device("meta"):
            kept = ends(number, blocks)
            config = opponent_config(whole, settings, kept, {} if width is None else {field: width})
            short = AutoModelForCausalLM.from_config(config).eval()
            short.tie_weights()  # which transformers 5.0 leaves undone on the meta device
        return cost(short) / target

    def distance(shape: tuple[int, int | None]) -> float:
        return abs(share(*shape) - 1)

    field = next((name for name in FEEDFORWARD if getattr(whole, name, None)), "")
    if settings.blocks:
        return Match(settings.blocks, {}, share(settings.blocks))
    above = bisect_left(range(1, most + 1), 1.0, key=lambda blocks: share(blocks)) + 1
    blocks = min((max(1, above - 1), min(most, above)), key=lambda blocks: distance((blocks, None)))
    shape: tuple[int, int | None] = (blocks, None)
    # The widths of a pretrained LLM are what they are.
    if spec.init == "random" and field and field not in settings.config:
        width = getattr(whole, field)
        widths = range(width // 4 // STEP * STEP or STEP, 4 * width, STEP)
        wide = bisect_left(widths, 1.0, key=lambda width: share(blocks, width))
        shape = min(shape, *((blocks, width) for width in widths[max(0, wide - 1) : wide + 1]), key=distance)
    return Match(blocks, {} if shape[1] is None else {field: shape[1]}, share(*shape))
