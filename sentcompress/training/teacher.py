"""A token-level LLM as a teacher: its predictions for each token of the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from sentcompress.contracts.causal_lm import position_limit
from sentcompress.errors import InputError
from sentcompress.modeling.llm_loading import load_backbone_tokenizer, load_causal_lm
from sentcompress.modeling.losses import Teaching, TokenLoss, distillation_loss
from sentcompress.recipe import BackboneSpec, Recipe
from sentcompress.training.jobs.token_level import TokenLM, hidden_states_by_length, states_and_targets

TOLERANCE = 1e-3
"""Allowed difference between the logits and the product of last hidden states and output head."""


class Teacher:
    """Reads the passages of a graft's batch token by token.

    Args:
        lm: a causal LM; it is not trained.
        vocab_size: number of tokens of the SentenceLM; the LM must have them too.
        bos_token_id: put before each text.
        share: its share of the graft's loss.

    Raises:
        InputError: it has fewer tokens, or its logits are not simply the product with its output head.
    """

    def __init__(self, lm: PreTrainedModel, vocab_size: int, bos_token_id: int, share: float) -> None:
        self.lm = lm.eval().requires_grad_(False)
        self.bos_token_id, self.share = bos_token_id, share
        self.longest = position_limit(lm.config)
        self.weight = lm.get_output_embeddings().weight[:vocab_size]
        if len(self.weight) < vocab_size:
            raise InputError(
                f"graft.teacher: it has {len(self.weight)} tokens, but the model that it teaches has {vocab_size}",
                fix="use a teacher with the backbone's own tokenizer",
            )
        check_output_head(lm, "graft.teacher", "graft without a teacher")

    def move(self, device: torch.device) -> None:
        """Move it to the device of a batch."""
        if self.lm.device != device:
            self.lm.to(device)
            self.weight = self.lm.get_output_embeddings().weight[: len(self.weight)]

    @torch.no_grad()
    def teach(self, batch: dict[str, Tensor]) -> Teaching:
        """Its predictions for the sentences of a graft's batch, each passage read from its beginning.

        Args:
            batch: ``input_ids, attention_mask [S, L]``, ``sentence_index, passage_ids [R, N]``.
        """
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        self.move(ids.device)
        occupied = batch["sentence_index"] >= 0
        sentences = batch["sentence_index"][occupied]
        rows = torch.arange(len(occupied), device=ids.device)[:, None]
        passages = (rows * len(ids) + batch["passage_ids"])[occupied]
        _, sizes = passages.unique_consecutive(return_counts=True)
        texts = [torch.cat([ids[s][mask[s]] for s in passage]) for passage in sentences.split(sizes.tolist())]
        pieces = [piece for text in texts for piece in text.split(self.longest)]
        # A state predicts the next token, so the last token is not read.
        inputs = [torch.cat([piece.new_tensor([self.bos_token_id]), piece[:-1]]) for piece in pieces]
        states = self._states(inputs)
        taught = states.new_zeros(*ids.shape, states.shape[1])
        flat = taught[sentences]
        flat[mask[sentences]] = states
        taught[sentences] = flat
        return Teaching(taught, self.weight, self.share)

    def _states(self, texts: list[Tensor]) -> Tensor:
        """Last hidden states of all texts in one tensor: ``[T, H]``."""
        lengths = torch.tensor([len(text) for text in texts], device=texts[0].device)
        ids = pad_sequence(texts, batch_first=True)
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        found: dict[int, Tensor] = {}
        for rows, states in hidden_states_by_length(self.lm, ids, mask.long()):
            found |= {row: states[i, : len(texts[row])] for i, row in enumerate(rows.tolist())}
        return torch.cat([found[row] for row in range(len(texts))])


class TaughtLM(TokenLM):
    """A token-level LLM that learns from a teacher.

    Args:
        lm: to train.
        token_loss: against the text.
        teacher: an LLM that reads the same tokens; None if there is none.
    """

    def __init__(self, lm: PreTrainedModel, token_loss: TokenLoss, teacher: Teacher | None) -> None:
        super().__init__(lm)
        self.token_loss = token_loss
        self._teacher = (teacher,)  # in a tuple, so that it is neither trained nor saved

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        states, targets = states_and_targets(self.lm, input_ids, attention_mask, labels, self.similar)
        weight, teacher = self.lm.get_output_embeddings().weight, self._teacher[0]
        if teacher is None or not self.training:
            return self.token_loss(states, weight, targets)
        teacher.move(input_ids.device)
        with torch.no_grad():
            expected, _ = states_and_targets(teacher.lm, input_ids, attention_mask, labels, self.similar)
        teaching = Teaching(expected, teacher.weight, teacher.share)
        return distillation_loss(states, weight, targets, teaching, expected, self.token_loss.gamma)


def token_teacher(recipe: Recipe, tokenizer: Any, lm: PreTrainedModel, folder: Path | None) -> Teacher | None:
    """The teacher that ``graft.teacher`` names, for an LLM that writes tokens; None if it names none.

    Args:
        lm: that it teaches.
        folder: as for :func:`graft_teacher`, which this raises the errors of.
    """
    size = len(lm.get_output_embeddings().weight)
    # It puts no token before a text: passages begin with one.
    return graft_teacher(recipe, tokenizer, size, tokenizer.eos_token_id, folder)


def graft_teacher(
    recipe: Recipe, tokenizer: Any, vocab_size: int, bos_token_id: int, folder: Path | None
) -> Teacher | None:
    """The teacher that ``graft.teacher`` names; None if it names none.

    Args:
        vocab_size: number of tokens that the student's output head has.
        bos_token_id: put before each text.
        folder: of the LLM; None if it is the backbone itself.

    Raises:
        InputError: it has another tokenizer than the backbone, or cannot teach.
    """
    if recipe.graft.teacher is None:
        return None
    spec = recipe.backbone
    if folder is not None:
        spec = BackboneSpec(model=str(folder.resolve()))
        if load_backbone_tokenizer(spec).get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"graft.teacher: '{folder}' has another tokenizer than the backbone",
                fix="use a teacher with the backbone's tokenizer",
            )
    return Teacher(load_causal_lm(spec), vocab_size, bos_token_id, recipe.graft.teacher_share)


@torch.no_grad()
def check_output_head(lm: PreTrainedModel, where: str, fix: str = "use another backbone") -> None:
    """Refuse an LLM whose logits are more than the product of its last hidden states and its output head.

    Args:
        where: the recipe field or section, for the message.
    """
    training = lm.training
    lm.eval()
    weight = lm.get_output_embeddings().weight
    ids = torch.arange(8, device=weight.device)[None] % len(weight)
    states = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = lm(input_ids=ids, use_cache=False).logits
    lm.train(training)
    difference = float((logits - states @ weight.t()).abs().max())
    if difference > TOLERANCE * max(1.0, float(logits.abs().max())):
        raise InputError(
            f"{where}: the logits of {lm.config.model_type} are not its last hidden states times its output head "
            f"(soft-capped, scaled or with a bias: they differ by {difference:.2g})",
            fix=fix,
        )
