"""Speed of an LLM with sentence memories, beside transformers' own caches, by length of the text and batch size.

One call of ``generate`` gives all figures of a run: the time of the first token, and the tokens per second after it.
Systems take turns, A B A B.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import QuantizedCache
from transformers.generation.streamers import BaseStreamer

from sentcompress.benchmark.measurements.memory_speed import MemoryRun
from sentcompress.benchmark.memory_scoring import EVERYTHING, MemorySystem, device_bytes, storage_bytes
from sentcompress.benchmark.profile import Stopwatch, TimedMethod
from sentcompress.benchmark.throughput import LargestBatch, LargestTokenBatch, continue_from
from sentcompress.benchmark.timing import LOOKUP_TOKENS, Prompt, TokenSystem, make_prompts, seconds
from sentcompress.contracts.causal_lm import CACHE
from sentcompress.errors import InputError, RunError
from sentcompress.recipe import BenchSettings
from sentcompress.sentence_memory.block_cache import BlockCache
from sentcompress.text.boundaries import BoundaryFinder

BOUNDARIES, RECALL = "boundaries", "recall"
PARTS = (
    TimedMethod(BoundaryFinder, "begins", BOUNDARIES),
    TimedMethod(BlockCache, "_recall", RECALL),
    TimedMethod(BlockCache, "_store", RECALL),
)
"""What a memory does beside attending."""
WARM_UP_TOKENS = 64


class _Stamps(BaseStreamer):
    """Notes when the tokens of a ``generate`` come."""

    def __init__(self, device: torch.device, first: Callable[[], None]) -> None:
        self.device, self.first = device, first
        self.times: list[float] = []
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())
        self.tokens.append(value.numel())
        if len(self.times) == 2:  # the first put is the prompt
            self.first()

    def end(self) -> None:
        pass


@dataclass
class _Run:
    """One call: seconds to the first token, output tokens per second after it, and the cache that was left."""

    first: float
    rate: float
    cache: Any
    shares: dict[str, float]


class CachedSystem(TokenSystem):
    """An LLM in ``generate``, greedy, with a fresh cache for each call.

    Args:
        system: the LLM and its memory.
        options: more arguments of ``generate``; with ``cache_implementation``, transformers makes the cache.
    """

    def __init__(self, system: MemorySystem, bos_token_id: int, name: str = "", **options: Any) -> None:
        super().__init__(name or system.name, system.model, bos_token_id, **options)
        self.system = system

    @torch.no_grad()
    def run(self, prompts: Sequence[Prompt], new_tokens: int) -> _Run:
        """Continue the prompts, and take the time.

        Raises:
            RunError: another number of tokens was written.
        """
        inputs, batch = self._inputs(prompts), len(prompts)
        own = {} if "cache_implementation" in self.options else {CACHE: self.system.cache()}
        watch = Stopwatch(self.device)
        stamps = _Stamps(self.device, watch.seconds.clear)  # parts of a step, not of reading the prompt
        with watch.timing(PARTS if self.system.has_memory else ()):
            began = time.perf_counter()
            output = self.model.generate(
                **inputs,
                **own,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=self.model.config.pad_token_id,
                streamer=stamps,
                return_dict_in_generate=True,
                **self.options,
            )
        _, first, *_, last = [*stamps.times, stamps.times[-1]]
        if sum(stamps.tokens[1:]) != batch * new_tokens:
            raise RunError(f"wrote {sum(stamps.tokens[1:])} tokens instead of {batch * new_tokens}")
        rate = sum(stamps.tokens[2:]) / max(last - first, 1e-9)
        shares = {part: took / max(last - first, 1e-9) for part, took in watch.seconds.items()}
        return _Run(first - began, rate, output[CACHE], shares)


class LargestMemoryBatch(LargestBatch):
    """As many copies of one text as the budget has room for; what is stored is shared by all copies.

    Args:
        prompt: its tokens, start token included.
        text_bytes: of cache on the device for each text, at its end.
    """

    def __init__(self, system: MemorySystem, prompt: list[int], text_bytes: int, budget: int) -> None:
        self.name, self.model = system.name, system.model
        self.ids = torch.tensor([prompt], device=next(self.model.parameters()).device)
        self.cache = system.cache()
        with torch.no_grad():
            ids = self.ids[:, :-1]
            mask = torch.ones_like(ids)
            self.model(
                input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=True, **{CACHE: self.cache}
            )
        self.fit(text_bytes, budget)

    @torch.no_grad()
    def write(self, prompts: Sequence[Prompt], new_tokens: int) -> int:
        cache = self.cache.copy(self.batch_size)
        return continue_from(self.model, self.ids.expand(self.batch_size, -1), cache, new_tokens)


def time_memories(
    systems: Sequence[MemorySystem],
    sentences: Sequence[Sequence[int]],
    bos_token_id: int,
    settings: BenchSettings,
    skip: Callable[[str, str], None],
    progress: Callable[[], None],
) -> Iterator[MemoryRun]:
    """Time all systems at each length of ``bench.text_lengths`` and each of ``bench.batch_sizes``.

    Args:
        sentences: held-out text to make prompts of.
        skip: called with what was not timed, and why.
        progress: called after each repeat.
    """
    for length in settings.text_lengths:
        for batch_size in settings.batch_sizes:
            prompts = make_prompts(sentences, length - 1, batch_size)
            candidates = [CachedSystem(system, bos_token_id) for system in systems]
            candidates[1:1] = _faster(systems[0], bos_token_id, batch_size)
            timed = [system for system in candidates if _works(system, prompts, skip)]
            found: dict[str, list[_Run]] = {system.name: [] for system in timed}
            for _ in range(settings.repeats):
                for system in timed:
                    found[system.name].append(system.run(prompts, settings.new_tokens))
                progress()
            base = found[EVERYTHING]
            runs = [_summary(name, each, base, length, batch_size, settings) for name, each in found.items()]
            yield from runs
        if settings.largest_batch:
            prompt = [bos_token_id, *make_prompts(sentences, length - 1, 1)[0].tokens]
            yield from _largest(systems, prompt, runs, settings, skip)


def _faster(everything: MemorySystem, bos_token_id: int, batch_size: int) -> list[CachedSystem]:
    """What transformers has for a smaller or faster cache of everything."""
    options: dict[str, dict[str, Any]] = {
        "static cache": {"cache_implementation": "static"},
        "quantized cache": {"cache_implementation": "quantized", "cache_config": {"backend": "quanto"}},
    }
    if batch_size == 1:  # transformers supports it there only
        options["prompt lookup"] = {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
    return [
        CachedSystem(everything, bos_token_id, f"{EVERYTHING}, {name}", **given)
        for name, given in options.items()
    ]


def _works(system: CachedSystem, prompts: Sequence[Prompt], skip: Callable[[str, str], None]) -> bool:
    """Warm a system up; if it fails, say so and return False."""
    short = [Prompt([prompt.tokens[:WARM_UP_TOKENS]]) for prompt in prompts]
    try:
        system.run(short, 4)
    except Exception as error:  # of transformers or of an optional package
        skip(
            f"{system.name}, batch {len(prompts)}",
            f"{type(error).__name__}: {' '.join(str(error).split())[:160]}",
        )
        return False
    return True


def _summary(
    name: str, runs: list[_Run], base: list[_Run], length: int, batch_size: int, settings: BenchSettings
) -> MemoryRun:
    cache = runs[-1].cache
    counted = cache is not None and not isinstance(cache, QuantizedCache)
    size = device_bytes(cache) / batch_size if counted else None
    tokens = length + settings.new_tokens - 1  # the last token written is not read
    shares = {
        part: statistics.median(run.shares.get(part, 0.0) for run in runs) for part in (BOUNDARIES, RECALL)
    }
    has_memory = bool(runs[-1].shares)
    first = statistics.median(run.first for run in runs)
    return MemoryRun(
        system=name,
        text_tokens=length,
        batch_size=batch_size,
        first_token_seconds=first,
        prefill_tokens_per_second=batch_size * length / first,
        output_tokens_per_second=statistics.median(run.rate for run in runs),
        ratio=statistics.median(mine.rate / other.rate for mine, other in zip(runs, base, strict=True)),
        first_ratio=statistics.median(
            other.first / mine.first for mine, other in zip(runs, base, strict=True)
        ),
        device_bytes_per_token=None if size is None else size / tokens,
        storage_bytes_per_token=storage_bytes(cache) / batch_size / tokens,
        largest_batch=None if size is None else int(settings.memory_budget_bytes // size),
        boundaries_share=shares[BOUNDARIES] if has_memory else None,
        recall_share=shares[RECALL] if has_memory else None,
    )


def _largest(
    systems: Sequence[MemorySystem],
    prompt: list[int],
    runs: Sequence[MemoryRun],
    settings: BenchSettings,
    skip: Callable[[str, str], None],
) -> Iterator[MemoryRun]:
    """Each system at the largest batch whose cache fits into the budget, the text already read."""
    budget, new = settings.memory_budget_bytes, settings.new_tokens
    model, at_one = systems[0].model, {run.system: run for run in runs}
    largest: list[LargestBatch] = []
    try:
        for name, static in ((EVERYTHING, False), (f"{EVERYTHING}, static cache", True)):
            largest.append(LargestTokenBatch(model, prompt, new, budget, static=static))
            largest[-1].name = name
        for system in systems:
            per_token = at_one[system.name].device_bytes_per_token
            if system.has_memory and per_token is not None:
                text_bytes = int(per_token * (len(prompt) + new - 1))
                largest.append(LargestMemoryBatch(system, prompt, text_bytes, budget))
    except InputError as error:
        skip("largest batch", error.message)
        return
    took: dict[str, list[tuple[float, float]]] = {batch.name: [] for batch in largest}
    for repeat in range(settings.repeats + 1):
        for batch in largest:
            first, whole = (
                seconds(batch, lambda b: b.write([], 1)),
                seconds(batch, lambda b: b.write([], new)),
            )
            if repeat:  # the first one warms up
                took[batch.name].append((first, whole))
    rates = {
        batch.name: [
            batch.batch_size * (new - 1) / max(whole - first, 0.05 * whole)
            for first, whole in took[batch.name]
        ]
        for batch in largest
    }
    for batch in largest:
        pairs = zip(rates[batch.name], rates[EVERYTHING], strict=True)
        yield at_one[batch.name].model_copy(
            update={
                "batch_size": batch.batch_size,
                "first_token_seconds": None,
                "prefill_tokens_per_second": None,
                "first_ratio": None,
                "output_tokens_per_second": statistics.median(rates[batch.name]),
                "ratio": statistics.median(mine / other for mine, other in pairs),
                "boundaries_share": None,
                "recall_share": None,
                "note": f"largest batch in {budget / 2**30:.3g} GiB, text already read, stored tokens shared",
            }
        )
