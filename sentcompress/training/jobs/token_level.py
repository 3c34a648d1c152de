"""Token-level training: pretraining a small backbone from scratch, and the equal-data baseline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sentcompress.contracts.causal_lm import position_limit
from sentcompress.errors import InputError
from sentcompress.modeling.backbone_config import shaped_config
from sentcompress.modeling.device_map import blocks_of
from sentcompress.modeling.llm_loading import load_causal_lm
from sentcompress.modeling.losses import TokenLoss
from sentcompress.recipe import Recipe, TuneSettings
from sentcompress.registry import get_registry
from sentcompress.text.lossless_tokenizer import lossless
from sentcompress.text.sampling import PassageSampler
from sentcompress.text.token_sampling import IGNORED, PassageTokenSampler, TokenSampler
from sentcompress.training.card import Card
from sentcompress.training.inputs import Inputs, load_inputs
from sentcompress.training.run_folder import PRETRAIN, Stage, baseline_stage
from sentcompress.training.sharding import is_sharded
from sentcompress.training.step import StepOutput, StepShare
from sentcompress.training.tokenizer import train_tokenizer, training_texts
from sentcompress.training.tuning import apply_tune, merged_state, recompute_activations

USAGE = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({folder})
model = AutoModelForCausalLM.from_pretrained({folder})"""
"""Of the cards of these models."""
SIMILAR = 0.9
"""Rows are computed together if the shortest has at least this share of the longest one's tokens."""


class TokenLM(nn.Module):
    """A causal LM that computes its loss without materializing all logits."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    @property
    def supports_gradient_checkpointing(self) -> bool:
        return bool(self.lm.supports_gradient_checkpointing)

    def gradient_checkpointing_enable(self, _: dict[str, Any]) -> None:
        recompute_activations(self.lm)

    @property
    def similar(self) -> float:
        """As in :func:`rows_of_similar_length`."""
        # If the model is sharded, all processes must call each block equally often.
        return 0.0 if is_sharded(self) else SIMILAR

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Next-token cross-entropy.

        Args:
            input_ids, attention_mask: ``[B, T]``.
            labels: ``[B, T]``, the tokens themselves (they are shifted here), -100 where there is no target.

        Returns:
            loss and NLL in nats, ``[targets]`` each; only the loss has gradients.
        """
        states, targets = states_and_targets(self.lm, input_ids, attention_mask, labels, self.similar)
        return TokenLoss(gamma=0.0)(states, self.lm.get_output_embeddings().weight, targets)


def states_and_targets(
    lm: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, similar: float = SIMILAR
) -> tuple[Tensor, Tensor]:
    """Last hidden states ``[targets, H]`` and the tokens ``[targets]`` that they predict.

    Args:
        input_ids, attention_mask, labels: as in :meth:`TokenLM.forward`.
        similar: as in :func:`rows_of_similar_length`.
    """
    states, targets = [], []
    for rows, hidden in hidden_states_by_length(lm, input_ids, attention_mask, similar):
        following = labels[rows, 1 : hidden.shape[1]]
        kept = following != IGNORED
        states.append(hidden[:, :-1][kept])
        targets.append(following[kept])
    return torch.cat(states), torch.cat(targets)


def hidden_states_by_length(
    lm: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, similar: float = SIMILAR
) -> Iterator[tuple[Tensor, Tensor]]:
    """Last hidden states, computed in groups of rows of similar length.

    Args:
        input_ids, attention_mask: ``[B, T]``, padding on the right.
        similar: as in :func:`rows_of_similar_length`.

    Yields:
        row indexes ``[b]`` and their states ``[b, t, H]``, where ``t`` is the longest length in the group.
    """
    for rows, length in rows_of_similar_length(attention_mask, similar):
        mask = attention_mask[rows, :length]
        yield (
            rows,
            lm.base_model(
                # Without padding only the causal mask remains, for which attention has a fast path.
                input_ids=input_ids[rows, :length],
                attention_mask=None if bool(mask.all()) else mask,
                use_cache=False,
            ).last_hidden_state,
        )


