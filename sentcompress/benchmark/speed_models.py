"""The two models that are timed against each other, and text to write prompts of."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sentcompress.benchmark.measurements.data import draw_lengths, heldout_text
from sentcompress.benchmark.models import DTYPES, Missing, Parts
from sentcompress.estimate.shapes import random_models, random_sentences
from sentcompress.modeling.int8 import quantize
from sentcompress.modeling.sentence_lm import SentenceLM

HELDOUT_SENTENCES = 2000
RANDOM_SENTENCES = 400


@dataclass(frozen=True)
class SpeedModels:
    """What is timed.

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
        """What stands before a text for the backbone."""
        return int(self.model.config.vae_config.bos_token_id)


def speed_models(parts: Parts) -> SpeedModels:
    """The models of a run's folder, or random weights in the recipe's shapes where there is none."""
    recipe, dtype = parts.recipe, DTYPES[parts.recipe.bench.dtype]
    if parts.folder is not None:
        sentences = heldout_text(parts.corpus, HELDOUT_SENTENCES)
        model, twin = parts.sentence_lm, _token_twin(parts)
        # The models of the other measurements stay as they are; those that are spread have this dtype everywhere.
        if dtype != torch.float32 and not parts.is_spread:
            model, twin = copy.deepcopy(model).to(dtype), copy.deepcopy(twin).to(dtype)
        return SpeedModels(model, twin, sentences, trained=True)
    model, backbone = random_models(recipe)
    vae = model.config.vae_config
    lengths = draw_lengths(parts.corpus, RANDOM_SENTENCES, recipe.seed + 1)
    sentences = random_sentences(
        [min(n, vae.max_sentence_tokens) for n in lengths], vae.vocab_size, recipe.seed
    )
    model = quantize(parts.place(model, dtype), recipe.bench.quantize)
    return SpeedModels(model, parts.place(backbone, dtype), sentences, trained=False)


def _token_twin(parts: Parts) -> PreTrainedModel:
    """The backbone as it came; its fine-tuned twin is as fast, and serves where it cannot be loaded."""
    try:
        return parts.backbone
    except Missing:
        return parts.baseline
