"""The same LLM with everything in its cache, and with sentence memories: the same bytes, scored as when writing."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from sentcompress.benchmark.breakdown import Breakdown
from sentcompress.benchmark.heldout_text import HeldoutDocument, windows
from sentcompress.benchmark.measurement import BASELINES
from sentcompress.benchmark.measurements.memories import MemoryScore
from sentcompress.benchmark.memory_meter import cache_tensors, tensor_bytes
from sentcompress.benchmark.models import DTYPES, Missing, Models
from sentcompress.benchmark.scoring import LOGITS_AT_A_TIME, score_tokens
from sentcompress.contracts.causal_lm import CACHE, position_limit
from sentcompress.distributed import gathered_shares
from sentcompress.errors import InputError
from sentcompress.recipe import ComponentSpec
from sentcompress.sentence_memory.sentence_cache import SentenceMemory
from sentcompress.text.lossless_tokenizer import LosslessTokenizer
from sentcompress.training.run_folder import MEMORY

EVERYTHING = "everything"
"""The LLM's own cache."""
TRAINED = "trained for its memory"
STEPS = 16
"""Last tokens of a text that are read one by one, so that the cache holds what it holds while a text is written."""


@dataclass(frozen=True)
class MemorySystem:
    """An LLM, and what it attends to.

    Attributes:
        memory: None for everything, or for the memory of ``folder``.
        folder: of an LLM that was trained with a memory.
        stages: it was trained in.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Any
    memory: ComponentSpec | None = None
    folder: Path | None = None
    stages: tuple[str, ...] = ()

    @property
    def has_memory(self) -> bool:
        """Whether it attends through a sentence memory."""
        return self.memory is not None or self.folder is not None

    def cache(self, **changes: Any) -> Any:
        """An empty cache for one batch of texts, with changes to the options of a memory."""
        name = self.memory.name if self.memory else None
        options = (self.memory.options if self.memory else {}) | changes
        if self.folder is not None:
            return SentenceMemory.from_folder(self.folder, self.model, self.tokenizer, name, **options)
        if name is None:
            return DynamicCache(config=self.model.config)
        return SentenceMemory(self.model, self.tokenizer, name, **options)

    def scoring_cache(self) -> Any:
        """The same, in effect from the first token."""
        return self.cache(full_prompts=False)


def memory_systems(models: Models) -> list[MemorySystem]:
    """The LLM with everything, and with each memory of ``bench.memories``; then the LLMs of a run that trained one.

    Raises:
        InputError: a memory or an option is unknown, or the LLM cannot be used with one.
        Missing: neither an LLM nor a folder with a trained memory was given.
    """
    for spec in models.recipe.bench.memories:
        SentenceMemory.check(spec.name, **spec.options)  # before anything is loaded
    tokenizer, stage = models.tokenizer, MEMORY.name
    folder = None if models.folder is None else models.folder.stage(stage)  # raises Missing
    model = _in_dtype(models, models.backbone)
    found = [MemorySystem(EVERYTHING, model, tokenizer)]
    found += [MemorySystem(label(spec), model, tokenizer, spec) for spec in models.recipe.bench.memories]
    if folder is not None:
        with suppress(Missing):
            baseline = _in_dtype(models, models.baseline)
            found.append(MemorySystem(BASELINES[0], baseline, tokenizer, stages=("baseline",)))
        trained = _in_dtype(models, models.memory_llm)
        found.append(MemorySystem(TRAINED, trained, tokenizer, None, folder, (stage,)))
        found += [
            MemorySystem(f"{TRAINED}, {label(spec)}", trained, tokenizer, spec, folder, (stage,))
            for spec in models.recipe.bench.memories
        ]
    for system in found:
        system.cache()  # refuses what it does not know before anything is measured
    return found


def _in_dtype(models: Models, model: PreTrainedModel) -> PreTrainedModel:
    """The LLM in ``bench.dtype``; other measurements of a run need theirs unchanged."""
    dtype = DTYPES[models.recipe.bench.dtype]
    if models.is_sharded:
        return model  # placed in this dtype already
    if models.folder is not None and dtype != torch.float32:
        model = copy.deepcopy(model)
    return model.to(dtype)


def require_room(model: PreTrainedModel, lengths: Sequence[int], new_tokens: int = 0) -> None:
    """Refuse texts that are longer than the LLM's positions. Raises InputError."""
    limit = position_limit(model.config)
    if max(lengths) + new_tokens > limit:
        more = f" and {new_tokens} new ones" if new_tokens else ""
        raise InputError(
            f"bench.text_lengths: {max(lengths)} tokens{more} are more than the LLM's {limit} positions",
            fix="lower the largest",
        )


