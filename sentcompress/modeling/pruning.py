"""An LLM with only some of its blocks: which to keep, and how to take the others out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from sentcompress.errors import InputError, is_out_of_memory
from sentcompress.modeling.backbone_config import shaped_config
from sentcompress.modeling.device_map import blocks_of
from sentcompress.recipe import OpponentSettings
from sentcompress.recipe.training_sections import EQUAL_COST

WINDOWED = ("gemma2", "gemma3_text", "mistral", "phi3", "qwen2", "qwen3")
"""Types of LLMs whose blocks can all attend through a sliding window."""
_TOKENS = 8
"""Tokens on which a pruned LLM is compared with the whole one."""


@dataclass(frozen=True)
class Match:
    """An opponent's shape.

    Attributes:
        blocks: how many it has.
        whole: how many the LLM has.
        cost: as in its settings.
        feedforward: field of the configuration and width of its feed-forward layers; empty where that is the LLM's.
        share: its cost over the sentence model's.
        window: tokens that a block attends to; None for as many as the LLM's.
    """

    blocks: int
    whole: int
    cost: str
    feedforward: dict[str, int]
    share: float
    window: int | None = None

    @property
    def is_equal(self) -> bool:
        """Whether it costs what the sentence model costs, within a tenth."""
        return abs(self.share - 1) <= EQUAL_COST

    def inputs(self) -> dict[str, str]:
        """What a run records of it."""
        window = {} if self.window is None else {"window": str(self.window)}
        widths = {field: str(width) for field, width in self.feedforward.items()}
        return {"blocks": str(self.blocks)} | widths | window

    def __str__(self) -> str:
        widths = "".join(f", {field} {width}" for field, width in self.feedforward.items())
        widths += "" if self.window is None else f", a window of {self.window:,} tokens"
        what = "operations per token" if self.cost == "operations" else "bytes read per token when serving"
        return f"{self.blocks} of {self.whole} blocks{widths}; {self.share:.2f} times the sentence model's {what}"


def ends(number: int, kept: int) -> list[int]:
    """The first and the last blocks of ``number``, as many of each; the odd one is among the first."""
    last = kept // 2
    return [*range(kept - last), *range(number - last, number)]


def least_similar(similarity: Tensor, kept: int) -> list[int]:
    """The ``kept`` blocks that change their input most, in order."""
    return similarity.argsort(stable=True)[:kept].sort().values.tolist()


@torch.no_grad()
def block_similarity(lm: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """Cosine similarity of each block's input and output, the mean over tokens (arXiv 2403.03853).

    Args:
        batches: ``input_ids`` and ``attention_mask`` ``[B, T]`` each, padding on the right.

    Returns:
        ``[blocks]`` fp64.
    """
    blocks = blocks_of(lm)
    total = torch.zeros(len(blocks), dtype=torch.float64)
    mask = torch.empty(0)

    def note(number: int, inputs: Any, output: Any) -> None:
        before, after = inputs[0], output[0] if isinstance(output, tuple) else output
        similarity = functional.cosine_similarity(before.double(), after.double(), dim=-1)
        total[number] += similarity[mask].sum().cpu()

    hooks = [
        block.register_forward_hook(lambda _, inputs, output, number=number: note(number, inputs, output))
        for number, block in enumerate(blocks)
    ]
    tokens = 0
    try:
        for batch in batches:
            mask = batch["attention_mask"].bool()
            tokens += int(mask.sum())
            lm.base_model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
            )
    finally:
        for hook in hooks:
            hook.remove()
    return total / max(1, tokens)


def cut_config(config: Any, kept: Sequence[int]) -> Any:
    """A configuration of some of the blocks, by number; fields that list values per block are cut likewise.

    Raises:
        ValueError: the LLM has fewer blocks.
    """
    number = config.num_hidden_layers
    if len(kept) > number:
        raise ValueError(f"{len(kept)} blocks were asked for, the LLM has {number}")
    cut = copy.deepcopy(config)
    for field, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == number and not field.startswith("_"):
            setattr(cut, field, [value[block] for block in kept])
    cut.num_hidden_layers = len(kept)
    return cut


def opponent_config(
    whole: Any,
    settings: OpponentSettings,
    kept: Sequence[int],
    feedforward: dict[str, int],
    where: str,
    window: int | None = None,
) -> Any:
    """The configuration of an opponent.

    Args:
        where: its field in the recipe, for messages.
        whole: that of the LLM.
        kept: numbers of the blocks.
        feedforward: field and width, as in a :class:`Match`.
        window: as in a :class:`Match`.
    """
    config = cut_config(whole, kept)
    sliding = {} if window is None else _sliding(config, window)
    if changes := feedforward | sliding | settings.config:
        config = shaped_config({**config.to_diff_dict(), "model_type": config.model_type}, changes, where)
    return config


def _sliding(config: Any, window: int) -> dict[str, Any]:
    """Fields of a configuration all of whose blocks attend through a sliding window."""
    fields = {
        "sliding_window": window,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention"] * config.num_hidden_layers,
    }
    return {name: value for name, value in fields.items() if hasattr(config, name)}


@torch.no_grad()
def copy_blocks(source: nn.Module, target: nn.Module, blocks: nn.ModuleList, kept: Sequence[int]) -> None:
    """Copy the weights of some blocks of ``source``, and all its others, to a ``target`` that has only these blocks.

    Args:
        blocks: those of ``source``.
        kept: their numbers, one for each block of ``target``.
    """
    prefix = next(name for name, module in source.named_modules() if module is blocks) + "."
    weights = source.state_dict()
    for key, value in target.state_dict().items():
        if key.startswith(prefix):
            index, _, rest = key.removeprefix(prefix).partition(".")
            key = f"{prefix}{kept[int(index)]}.{rest}"
        value.copy_(weights[key])


@torch.no_grad()
def _is_the_whole_without_others(lm: PreTrainedModel, short: PreTrainedModel, kept: Sequence[int]) -> bool:
    """Whether a pruned LLM computes, on a few tokens, what the whole one does when its other blocks are skipped."""

    def skip(_: Any, inputs: Any, keywords: Any, output: Any) -> Any:
        hidden_states = inputs[0] if inputs else keywords["hidden_states"]
        return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states

    training, blocks = lm.training, enumerate(blocks_of(lm))
    hooks = [
        block.register_forward_hook(skip, with_kwargs=True) for number, block in blocks if number not in kept
    ]
    ids = torch.arange(_TOKENS)[None] + 1
    try:
        expected = lm.eval()(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
        lm.train(training)
    found = short.eval()(input_ids=ids, use_cache=False).logits
    return torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()), rtol=0)


def pruned(lm: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A causal LM of its own with some of the LLM's blocks, by number, and everything else of it.

    Raises:
        InputError: it is not the whole LLM without the other blocks, as it is where blocks depend on their number.
    """
    refusal = InputError(
        f"an LLM of type '{lm.config.model_type}' cannot be pruned: its blocks depend on their number",
        fix="leave its opponents out, or use backbone.init: random",
    )
    try:
        config = cut_config(lm.config, kept)
        short = AutoModelForCausalLM.from_config(config, attn_implementation=lm.config._attn_implementation)
        short = short.to(lm.dtype)
        copy_blocks(lm, short, blocks_of(lm), kept)
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        raise refusal from error
    if not _is_the_whole_without_others(lm, short, kept):
        raise refusal
    short.generation_config = copy.deepcopy(lm.generation_config)
    return short.train(lm.training)
