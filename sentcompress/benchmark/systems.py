"""What is timed: the backbone's own ``generate``, and the sentence model, on the same tokens."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sentcompress.generation import GenerationSettings, SentenceGenerator
from sentcompress.generation.backbone_cache import Prefix
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.recipe import BenchSettings
from sentcompress.recipe.choices import CacheKind, HeadKind

BACKBONE = "backbone, KV cache"
LOOKUP = "backbone, prompt lookup"
STATIC = "backbone, static cache, compiled"
IN_PLACE = "backbone, static cache"
INT8 = "backbone, 8-bit weights"
SENTENCES = "sentence model"


@dataclass
class Prompt:
    """One prompt, the same tokens for every system: as sentences, and joined."""

    sentences: list[list[int]]

    @property
    def tokens(self) -> list[int]:
        return [token for sentence in self.sentences for token in sentence]


def make_prompts(sentences: Sequence[Sequence[int]], tokens: int, count: int) -> list[Prompt]:
    """Prompts of exactly ``tokens`` tokens each, from consecutive sentences of the text, the last cut short."""
    source = itertools.cycle([list(ids) for ids in sentences])
    prompts = []
    for _ in range(count):
        left, chosen = tokens, []
        while left > 0:
            sentence = next(source)[:left]
            chosen.append(sentence)
            left -= len(sentence)
        prompts.append(Prompt(chosen))
    return prompts


class System:
    """Something that continues prompts."""

    name: str
    model: Any
    note = ""
    reads = True
    """False where the prompt has been read before, so that neither the prefill nor a whole run can be timed."""

    def prefill(self, prompts: Sequence[Prompt]) -> None:
        """Read the prompts."""

    def write(self, prompts: Sequence[Prompt], new_tokens: int) -> int:
        """Write ``new_tokens`` for each; return how many were written for the shortest."""
        raise NotImplementedError


class TokenSystem(System):
    """The backbone in transformers ``generate``, greedy."""

    def __init__(self, name: str, model: PreTrainedModel, bos_token_id: int, **switches: Any) -> None:
        self.name, self.model, self.bos, self.switches = name, model.eval(), bos_token_id, switches
        self.device = next(model.parameters()).device

    def _inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        ids = torch.tensor([[self.bos, *prompt.tokens] for prompt in prompts], device=self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Prompt]) -> None:
        self.model(**self._inputs(prompts), use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def write(self, prompts: Sequence[Prompt], new_tokens: int) -> int:
        inputs = self._inputs(prompts)
        output = self.model.generate(
            **inputs,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=self.model.config.pad_token_id,
            **self.switches,
        )
        return int(output.shape[1] - inputs["input_ids"].shape[1])


class SentenceSystem(System):
    """The SentenceLM with forced sentence lengths, so that the number of new tokens is the same."""

    name = SENTENCES

    def __init__(
        self,
        model: SentenceLM,
        sentence_lengths: Sequence[int],
        head: HeadKind = "auto",
        cache: CacheKind = "full",
        shortlist_tokens: int = 1024,
        compiled: bool = False,
    ) -> None:
        self.model = model.eval()
        self.lengths = tuple(sentence_lengths)
        self.generator = SentenceGenerator(model, None)
        self.kind, self.cache = head, cache
        self.shortlist_tokens, self.compiled = shortlist_tokens, compiled
        self.head = self.generator.head(head, shortlist_tokens)

    def with_lengths(self, sentence_lengths: Sequence[int]) -> SentenceSystem:
        """The same system held to other lengths."""
        other = copy.copy(self)
        other.lengths = tuple(sentence_lengths)
        return other

    def prefill(self, prompts: Sequence[Prompt]) -> None:
        self.generator.prefill([prompt.sentences for prompt in prompts], self.cache)

    def write(self, prompts: Sequence[Prompt], new_tokens: int, prefix: Prefix | None = None) -> int:
        settings = GenerationSettings(
            max_new_tokens=new_tokens,
            stop_threshold=1,
            sentence_lengths=self.lengths,
            head=self.kind,
            shortlist_tokens=self.shortlist_tokens,
            cache=self.cache,
            compile=self.compiled,
        )
        written = [0] * len(prompts)
        contexts = [prompt.sentences for prompt in prompts]
        for number, sentence in self.generator.continue_sentences(contexts, settings, prefix):
            written[number] += len(sentence)
        return min(written)


def both_systems(
    model: SentenceLM,
    backbone: PreTrainedModel,
    sentence_lengths: Sequence[int],
    settings: BenchSettings,
    bos_token_id: int,
) -> tuple[TokenSystem, SentenceSystem]:
    """The backbone as it is used most, and the sentence model as the recipe wants it timed."""
    ours = SentenceSystem(
        model,
        sentence_lengths,
        settings.head,
        settings.cache,
        settings.shortlist_tokens,
        settings.compile,
    )
    return TokenSystem(BACKBONE, backbone, bos_token_id), ours


def seconds(system: System, call: Callable[[Any], Any]) -> float:
    _synchronize(system)
    began = time.perf_counter()
    call(system)
    _synchronize(system)
    return time.perf_counter() - began


def alternate(
    systems: Sequence[System], prompts: Sequence[Prompt], new_tokens: int, repeats: int
) -> list[list[float]]:
    """Seconds of each system's whole run, by repeat: in turns; the models are warm from the runs before."""
    return [[seconds(s, lambda s: s.write(prompts, new_tokens)) for s in systems] for _ in range(repeats)]


def _synchronize(system: System) -> None:
    if next(system.model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()
