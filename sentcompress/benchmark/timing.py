"""What is timed, and the clock: two models, prompts of the same tokens, and systems that continue them in turns.

The backbone runs in transformers' own ``generate``, the sentence model in its generator. Both write the same number of
tokens after the same prompts.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from sentcompress.benchmark.heldout_text import draw_lengths, heldout_sentences
from sentcompress.benchmark.measurement import SENTENCE_MODEL
from sentcompress.benchmark.models import DTYPES, Missing, Models
from sentcompress.contracts.causal_lm import position_limit
from sentcompress.errors import InputError
from sentcompress.estimate.shapes import random_models, random_sentences
from sentcompress.generation import GenerationSettings, SentenceGenerator
from sentcompress.generation.prefix import Prefix
from sentcompress.modeling.int8 import quantize
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.recipe import BenchSettings
from sentcompress.recipe.sections import DecodingOptions

BACKBONE = "backbone, KV cache"
LOOKUP = "backbone, prompt lookup"
STATIC = "backbone, static cache, compiled"
IN_PLACE = "backbone, static cache"
INT8 = "backbone, 8-bit weights"

LOOKUP_TOKENS = 10
"""Tokens that prompt lookup proposes at once."""
HELDOUT_SENTENCES = 2000
RANDOM_SENTENCES = 400
DRAWN_LENGTHS = 64
"""Sentence lengths drawn for speed and memory runs."""


@dataclass(frozen=True)
class SpeedModels:
    """The two models that are timed against each other, and text to make prompts of.

    Attributes:
        sentences: held-out text, or random tokens in sentences of held-out lengths.
        trained: False for random weights.
    """

    model: SentenceLM
    backbone: PreTrainedModel
    sentences: list[list[int]]
    trained: bool

    @property
    def bos_token_id(self) -> int:
        """The token before a text, for the backbone."""
        return int(self.model.config.vae_config.bos_token_id)


def speed_models(models: Models) -> SpeedModels:
    """The models of a run's folder, or random weights in the recipe's shapes where there is no folder."""
    recipe, dtype = models.recipe, DTYPES[models.recipe.bench.dtype]
    if models.folder is not None:
        sentences = heldout_sentences(models.corpus, HELDOUT_SENTENCES)
        model, backbone = models.sentence_lm, _token_level_model(models)
        # Other measurements need their models unchanged; sharded models have this dtype everywhere.
        if dtype != torch.float32 and not models.is_sharded:
            model, backbone = copy.deepcopy(model).to(dtype), copy.deepcopy(backbone).to(dtype)
        return SpeedModels(model, backbone, sentences, trained=True)
    model, backbone = random_models(recipe)
    vae = model.config.vae_config
    lengths = draw_lengths(models.corpus, RANDOM_SENTENCES, recipe.seed + 1)
    sentences = random_sentences(
        [min(n, vae.max_sentence_tokens) for n in lengths], vae.vocab_size, recipe.seed
    )
    model = quantize(models.place(model, dtype), recipe.bench.quantize)
    return SpeedModels(model, models.place(backbone, dtype), sentences, trained=False)


def _token_level_model(models: Models) -> PreTrainedModel:
    """The backbone before training; where it cannot be loaded, the baseline, which is as fast."""
    try:
        return models.backbone
    except Missing:
        return models.baseline


@dataclass
class Prompt:
    """One prompt as sentences, and as the same tokens joined."""

    sentences: list[list[int]]

    @property
    def tokens(self) -> list[int]:
        return [token for sentence in self.sentences for token in sentence]


def make_prompts(sentences: Sequence[Sequence[int]], tokens: int, count: int) -> list[Prompt]:
    """Make prompts of exactly ``tokens`` tokens from consecutive sentences; the last sentence is cut short."""
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
    """A model with settings that continues prompts."""

    name: str
    model: Any
    note = ""
    reads_prompts = True
    """False where the prompts are in the cache already: then neither prefill nor whole runs are timed."""

    def prefill(self, prompts: Sequence[Prompt]) -> None:
        """Read the prompts."""

    def write(self, prompts: Sequence[Prompt], new_tokens: int) -> int:
        """Write ``new_tokens`` after each prompt; return how many the shortest continuation has."""
        raise NotImplementedError


class TokenSystem(System):
    """The backbone in transformers' ``generate``, greedy.

    Args:
        options: more arguments of ``generate``.
    """

    def __init__(self, name: str, model: PreTrainedModel, bos_token_id: int, **options: Any) -> None:
        self.name, self.model, self.bos, self.options = name, model.eval(), bos_token_id, options
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
            **self.options,
        )
        return int(output.shape[1] - inputs["input_ids"].shape[1])


class SentenceSystem(System):
    """The SentenceLM with forced sentence lengths, so that it writes as many tokens as the backbone."""

    name = SENTENCE_MODEL

    def __init__(
        self,
        model: SentenceLM,
        sentence_lengths: Sequence[int],
        options: DecodingOptions | None = None,
    ) -> None:
        self.model = model.eval()
        self.lengths = tuple(sentence_lengths)
        self.generator = SentenceGenerator(model, None)
        self.options = options or DecodingOptions()
        self.cache = self.options.cache
        self.head = self.generator.head(self.options.head, self.options.shortlist_tokens)

    def with_lengths(self, sentence_lengths: Sequence[int]) -> SentenceSystem:
        """The same system with other forced lengths."""
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
            **self.options.decoding(),
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
    """The backbone with its usual cache, and the sentence model with the settings of the recipe."""
    ours = SentenceSystem(model, sentence_lengths, settings)
    return TokenSystem(BACKBONE, backbone, bos_token_id), ours


def require_positions(backbone: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse a text that is longer than the backbone's positions. Raises InputError."""
    limit = position_limit(backbone.config)
    if prompt_tokens + new_tokens + 1 > limit:
        raise InputError(
            f"bench: a prompt of {prompt_tokens} tokens and {new_tokens} new ones exceed the backbone's {limit} "
            "positions",
            fix="lower bench.prompt_tokens or bench.new_tokens",
        )


def seconds(system: System, call: Callable[[Any], Any]) -> float:
    """Seconds that a call takes with the system; on a GPU until its work is done."""
    _synchronize(system)
    began = time.perf_counter()
    call(system)
    _synchronize(system)
    return time.perf_counter() - began


def alternate(
    systems: Sequence[System], prompts: Sequence[Prompt], new_tokens: int, repeats: int
) -> list[list[float]]:
    """Seconds of each system's whole run, by repeat. Systems take turns; earlier runs have warmed them up."""
    return [[seconds(s, lambda s: s.write(prompts, new_tokens)) for s in systems] for _ in range(repeats)]


def _synchronize(system: System) -> None:
    if next(system.model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' warnings at every ``generate`` about settings that are intended."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