def label(memory: ComponentSpec) -> str:
    """A memory's name with its options: ``window+recall (recall 8)``."""
    options = ", ".join(f"{name} {value}" for name, value in memory.options.items())
    return f"{memory.name} ({options})" if options else memory.name


def device_bytes(cache: Any) -> int:
    """Bytes of a cache on the LLM's device, a memory's index included."""
    if isinstance(cache, SentenceMemory):
        return cache.device_bytes()
    return tensor_bytes(cache_tensors(cache))


def storage_bytes(cache: Any) -> int:
    """Bytes of a cache in slow storage."""
    return cache.storage_bytes() if isinstance(cache, SentenceMemory) else 0


@dataclass
class _Sizes:
    """Tokens of a text, the bytes of the cache after the last of them, and the share of tokens that it attended to."""

    tokens: int
    device: int
    storage: int
    attended: float


def score_memory(
    system: MemorySystem,
    documents: Sequence[HeldoutDocument],
    tokenizer: LosslessTokenizer,
    bos_token_id: int,
    breakdown: Breakdown,
    progress: Callable[[], None] = lambda: None,
) -> MemoryScore:
    """Score held-out documents with a memory in effect from the first token.

    Documents longer than the LLM's positions are read in windows, each with a memory of its own, the same for all
    systems.

    Raises:
        CoverageError: a byte was scored twice or never.
    """
    size = position_limit(system.model.config)
    sizes: list[_Sizes] = []

    def nll(ids: Tensor) -> Tensor:
        losses = torch.full((len(ids) - 1,), float("nan"), dtype=torch.float64)
        for window in windows(len(ids), size):
            found, last = read(system, ids[window.start : window.stop])
            scored = slice(window.first_scored - 1, window.stop - 1)
            losses[scored] = found[window.first_scored - window.start - 1 :]
        sizes.append(last)
        return losses

    score = score_tokens(
        nll, documents, tokenizer, bos_token_id, system.name, f"{size} tokens", progress, breakdown
    )
    all_sizes = gathered_shares(sizes)
    tokens = sum(each.tokens for each in all_sizes)
    return MemoryScore(
        system=system.name,
        quality=score,
        text_tokens=tokens / len(all_sizes),
        device_bytes_per_token=sum(each.device for each in all_sizes) / tokens,
        storage_bytes_per_token=sum(each.storage for each in all_sizes) / tokens,
        attended_share=sum(each.attended for each in all_sizes) / len(all_sizes),
    )


@torch.no_grad()
def read(system: MemorySystem, ids: Tensor) -> tuple[Tensor, _Sizes]:
    """NLL ``[T - 1]`` of tokens 1 on, and the size of the cache after the last token."""
    model, cache = system.model, system.scoring_cache()
    device, length = next(model.parameters()).device, len(ids)
    at_a_time = max(1, LOGITS_AT_A_TIME // model.config.get_text_config(decoder=True).vocab_size)
    single = max(1, length - STEPS)
    borders = [*range(0, single, at_a_time), *range(single, length + 1)]
    losses = []
    for start, stop in itertools.pairwise(borders):
        logits = model(
            input_ids=ids[None, start:stop].to(device),
            attention_mask=torch.ones(1, stop, dtype=torch.long, device=device),
            use_cache=True,
            **{CACHE: cache},
        ).logits[0]
        targets = ids[start + 1 : stop + 1].to(device)
        losses.append(
            F.cross_entropy(logits[: len(targets)].float(), targets, reduction="none").double().cpu()
        )
    attended = cache.attended_share() if isinstance(cache, SentenceMemory) else 1.0
    return torch.cat(losses), _Sizes(length, device_bytes(cache), storage_bytes(cache), attended)