def rows_of_similar_length(attention_mask: Tensor, similar: float = SIMILAR) -> list[tuple[Tensor, int]]:
    """Group rows by length, so that little of the computation is padding.

    Args:
        attention_mask: ``[B, T]``, padding on the right.
        similar: the shortest in a group has at least this share of the longest one's tokens.

    Returns:
        row indexes ``[b]`` and longest length of each group.
    """
    lengths, order = attention_mask.sum(1).sort(descending=True, stable=True)
    groups: list[tuple[list[int], int]] = []
    for row, length in zip(order.tolist(), lengths.tolist(), strict=True):
        if not groups or length < similar * groups[-1][1]:
            groups.append(([], length))
        groups[-1][0].append(row)
    return [(torch.tensor(rows, device=attention_mask.device), length) for rows, length in groups]


class TokenLevelJob:
    """Loss, held-out figures and saving of the token-level trainings."""

    model: Any
    text: Inputs
    settings: Any
    _train: Any
    _heldout: Any

    def batch(self, index: int) -> dict[str, Tensor]:
        return self._train.batch(index)

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"targets": (batch["labels"][:, 1:] != IGNORED).sum()}

    def loss(self, model: nn.Module, batch: dict[str, Tensor], share: StepShare) -> StepOutput:
        losses, _ = model(**batch)
        loss = losses.mean() if len(losses) else losses.sum()
        mask = batch["attention_mask"]
        computed = [
            mask[rows, :length].flatten() for rows, length in rows_of_similar_length(mask, self.model.similar)
        ]
        return StepOutput(loss * share.of("targets"), tokens=int(mask.sum()), mask=torch.cat(computed))

    def heldout_batches(self) -> int:
        """Number of held-out batches per evaluation."""
        return int(self.settings.eval_batches)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Bits per byte and nats per token of held-out rows."""
        sizes = torch.from_numpy(lossless(self.text.tokenizer).token_sizes)
        device = next(model.parameters()).device
        nats, targets, size = 0.0, 0, 0
        for index in range(self.heldout_batches()):
            batch = self._heldout.batch(index)
            nll = model(**{name: value.to(device) for name, value in batch.items()})[1]
            nats += float(nll.double().sum())
            targets += len(nll)
            ids = batch["labels"][:, 1:]
            size += int(sizes[ids[ids != IGNORED]].sum())
        figures = {"bits_per_byte": nats / math.log(2) / size} if size else {}
        return figures | {"nats_per_token": nats / max(1, targets)}

    @property
    def units(self) -> Iterable[nn.Module]:
        return blocks_of(self.model.lm)

    def state(self) -> dict[str, Tensor]:
        return merged_state(self.model.lm)

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        self.model.lm.save_pretrained(folder, state_dict=state)
        self.text.tokenizer.save_pretrained(folder)

    @property
    def parameters(self) -> str:
        return f"{sum(parameter.numel() for parameter in self.model.parameters()) / 1e6:.1f} M parameters"


class PretrainJob(TokenLevelJob):
    """A small backbone from scratch: tokenizer and weights come from the training documents alone."""

    stage = PRETRAIN
    batch_fields = ("pretrain.sequences_per_batch", "pretrain.sequence_length")

    def __init__(self, recipe: Recipe) -> None:
        """Raises InputError without a ``pretrain`` section, or for an invalid configuration."""
        if recipe.pretrain is None:
            raise InputError(
                "the recipe has no 'pretrain' section", fix="add one, or use train-vae and graft"
            )
        self.recipe = recipe
        self.settings = recipe.pretrain
        dataset = get_registry().create("dataset", recipe.data.name, recipe.data.options)
        tokenizer = train_tokenizer(training_texts(dataset), self.settings.vocab_size)
        config = backbone_config(recipe, tokenizer)
        tokenizer.model_max_length = config.max_position_embeddings
        self.text = load_inputs(recipe, tokenizer)
        self.inputs = {"corpus": self.text.corpus.key}  # the key covers the tokenizer
        self.model = TokenLM(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"))
        self._train = self._sampler(self.text.corpus.train)
        self._heldout = self._sampler(self.text.corpus.heldout)

    def _sampler(self, documents: Any) -> TokenSampler:
        return TokenSampler(
            self.text.corpus,
            documents,
            self.settings.sequence_length,
            self.settings.sequences_per_batch,
            self.recipe.seed,
            self.text.tokenizer.eos_token_id,
        )

    def card(self) -> Card:
        config = self.model.lm.config
        return Card(
            title=self.recipe.name,
            summary=f"A small {config.model_type} of {self.parameters}, {len(self.text.tokenizer)} tokens, "
            "pretrained from scratch with sentcompress, for grafting where no other LLM is available. "
            "Not meant for use on its own.",
            data=self.text.describe(),
            heldout=f"On {self.heldout_batches() * self.settings.sequences_per_batch} held-out rows of "
            f"{self.settings.sequence_length} tokens, each without the text before it in its document; "
            "`sentcompress bench quality` scores whole documents with full context.",
            usage=USAGE,
            tags=(str(config.model_type), "pretrained-from-scratch"),
        )


def backbone_config(recipe: Recipe, tokenizer: Any) -> PretrainedConfig:
    """The transformers configuration of ``pretrain.config`` for a tokenizer.

    Raises:
        InputError: the configuration class has no such field, or its value does not fit.
    """
    settings = recipe.pretrain
    assert settings is not None
    adapter: Any = get_registry().get("backbone", recipe.backbone.name or "opt")
    from_tokenizer = {
        "model_type": adapter.model_types[0],
        "vocab_size": lossless(tokenizer).vocab_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config: PretrainedConfig = shaped_config(from_tokenizer, settings.config, "pretrain.config")
    if settings.sequence_length > config.max_position_embeddings:
        raise InputError(
            f"pretrain.sequence_length: {settings.sequence_length} is over max_position_embeddings "
            f"({config.max_position_embeddings})",
            fix="lower it, or set pretrain.config.max_position_embeddings",
        )
    return config


class PassageJob(TokenLevelJob):
    """A causal LM trained token by token on the passages of the graft (or memory), in its order.

    Args:
        lm: to train.
        tune: which of its weights.
        rate: peak learning rate.
        where: the recipe section of ``tune``, for messages.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        text: Inputs,
        lm: PreTrainedModel,
        tune: TuneSettings,
        rate: float | None,
        where: str,
    ) -> None:
        self.recipe, self.stage, self.text = recipe, stage, text
        self.batch_fields = passage_fields(stage)
        self.settings = recipe.passages.model_copy(
            update={"learning_rate": rate or recipe.passages.learning_rate}
        )
        self.inputs = {"corpus": text.corpus.key}
        lm.train()
        apply_tune(lm, blocks_of(lm), tune, where)
        self.model = TokenLM(lm)
        self._train, self._heldout = passage_samplers(recipe, text, lm.config)


