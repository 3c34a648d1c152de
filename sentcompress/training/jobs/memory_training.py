"""The job of ``train-memory``: an LLM fine-tuned token by token while it attends through a sentence memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import nullcontext
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sentcompress.errors import InputError
from sentcompress.modeling.device_map import blocks_of
from sentcompress.modeling.divergences import Divergences
from sentcompress.modeling.llm_loading import load_causal_lm
from sentcompress.modeling.losses import TokenLoss
from sentcompress.recipe import MemorySettings, Recipe
from sentcompress.sentence_memory.arguments import SETTINGS
from sentcompress.sentence_memory.attention import OnePassMemory, memory_attention
from sentcompress.sentence_memory.policy import Policy
from sentcompress.sentence_memory.sentence_cache import SentenceMemory
from sentcompress.sentence_memory.token_table import Row
from sentcompress.sentence_memory.visibility import Layout
from sentcompress.text.boundaries import MAX_SENTENCE_TOKENS, BoundaryFinder
from sentcompress.text.sampling import Batch, first_fit, pad
from sentcompress.text.token_sampling import IGNORED, PassageTokenSampler
from sentcompress.training.card import Card
from sentcompress.training.inputs import Inputs, load_inputs
from sentcompress.training.jobs.token_level import TokenLevelJob, passage_fields, passage_samplers
from sentcompress.training.run_folder import MEMORY, write_json
from sentcompress.training.step import StepOutput, StepShare
from sentcompress.training.teacher import check_output_head
from sentcompress.training.tuning import apply_tune, without_adapters

DRAWN = {"recent_sentences": (2, 24), "entries": (1, 8), "recall": (2, 16)}
"""What ``memory.draw: null`` draws, where the memory has these options."""


class MemoryLM(nn.Module):
    """A causal LM that attends through a memory, and the same LLM before training under full attention as its teacher.

    Args:
        lm: with adapters or without.
        settings: its memory and the weights of the loss.
        tokenizer: the LLM's, for the memory.
        recall_blocks: numbers of the LLM's blocks that recall.
    """

    supports_gradient_checkpointing = False  # transformers drops the cache, which is the memory, there

    def __init__(
        self, lm: PreTrainedModel, settings: MemorySettings, tokenizer: Any, recall_blocks: Sequence[int]
    ) -> None:
        super().__init__()
        self.lm, self.settings, self.tokenizer = lm, settings, tokenizer
        self.recall_blocks = recall_blocks
        self.policies: dict[tuple[int, ...] | None, Policy] = {}
        self.names = sorted(drawn_ranges(settings))
        self.divergences = Divergences(settings.forward_kl, settings.reverse_kl)
        self.has_teacher = bool(settings.forward_kl or settings.reverse_kl)
        # In a tuple, so that a frozen copy is not part of this module: it is neither saved nor trained.
        copied = self.has_teacher and settings.tune != "lora"
        self._copy = (copy.deepcopy(lm).eval().requires_grad_(False),) if copied else ()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        sentences: Tensor,
        texts: Tensor,
        drawn: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss with the memory in effect.

        Args:
            input_ids, attention_mask: ``[R, N]``, several texts in a row, padding on the right.
            labels: ``[R, N]``, the tokens themselves (they are shifted here), -100 where there is no target.
            sentences, texts: ``[R, N]``, the number of each token's sentence in its text, and of its text in the row.
            drawn: ``[n]`` values of the drawn options, by name; None takes the memory's own.

        Returns:
            summed loss (a scalar), NLL ``[targets]``, and divergences from the teacher ``[2, targets]`` (without
            targets if there is none), in nats; only the loss has gradients.
        """
        policy = self.policy(None if drawn is None else tuple(drawn.tolist()))
        layout = Layout.of(input_ids, sentences, attention_mask, texts)
        following = labels[:, 1:]
        kept = following != IGNORED
        targets = following[kept]
        weight = self.lm.get_output_embeddings().weight
        # Before the student, whose graph then needs no memory meanwhile.
        taught = self._taught(layout, kept) if self.training and self.has_teacher else None
        states = hidden_states(self.lm, layout, policy, self.recall_blocks)[:, :-1][kept]
        if taught is None:
            loss, nll = TokenLoss(gamma=0.0)(states, weight, targets)
            return loss.sum(), nll, nll.new_empty(2, 0)
        return self.divergences(states, weight, targets, *taught)

    def policy(self, drawn: tuple[int, ...] | None) -> Policy:
        """The memory with these values of the drawn options, or with its own."""
        if drawn not in self.policies:
            values = dict(zip(self.names, drawn or (), strict=False))
            policy = Policy.parse(self.settings.name, self.settings.options | values)
            policy.prepare(self.tokenizer)
            self.policies[drawn] = policy
        return self.policies[drawn]

    @torch.no_grad()
    def _taught(self, layout: Layout, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's last hidden states ``[targets, H]`` and its output head."""
        teacher = self._copy[0].to(layout.ids.device) if self._copy else self.lm
        with nullcontext() if self._copy else without_adapters(self.lm):
            if layout.text.any():
                states = hidden_states(teacher, layout, everything())
            else:  # padding is on the right, where nothing sees it: the causal mask, which is fast, is enough
                states = teacher.base_model(input_ids=layout.ids, use_cache=False).last_hidden_state
        return states[:, :-1][kept], teacher.get_output_embeddings().weight


def hidden_states(
    lm: PreTrainedModel, layout: Layout, policy: Policy, recall_blocks: Sequence[int] = ()
) -> Tensor:
    """Last hidden states ``[R, N, H]`` of packed texts, each token with its memory in effect."""
    positions = {} if int(layout.text.max()) == 0 else {"position_ids": layout.position.clamp_min(0)}
    cache = OnePassMemory(layout, policy, len(blocks_of(lm)), recall_blocks)
    with memory_attention(lm):
        output = lm.base_model(input_ids=layout.ids, past_key_values=cache, use_cache=True, **positions)
    states: Tensor = output.last_hidden_state
    return states


def everything() -> Policy:
    """A memory that forgets nothing: full attention, of packed texts too."""
    return Policy.parse("window", {"recent_sentences": 2**31})


def drawn_ranges(settings: MemorySettings) -> dict[str, tuple[int, int]]:
    """The least and the most of each option that is drawn.

    Raises:
        InputError: the memory has no such option, or the least or most is out of its bounds.
    """
    known = Policy.parse(settings.name, settings.options).options
    if settings.draw is None:
        return {name: bounds for name, bounds in DRAWN.items() if name in known}
    for pick in (0, 1):
        Policy.parse(
            settings.name, settings.options | {name: bounds[pick] for name, bounds in settings.draw.items()}
        )
    return settings.draw


class PackedTexts:
    """The passages of a sampler, packed into few rows, with the sentence of each token.

    A token's sentence is found from the text before it, as while writing.

    Args:
        ranges: the least and the most of each option to draw; None draws none.
        packs: False puts each text into a row of its own.
    """

    def __init__(
        self,
        sampler: PassageTokenSampler,
        finder: BoundaryFinder,
        seed: int,
        ranges: dict[str, tuple[int, int]] | None,
        *,
        packs: bool,
    ) -> None:
        self.sampler, self.finder, self.seed, self.ranges, self.packs = sampler, finder, seed, ranges, packs

    def batch(self, index: int) -> Batch:
        """The arguments of :meth:`MemoryLM.forward`, a pure function of seed and index."""
        plain = self.sampler.batch(index)
        lengths: list[int] = plain["attention_mask"].sum(1).tolist()
        ids = [row[:length] for row, length in zip(plain["input_ids"].numpy(), lengths, strict=True)]
        labels = [row[:length].copy() for row, length in zip(plain["labels"].numpy(), lengths, strict=True)]
        for label in labels:
            label[0] = IGNORED  # nothing comes before it
        rows = first_fit(lengths, max(lengths)) if self.packs else [[i] for i in range(len(lengths))]
        sentences = [self._sentences(text.tolist()) for text in ids]

        def packed(values: Sequence[np.ndarray], value: int) -> tuple[Tensor, Tensor]:
            return pad([np.concatenate([values[text] for text in row]) for row in rows], value)

        input_ids, attention_mask = packed(ids, self.sampler.pad_token_id)
        numbers = {text: number for row in rows for number, text in enumerate(row)}
        texts = [np.full(length, numbers[text]) for text, length in enumerate(lengths)]
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": packed(labels, IGNORED)[0],
            "sentences": packed(sentences, 0)[0],
            "texts": packed(texts, 0)[0],
        }
        if self.ranges is not None:
            rng = np.random.default_rng([self.seed, index])
            drawn = [int(rng.integers(*self.ranges[name], endpoint=True)) for name in sorted(self.ranges)]
            batch["drawn"] = torch.tensor(drawn, dtype=torch.int64)
        return batch

    def _sentences(self, ids: list[int]) -> np.ndarray:
        """The number of each token's sentence, from 0."""
        row = Row()
        return np.cumsum([row.append(token, self.finder) for token in ids]) - 1


