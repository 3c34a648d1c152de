"""Output speed under load: the largest batch that fits, and several processes at once.

**Largest batch.** A cache that is a tenth as large lets ten times as many texts be written together. Each system gets
the batch size that its own caches allow (the sentence model's decoder has one too), and tokens per second are compared.
The prompt is the same in all of the batch: it is read once and its cache copied, so that filling a few gigabytes of
cache takes seconds, not minutes. Reading and copying are not timed, as everywhere: output speed counts what comes after
the first token (:mod:`sentcompress.benchmark.speed_runs`).

**Processes.** Every process of the run writes a batch of its own, at the same time. The speed of several processes is
measured beside that of the first alone, in turns, in one run. On a CPU a process has the threads that
``sentcompress launch`` or torchrun gave it, also when it runs alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from sentcompress.benchmark.measurements.speed import Throughput
from sentcompress.benchmark.memory_meter import cache_tensors, decoder_cache_bytes, tensor_bytes
from sentcompress.benchmark.timing import (
    BACKBONE,
    IN_PLACE,
    Prompt,
    SentenceSystem,
    SpeedModels,
    System,
    both_systems,
    make_prompts,
    quiet_transformers,
    require_positions,
    seconds,
)
from sentcompress.contracts.causal_lm import CACHE
from sentcompress.distributed import processes
from sentcompress.errors import InputError, RunError
from sentcompress.generation.backbone_cache import GROWTH_SLOTS
from sentcompress.recipe import BenchSettings

Layers = list[tuple[Tensor, Tensor]]
"""Keys and values ``[1, heads, N, d]`` of each block."""


class LargestBatch(System):
    """Continues as many copies of one prompt as its cache fits into a budget; the prompt is given when it is made.

    Attributes:
        batch_size: number of copies.
    """

    batch_size: int
    reads_prompts = False

    def write(self, prompts: Sequence[Prompt], new_tokens: int) -> int:
        """Continue every copy of its own prompt; ``prompts`` is ignored."""
        raise NotImplementedError

    def fit(self, text_bytes: int, budget: int) -> None:
        """Set the batch size, for ``text_bytes`` of cache per text. Raises InputError where not one text fits."""
        self.batch_size = budget // text_bytes
        if not self.batch_size:
            raise InputError(
                f"bench.memory_budget_bytes: {budget:,} bytes, but the cache of one text of the {self.name} takes "
                f"{text_bytes:,}",
                fix="raise it, or lower bench.prompt_tokens",
            )


def continue_from(model: PreTrainedModel, ids: Tensor, cache: Any, new_tokens: int) -> int:
    """Continue texts ``[B, T]`` greedily in ``generate``, from a cache of all but their last token.

    Returns:
        the number of tokens that each has now more.
    """
    generate: Any = model.generate
    output = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE: cache},
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        disable_compile=True,  # a batch of a new size would be compiled for minutes
        pad_token_id=model.config.pad_token_id,
    )
    return int(output.shape[1] - ids.shape[1])


class LargestTokenBatch(LargestBatch):
    """The backbone in transformers' ``generate``, greedy, from the prompt's cache.

    Args:
        prompt: its tokens, start token included.
        new_tokens: the most that are written.
        static: use a cache of fixed size, written in place, instead of one that is concatenated for each token.
    """

    def __init__(
        self, model: PreTrainedModel, prompt: list[int], new_tokens: int, budget: int, *, static: bool
    ) -> None:
        self.model, self.static = model.eval(), static
        self.name = IN_PLACE if static else BACKBONE
        self.ids = torch.tensor([prompt], device=next(model.parameters()).device)
        with torch.no_grad():
            cache = model(input_ids=self.ids[:, :-1], use_cache=True, logits_to_keep=1)[CACHE]
        size = tensor_bytes(cache_tensors(cache))
        self.layers: Layers = [(layer.keys, layer.values) for layer in cache.layers]
        self.length = len(prompt) + new_tokens
        self.fit(math.ceil(size / (len(prompt) - 1) * self.length), budget)

    @torch.no_grad()
    def write(self, prompts: Sequence[Prompt], new_tokens: int) -> int:
        cache = StaticCache(self.model.config, self.length) if self.static else DynamicCache()
        for number, layer in enumerate(self.layers):
            cache.update(*(states.expand(self.batch_size, -1, -1, -1) for states in layer), number)
        return continue_from(self.model, self.ids.expand(self.batch_size, -1), cache, new_tokens)


class LargestSentenceBatch(LargestBatch):
    """The sentence model, after a prefix that has been read.

    Args:
        ours: the system that is timed at other batch sizes.
        new_tokens: the most that are written.
    """

    def __init__(self, ours: SentenceSystem, prompt: Prompt, new_tokens: int, budget: int) -> None:
        self.ours, self.model, self.name = ours, ours.model, ours.name
        self.prefix = ours.generator.prefix_of(prompt.sentences)
        cache = ours.generator.prefill([prompt.sentences], ours.cache)
        # The cache grows by this many positions at a time.
        new_positions = GROWTH_SLOTS * math.ceil(new_tokens / statistics.mean(ours.lengths) / GROWTH_SLOTS)
        per_position = cache.cache_bytes / cache.lengths[0]
        backbone_bytes = math.ceil(per_position * (cache.lengths[0] + new_positions))
        self.fit(backbone_bytes + decoder_cache_bytes(self.model), budget)

    def write(self, prompts: Sequence[Prompt], new_tokens: int) -> int:
        return self.ours.write([Prompt(self.prefix.sentences)] * self.batch_size, new_tokens, self.prefix)


def largest_batches(
    backbone: PreTrainedModel,
    ours: SentenceSystem,
    prompt: Prompt,
    new_tokens: int,
    budget: int,
    bos_token_id: int,
) -> Sequence[LargestBatch]:
    """The backbone with either cache, and the sentence model, each at its largest batch.

    Raises:
        InputError: not even one text fits into the budget.
    """
    tokens = [bos_token_id, *prompt.tokens]
    return [
        LargestTokenBatch(backbone, tokens, new_tokens, budget, static=False),
        LargestSentenceBatch(ours, prompt, new_tokens, budget),
        LargestTokenBatch(backbone, tokens, new_tokens, budget, static=True),
    ]


def measure_throughput(
    timed: SpeedModels, sentence_lengths: Sequence[int], settings: BenchSettings
) -> list[Throughput]:
    """Time both systems on 1, 2, 4, ... and all processes, each process at the largest of ``batch_sizes``.

    All processes must call this, and get the same figures.

    Raises:
        InputError: prompt and new tokens exceed the backbone's positions.
        RunError: a system wrote another number of tokens than it was asked for.
    """
    require_positions(timed.backbone, settings.prompt_tokens, settings.new_tokens)
    batch, ranks = max(settings.batch_sizes), processes()
    all_prompts = make_prompts(timed.sentences, settings.prompt_tokens, batch * ranks.num_processes)
    prompts = all_prompts[ranks.process_index :: ranks.num_processes]
    systems = both_systems(timed.model, timed.backbone, sentence_lengths, settings, timed.bos_token_id)
    with quiet_transformers():
        return by_processes(systems, prompts, settings.new_tokens, settings.repeats)


def by_processes(
    systems: Sequence[System], prompts: Sequence[Prompt], new_tokens: int, repeats: int
) -> list[Throughput]:
    """The figures by number of processes; one more repeat warms up.

    Args:
        prompts: this process's own.

    Raises:
        RunError: a system wrote another number of tokens than it was asked for, in any process.
    """
    ranks = processes()
    counts = [2**n for n in range(ranks.num_processes.bit_length()) if 2**n < ranks.num_processes]
    counts.append(ranks.num_processes)
    rates: dict[tuple[str, int], list[float]] = {(s.name, n): [] for s in systems for n in counts}
    for repeat in range(repeats + 1):
        for system in systems:
            for count in counts:
                took = _seconds_together(system, prompts, new_tokens, count)
                if repeat:  # the first one warms up
                    rates[system.name, count].append(count * len(prompts) * new_tokens / took)
    return [
        Throughput(
            system=name,
            processes=count,
            batch_size=len(prompts),
            rates=found,
            tokens_per_second=statistics.median(found),
            efficiency=statistics.median(
                rate / (count * alone) for rate, alone in zip(found, rates[name, 1], strict=True)
            ),
        )
        for (name, count), found in rates.items()
    ]


def _seconds_together(system: System, prompts: Sequence[Prompt], new_tokens: int, count: int) -> float:
    """Seconds from the common start of the first ``count`` processes until the last of them has written."""
    ranks = processes()
    ranks.wait_for_everyone()
    took, written = 0.0, new_tokens

    def write(timed: System) -> None:
        nonlocal written
        written = timed.write(prompts, new_tokens)

    if ranks.process_index < count:
        took = seconds(system, write)
    found = gather_object([(took, written)])
    if any(tokens != new_tokens for _, tokens in found):  # in every process, so that none waits for another
        wrote = ", ".join(str(tokens) for _, tokens in found)
        raise RunError(
            f"bench: '{system.name}' wrote {wrote} tokens in its processes, not {new_tokens} in each"
        )
    return max(seconds for seconds, _ in found)