class BaselineJob(PassageJob):
    """The baseline: the backbone fine-tuned token by token on the passages of the graft (or memory), in its order."""

    def __init__(self, recipe: Recipe, text: Inputs | None = None) -> None:
        own = recipe.baseline
        text, lm = text or load_inputs(recipe), load_causal_lm(recipe.backbone)
        super().__init__(recipe, baseline_stage(recipe), text, lm, own, own.learning_rate, "baseline")

    def card(self) -> Card:
        compared = "SentenceLM" if self.recipe.memory is None else "LLM trained with a sentence memory"
        return Card(
            title=f"{self.recipe.backbone.model}, fine-tuned token by token",
            summary=f"The equal-data baseline of a {compared}: {self.recipe.backbone.model} ({self.parameters}) "
            "fine-tuned on the same passages for the same number of steps.",
            data=self.text.describe(),
            heldout="On held-out passages, each without the text before it in its document; "
            "use `sentcompress bench quality` to compare models.",
            usage=USAGE,
            tags=("token-level-baseline",),
        )


def passage_fields(stage: Stage) -> tuple[str, ...]:
    """Recipe fields that shrink a micro-batch of passages."""
    return f"{stage.section}.passages_per_batch", f"{stage.section}.max_sentences"


def passage_samplers(recipe: Recipe, text: Inputs, config: Any) -> list[PassageTokenSampler]:
    """The passages of a recipe as tokens, of the training documents and of the held-out ones.

    Args:
        config: of the LLM that reads them.
    """
    tokenizer, settings, longest = text.tokenizer, recipe.passages, position_limit(config)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    samplers = []
    for documents, shuffle in ((text.corpus.train, True), (text.corpus.heldout, False)):
        passages = PassageSampler(
            text.corpus,
            documents,
            settings.passages_per_batch,
            settings.max_sentences,
            settings.overlap_sentences,
            recipe.seed,
            tokenizer.pad_token_id,
            shuffle=shuffle,
        )
        samplers.append(
            PassageTokenSampler(passages, longest, tokenizer.pad_token_id, start, tokenizer.eos_token_id)
        )
    return samplers
