"""Output speed at the largest batch of each system: as many texts as their caches fit into a budget of memory.

A cache that is a tenth as large lets ten times as many texts be written together. Each system gets the batch that its
own caches allow (the sentence model's decoder has one too), and what is compared is tokens/s. The prompt is the same in
every row: it is read once and its cache copied, so that a few gigabytes of cache take seconds to fill and not minutes.
Reading and copying are not in the figures, which are of what comes after the first token, as everywhere
(:mod:`sentcompress.benchmark.measurements.speed`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from sentcompress.benchmark.measurements.memory import cache_tensors, decoder_cache_bytes, tensor_bytes
from sentcompress.benchmark.systems import BACKBONE, IN_PLACE, Prompt, SentenceSystem, System
from sentcompress.errors import InputError
from sentcompress.generation.backbone_cache import SPARE_CELLS

Layers = list[tuple[Tensor, Tensor]]
"""Keys and values ``[1, heads, N, d]`` of each block."""


class FullSystem(System):
    """Something that continues as many copies of one prompt, given when it is made, as its cache fits into a budget.

    Attributes:
        rows: texts.
    """

    rows: int
    reads = False

    def write(self, prompts: Sequence[Prompt], new_tokens: int) -> int:
        """Continue every copy of its own prompt; ``prompts`` are not looked at."""
        raise NotImplementedError

    def fit(self, text_bytes: int, budget: int) -> None:
        """As many rows as fit, each with ``text_bytes`` of cache at its end. Raises InputError where none does."""
        self.rows = budget // text_bytes
        if not self.rows:
            raise InputError(
                f"bench.memory_budget_bytes: {budget:,} bytes, but the cache of one text of the {self.name} takes "
                f"{text_bytes:,}",
                fix="raise it, or lower bench.prompt_tokens",
            )


class FullTokenSystem(FullSystem):
    """The backbone in transformers ``generate``, greedy, from the prompt's cache.

    Args:
        prompt: its tokens, start token included.
        new_tokens: at most so many are written.
        static: with a cache of fixed size, which is written in place and not put together anew at each token.
    """

    def __init__(
        self, model: PreTrainedModel, prompt: list[int], new_tokens: int, budget: int, *, static: bool
    ) -> None:
        self.model, self.static = model.eval(), static
        self.name = IN_PLACE if static else BACKBONE
        self.ids = torch.tensor([prompt], device=next(model.parameters()).device)
        with torch.no_grad():
            cache = model(input_ids=self.ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        size = tensor_bytes(cache_tensors(cache))
        self.layers: Layers = [(layer.keys, layer.values) for layer in cache.layers]
        self.length = len(prompt) + new_tokens
        self.fit(math.ceil(size / (len(prompt) - 1) * self.length), budget)

    @torch.no_grad()
    def write(self, prompts: Sequence[Prompt], new_tokens: int) -> int:
        cache = StaticCache(self.model.config, self.length) if self.static else DynamicCache()
        for number, layer in enumerate(self.layers):
            cache.update(*(states.expand(self.rows, -1, -1, -1) for states in layer), number)
        ids = self.ids.expand(self.rows, -1)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            disable_compile=True,  # a batch of a new size would be compiled for minutes
            pad_token_id=self.model.config.pad_token_id,
        )
        return int(output.shape[1] - ids.shape[1])


class FullSentenceSystem(FullSystem):
    """The sentence model after a prefix that has been read.

    Args:
        ours: as it is timed at other batch sizes.
        new_tokens: at most so many are written.
    """

    def __init__(self, ours: SentenceSystem, prompt: Prompt, new_tokens: int, budget: int) -> None:
        self.ours, self.model, self.name = ours, ours.model, ours.name
        self.prefix = ours.generator.prefix_of(prompt.sentences)
        cells = ours.generator.prefill([prompt.sentences], ours.cache)
        # There is room for so many more whenever it has to grow.
        new_cells = SPARE_CELLS * math.ceil(new_tokens / statistics.mean(ours.lengths) / SPARE_CELLS)
        per_cell = cells.cache_bytes / cells.counts[0]
        cell_bytes = math.ceil(per_cell * (cells.counts[0] + new_cells))
        self.fit(cell_bytes + decoder_cache_bytes(self.model), budget)

    def write(self, prompts: Sequence[Prompt], new_tokens: int) -> int:
        return self.ours.write([Prompt(self.prefix.sentences)] * self.rows, new_tokens, self.prefix)


def full_systems(
    backbone: PreTrainedModel,
    ours: SentenceSystem,
    prompt: Prompt,
    new_tokens: int,
    budget: int,
    bos_token_id: int,
) -> Sequence[FullSystem]:
    """The backbone with either cache, and the sentence model, each at its largest batch.

    Raises:
        InputError: not even one text fits into the budget.
    """
    tokens = [bos_token_id, *prompt.tokens]
    return [
        FullTokenSystem(backbone, tokens, new_tokens, budget, static=False),
        FullSentenceSystem(ours, prompt, new_tokens, budget),
        FullTokenSystem(backbone, tokens, new_tokens, budget, static=True),
    ]
