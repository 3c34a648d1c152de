"""The token-level LLM of fewer blocks whose decoding costs as much as the sentence model's, found from shapes."""

from __future__ import annotations

from bisect import bisect_left
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sentcompress.errors import InputError
from sentcompress.estimate.roofline import decoding_cost, serving_cost
from sentcompress.estimate.shapes import explain_shape, meta_graft
from sentcompress.modeling.llm_loading import load_backbone_config
from sentcompress.modeling.pruning import WINDOWED, Match, ends, opponent_config
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.recipe import OpponentSettings, Recipe

FEEDFORWARD = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
"""Names that configurations give the width of their feed-forward layers."""
STEP = 8
"""Feed-forward widths are multiples of this."""


def match(recipe: Recipe, name: str, sentence_tokens: float) -> Match:
    """The shape of an opponent whose cost is closest to that of a recipe's sentence model.

    Args:
        name: of the opponent in the recipe.
        sentence_tokens: mean length of a sentence.

    Raises:
        InputError: the opponent's settings do not fit the LLM, or a batch has no room in ``serving_bytes``.
    """
    spec, settings, where = recipe.backbone, recipe.opponents[name], f"opponents.{name}"
    whole = load_backbone_config(spec, weights=False)
    number = int(whole.num_hidden_layers)
    most = number if settings.blocks or settings.window == "auto" else number - 1
    _check(recipe, settings, where, whole.model_type)
    if not most or (settings.blocks or 1) > most:
        raise InputError(
            f"{where}: {settings.blocks or 'fewer'} blocks, but '{spec.model}' has {number}",
            fix="choose fewer, or leave this opponent out",
        )

    model = meta_graft(recipe)

    given = None if settings.window == "auto" else settings.window

    @cache
    def share(blocks: int, width: int | None = None, window: int | None = given) -> float:
        feedforward = {} if width is None else {field: width}
        short = _meta_opponent(recipe, name, whole, blocks, feedforward, window)
        return cost_share(short, model, settings, settings.text_tokens, sentence_tokens)

    def distance(shape: tuple[int | None, ...]) -> float:
        return abs(share(*shape) - 1)

    def found(blocks: int, width: int | None = None, window: int | None = given) -> Match:
        feedforward = {} if width is None else {field: width}
        return Match(blocks, number, settings.cost, feedforward, share(blocks, width, window), window)

    field = next((name for name in FEEDFORWARD if hasattr(whole, name)), "")
    if settings.window == "auto":
        blocks, windows = settings.blocks or number, range(2, settings.text_tokens + 2)
        wide = bisect_left(windows, 1.0, key=lambda window: share(blocks, None, window))
        near = windows[max(0, wide - 1) : wide + 1]
        return found(*min(((blocks, None, window) for window in near), key=distance))
    if settings.blocks:
        return found(settings.blocks)
    above = bisect_left(range(1, most + 1), 1.0, key=lambda blocks: share(blocks)) + 1
    blocks = min((max(1, above - 1), min(most, above)), key=lambda blocks: distance((blocks, None)))
    # The widths of a pretrained LLM are what they are.
    if spec.init == "random" and field and field not in settings.config:
        width = getattr(whole, field) or 4 * whole.hidden_size  # GPT-2 has None for that
        widths = range(width // 4 // STEP * STEP or STEP, 4 * width, STEP)
        wide = bisect_left(widths, 1.0, key=lambda width: share(blocks, width))
        best = min(((blocks, width) for width in widths[max(0, wide - 1) : wide + 1]), key=distance)
        if distance(best) < distance((blocks, None)) / 2:  # and not where no width comes near
            return found(*best)
    return found(blocks)


def meta_opponent(recipe: Recipe, name: str, sentence_tokens: float) -> tuple[Match, PreTrainedModel]:
    """An opponent's shape, and an LLM of it on the meta device, without weights; arguments as for :func:`match`."""
    found = match(recipe, name, sentence_tokens)
    whole = load_backbone_config(recipe.backbone, weights=False)
    return found, _meta_opponent(recipe, name, whole, found.blocks, found.feedforward, found.window)


def _meta_opponent(
    recipe: Recipe, name: str, whole: Any, blocks: int, feedforward: dict[str, int], window: int | None
) -> PreTrainedModel:
    settings, kept = recipe.opponents[name], ends(int(whole.num_hidden_layers), blocks)
    with explain_shape(recipe), torch.device("meta"):
        config = opponent_config(whole, settings, kept, feedforward, f"opponents.{name}.config", window)
        short: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
        short.tie_weights()  # which transformers 5.0 leaves undone on the meta device
    return short


def cost_share(
    opponent: PreTrainedModel,
    model: SentenceLM | PreTrainedModel,
    settings: OpponentSettings,
    text_tokens: float,
    sentence_tokens: float,
) -> float:
    """An opponent's cost over the sentence model's, by the kind of cost that its settings name.

    Args:
        text_tokens: tokens of the text before, for operations; the size of a batch's texts is that of the settings.
        sentence_tokens: mean length of a sentence.
    """
    if settings.cost == "serving":
        costs = [
            serving_cost(each, settings.text_tokens, sentence_tokens, settings.serving_bytes)
            for each in (opponent, model)
        ]
    else:
        costs = [decoding_cost(each, text_tokens, sentence_tokens)[0] for each in (opponent, model)]
    return costs[0] / costs[1]


def shape_note(config: Any, whole: int, settings: OpponentSettings) -> str:
    """An opponent's blocks of ``whole``, and its window, for the note of a row."""
    window = f"a window of {config.sliding_window:,} tokens; " if settings.window else ""
    return f"{config.num_hidden_layers} of {whole} blocks; {window}"


def _check(recipe: Recipe, settings: OpponentSettings, where: str, model_type: str) -> None:
    """Refuse settings that would do nothing."""
    if settings.window is not None and model_type not in WINDOWED:
        raise InputError(
            f"{where}.window: attention of LLMs of type '{model_type}' has no sliding window",
            fix=f"remove it, or use a backbone of one of these types: {', '.join(WINDOWED)}",
        )
    if settings.window is not None and recipe.backbone.init != "random":
        raise InputError(
            f"{where}.window: the LLM is pretrained, and has learned to attend to all tokens",
            fix="remove it, or use backbone.init: random",
        )
    if settings.window == "auto" and settings.cost != "serving":
        raise InputError(
            f"{where}.window: auto matches the cost of serving, and cost is {settings.cost}",
            fix="set cost: serving, or give a number of tokens",
        )
    if recipe.backbone.init == "random" and settings.keep == "least-similar":
        raise InputError(
            f"{where}.keep: {settings.keep} compares trained blocks, but the LLM's weights are random",
            fix="remove it, or use backbone.init: pretrained",
        )
    if recipe.backbone.init != "random" and settings.config:
        raise InputError(
            f"{where}.config: the LLM is pretrained, so its configuration is what it is",
            fix="remove it, or use backbone.init: random",
        )
