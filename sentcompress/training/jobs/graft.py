"""The job of ``graft``: encoder, backbone and decoder fine-tuned on text together (paper section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sentcompress.errors import InputError
from sentcompress.files import folder_digest
from sentcompress.modeling.grafting import freeze_embeddings, graft, wrap_backbone
from sentcompress.modeling.llm_loading import load_causal_lm
from sentcompress.modeling.losses import TokenLoss
from sentcompress.modeling.saved_models import load_vae
from sentcompress.modeling.sentence_lm import predictions
from sentcompress.recipe import Recipe
from sentcompress.text.lossless_tokenizer import lossless
from sentcompress.text.sampling import PassageSampler
from sentcompress.training.card import Card
from sentcompress.training.inputs import Inputs, load_inputs
from sentcompress.training.run_folder import GRAFT
from sentcompress.training.step import StepOutput, StepShare
from sentcompress.training.teacher import graft_teacher
from sentcompress.training.tuning import apply_tune, merged_state


class GraftJob:
    """Predict each sentence from those before it."""

    stage = GRAFT
    batch_fields = ("graft.passages_per_batch", "graft.max_sentences")

    def __init__(
        self, recipe: Recipe, vae: Path, text: Inputs | None = None, teacher: Path | None = None
    ) -> None:
        """``teacher``: folder of the LLM that teaches the graft; None if it is the backbone itself."""
        self.recipe = recipe
        self.settings = recipe.graft
        self.text = text or load_inputs(recipe)
        tokenizer, corpus = self.text.tokenizer, self.text.corpus
        self.inputs = {"corpus": corpus.key, "vae": folder_digest(vae)}
        trained = load_vae(vae)
        vocab_size = lossless(tokenizer).vocab_size
        if trained.config.vocab_size != vocab_size:
            raise InputError(
                f"the SentenceVAE in '{vae}' was trained with a tokenizer of {trained.config.vocab_size} tokens, "
                f"but the backbone {recipe.backbone.model} has {vocab_size}",
                fix=f"train one for it: sentcompress train-vae --backbone {recipe.backbone.model}",
            )
        backbone = wrap_backbone(recipe.backbone, load_causal_lm(recipe.backbone))
        self.model = graft(recipe, trained, backbone).train()
        if self.model.shortlist is not None:
            counts = torch.from_numpy(corpus.train_counts(vocab_size))
            self.model.shortlist.start(self.model.vae.output_weight, counts)
        limit = self.model.backbone.max_positions // self.model.latents - int(self.settings.start_latent)
        if self.settings.max_sentences > limit:
            raise InputError(
                f"graft.max_sentences: {self.settings.max_sentences}, but the backbone has positions for {limit}",
                fix=f"set it to at most {limit}, or use a backbone with more positions",
            )
        if recipe.vae.freeze == "embeddings":
            freeze_embeddings(self.model.vae)
        backbone = self.model.backbone
        apply_tune(backbone, backbone.blocks, self.settings, "graft")
        self.token_loss = TokenLoss(
            gamma=self.settings.focal_gamma if self.settings.loss == "focal" else 0.0,
            label_smoothing=self.settings.label_smoothing,
        )
        start = self.model.vae.config.bos_token_id
        self.teacher = graft_teacher(recipe, tokenizer, vocab_size, start, teacher)
        if teacher is not None:
            self.inputs["teacher"] = folder_digest(teacher)
        self._train = self._sampler(corpus.train, shuffle=True)
        self._heldout = self._sampler(corpus.heldout, shuffle=False)

    def _sampler(self, documents: Any, *, shuffle: bool) -> PassageSampler:
        return PassageSampler(
            self.text.corpus,
            documents,
            self.settings.passages_per_batch,
            self.settings.max_sentences,
            self.settings.overlap_sentences,
            self.recipe.seed,
            self.model.config.pad_token_id,
            shuffle=shuffle,
            start=self.settings.start_latent,
        )

    @property
    def units(self) -> Iterable[torch.nn.Module]:
        return self.model.backbone.blocks

    def batch(self, index: int) -> dict[str, Tensor]:
        return self._train.batch(index)

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found = predictions(batch["sentence_index"], batch["passage_ids"], batch["scored"], batch["last"])
        sentences = found.has_target.sum()
        tokens = batch["attention_mask"][found.targets_at].sum()
        return {
            "tokens": tokens,
            "targets": tokens + sentences,
            "decisions": sentences + found.ends.sum(),
        }

    def loss(self, model: torch.nn.Module, batch: dict[str, Tensor], share: StepShare) -> StepOutput:
        output = model(
            **batch,
            token_loss=self.token_loss,
            teaching=None if self.teacher is None else self.teacher.teach(batch),
        )
        targets = output.targets.sum().clamp_min(1)
        nats = (output.sentence_nll.sum() + output.stop_nll.sum()) / targets
        metrics = {"nats_per_token": nats * share.of("targets")}
        shortlist_loss = output.shortlist_loss
        if shortlist_loss is not None:
            shortlist_loss = shortlist_loss * share.of("tokens")
            metrics["shortlist_nats_per_token"] = shortlist_loss
        stop_loss = output.stop_loss * share.of("decisions")
        # Encoder and decoder run their linear layers on real tokens only: all padding is in the backbone's batch.
        return StepOutput(
            output.token_loss * share.of("targets") + self.settings.stop_weight * stop_loss,
            tokens=int(batch["attention_mask"].sum()),
            metrics=metrics,
            mask=batch["passage_ids"] >= 0,
            auxiliary_loss=shortlist_loss,
        )

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """Bits per token of held-out passages, end marks and stop decisions included, and how much states vary.

        Both are fast to measure. Bits are comparable within a run only: use ``bench quality`` for the real figure.
        ``state_deviation`` is the root mean square distance of the LLM's states from their mean, divided by their root
        mean square norm; what depends on a sentence's position alone counts too. Near 0, the LLM says the same about
        every sentence.
        """
        device = next(model.parameters()).device
        nats, tokens = 0.0, 0
        states: list[Tensor] = []
        for index in range(min(self.settings.eval_batches, self._heldout.batches_per_epoch)):
            batch = {name: value.to(device) for name, value in self._heldout.batch(index).items()}
            output = model(**batch)
            nats += float(output.sentence_nll.double().sum() + output.stop_nll.double().sum())
            tokens += int(output.targets.sum() - (output.targets > 0).sum())
            states.append(output.hidden_states[batch["sentence_index"] >= 0].flatten(1).double())
        every = torch.cat(states)
        deviation = (every - every.mean(0)).square().sum() / every.square().sum()
        return {
            "bits_per_token": nats / math.log(2) / max(1, tokens),
            "state_deviation": float(deviation.sqrt()),
        }

    def state(self) -> dict[str, Tensor]:
        return merged_state(self.model)

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        self.model.save_pretrained(folder, state_dict=state)
        self.text.tokenizer.save_pretrained(folder)

    def card(self) -> Card:
        return Card(
            title=f"SentenceLM on {self.recipe.backbone.model}",
            summary=f"{self.recipe.backbone.model} grafted to read and predict sentences: a sentence encoder in "
            "front, a sentence decoder behind, causal over sentences.",
            data=self.text.describe(),
            heldout="Bits per token of held-out passages, end marks and stop decisions included; "
            "use `sentcompress bench quality` to compare models.",
            usage="import sentcompress\nfrom transformers import AutoTokenizer\n\n"
            "model = sentcompress.SentenceLM.from_pretrained({folder})\n"
            "tokenizer = AutoTokenizer.from_pretrained({folder})\n"
            'print(model.generate(["The state of the Union"], tokenizer)[0].text)',
            tags=("sentence-lm",),
        )