class MemoryJob(TokenLevelJob):
    """The LLM fine-tuned on passages with its memory in effect; the baseline reads the same in the same order."""

    stage = MEMORY
    batch_fields = passage_fields(MEMORY)
    model: MemoryLM

    def __init__(self, recipe: Recipe, text: Inputs | None = None) -> None:
        """Raises InputError where the fields of ``memory``, which the recipe must have, do not fit the LLM."""
        assert recipe.memory is not None
        self.recipe, self.settings = recipe, recipe.memory
        ranges = drawn_ranges(self.settings)
        if self.settings.compile:
            raise InputError(
                "memory.compile: the attention of a memory cannot be compiled", fix="set it to false"
            )
        self.text = text or load_inputs(recipe)
        options = Policy.parse(self.settings.name, self.settings.options).options
        self.inputs = {
            "corpus": self.text.corpus.key,
            # What is left to defaults may change with the program.
            "memory": json.dumps([options, ranges, MAX_SENTENCE_TOKENS]),
        }
        lm = load_causal_lm(recipe.backbone)
        # Refuses an LLM that would attend past its memory, which is proven on its weights.
        memory = SentenceMemory(lm, self.text.tokenizer, self.settings.name, segmenter=self.text.segmenter)
        check_output_head(lm, "memory")
        lm.train()
        apply_tune(lm, blocks_of(lm), self.settings, "memory")
        self.model = MemoryLM(lm, self.settings, self.text.tokenizer, memory.recall_blocks)
        finder = BoundaryFinder(self.text.segmenter, self.text.tokenizer, MAX_SENTENCE_TOKENS)
        packs = "position_ids" in signature(lm.base_model.forward).parameters
        self._train, self._heldout = (
            PackedTexts(sampler, finder, recipe.seed, drawn, packs=packs)
            for sampler, drawn in zip(
                passage_samplers(recipe, self.text, lm.config), (ranges, None), strict=True
            )
        )

    def loss(self, model: nn.Module, batch: dict[str, Tensor], share: StepShare) -> StepOutput:
        total, nll, divergences = model(**batch)
        targets, part = max(1, len(nll)), share.of("targets")
        metrics = {"nats_per_token": nll.sum() / targets * part}
        if divergences.numel():
            forward, reverse = divergences.sum(1) / targets * part
            metrics |= {"forward_kl": forward, "reverse_kl": reverse}
        return StepOutput(total / targets * part, tokens=int(batch["attention_mask"].sum()), metrics=metrics)

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        super().save(folder, state)
        write_json(
            folder / SETTINGS,
            {
                "memory": self.settings.name,
                "options": Policy.parse(self.settings.name, self.settings.options).options,
                "segmenter": {
                    **self.recipe.segmenter.model_dump(mode="json"),
                    "state": self.text.segmenter.state(),
                },
                "max_sentence_tokens": MAX_SENTENCE_TOKENS,
                "recall_blocks": self.model.recall_blocks,
            },
        )

    def card(self) -> Card:
        drawn = ", ".join(f"{name} {least} to {most}" for name, (least, most) in self._train.ranges.items())
        return Card(
            title=f"{self.recipe.backbone.model} with a sentence memory",
            summary=f"{self.recipe.backbone.model} fine-tuned token by token while it attended through the memory "
            f"`{self.settings.name}`" + (f" ({drawn})" if drawn else "") + ". It is an ordinary causal LM; "
            f"`{SETTINGS}` names the memory and its default options.",
            data=self.text.describe(),
            heldout="On held-out passages with the memory's default options in effect, each without the text before "
            "it in its document.",
            usage="import sentcompress\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            "tokenizer = AutoTokenizer.from_pretrained({folder})\n"
            "model = AutoModelForCausalLM.from_pretrained({folder})\n"
            "memory = sentcompress.SentenceMemory.from_folder({folder}, model, tokenizer)\n"
            'inputs = tokenizer("The state of the Union", return_tensors="pt")\n'
            "print(tokenizer.decode(model.generate(**inputs, past_key_values=memory)[0]))",
            tags=("sentence-memory",),
        )
