"""The job of ``train-vae``: self-supervised training of a SentenceVAE (paper section 3.1)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sentcompress.distributed import processes
from sentcompress.generation import reconstruct
from sentcompress.modeling import SentenceVAE
from sentcompress.modeling.grafting import (
    check_vocabulary,
    freeze_embeddings,
    start_from_backbone,
    vae_config,
    wrap_backbone,
)
from sentcompress.modeling.llm_loading import check_backbone_weights, is_unproven, load_causal_lm
from sentcompress.modeling.losses import TokenLoss
from sentcompress.recipe import Recipe
from sentcompress.registry import get_registry
from sentcompress.text.sampling import SentenceSampler
from sentcompress.training.card import Card
from sentcompress.training.inputs import Inputs, backbone_shape, load_inputs
from sentcompress.training.run_folder import VAE
from sentcompress.training.sharding import gathered, whole_state
from sentcompress.training.step import StepOutput, StepShare

RECONSTRUCTED = 64
"""Held-out sentences reconstructed free-running at each evaluation."""


class VAEJob:
    """Encode each sentence and reconstruct it."""

    stage = VAE
    batch_fields = ("train_vae.sentences_per_batch",)
    units = ()

    def __init__(self, recipe: Recipe, text: Inputs | None = None) -> None:
        self.recipe = recipe
        self.settings = recipe.train_vae
        self.text = text or load_inputs(recipe)
        self.inputs = {"corpus": self.text.corpus.key}
        shape = backbone_shape(recipe)
        self.model = SentenceVAE(
            vae_config(
                recipe,
                shape.hidden_size,
                shape.num_heads,
                self.text.tokenizer,
                self.text.segmenter,
                shape.config,
            )
        )
        if recipe.vae.init != "random":
            start_from_backbone(self.model, load_causal_lm(recipe.backbone), recipe.backbone)
        else:  # what the graft will need
            check_vocabulary(self.model.config.vocab_size, shape)
            check_backbone_weights(recipe.backbone)
            if is_unproven(recipe.backbone):
                wrap_backbone(recipe.backbone, load_causal_lm(recipe.backbone))
        if recipe.vae.freeze == "embeddings":
            freeze_embeddings(self.model)
        self.token_loss = TokenLoss(
            gamma=self.settings.focal_gamma if self.settings.loss == "focal" else 0.0,
            label_smoothing=self.settings.label_smoothing,
        )
        corpus, pad = self.text.corpus, self.model.config.pad_token_id
        size = self.settings.sentences_per_batch
        self._train = SentenceSampler(corpus, corpus.train, size, recipe.seed, pad)
        self._heldout = SentenceSampler(corpus, corpus.heldout, size, recipe.seed, pad)

    def batch(self, index: int) -> dict[str, Tensor]:
        return self._train.batch(index)

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = batch["attention_mask"]
        sentences = torch.tensor(len(mask))
        counts = {"sentences": sentences, "targets": mask.sum() + sentences}
        micro_batches = self.settings.gradient_accumulation * processes().num_processes
        if self.model.config.variational and self.settings.kl_floor and micro_batches > 1:
            # Which dimensions are above the floor is decided by their mean over the step.
            device = next(self.model.parameters()).device
            with gathered(self.model):
                nats = self.model.kl_nats(batch["input_ids"].to(device), mask.to(device))
            counts["kl_nats"] = nats.sum(0).cpu()
        return counts

    def loss(self, model: torch.nn.Module, batch: dict[str, Tensor], share: StepShare) -> StepOutput:
        step_kl = None
        if "kl_nats" in share.total:
            step_kl = share.total["kl_nats"] / share.total["sentences"]
        output = model(
            **batch,
            token_loss=self.token_loss,
            kl_weight=self.settings.kl_weight,
            kl_floor=self.settings.kl_floor,
            latent_noise=self.settings.latent_noise,
            step_kl=step_kl,
        )
        nats = output.nll.sum() / output.targets.sum()
        targets = share.of("targets")
        return StepOutput(
            output.token_loss * targets + output.kl_loss * share.of("sentences"),
            tokens=int(batch["attention_mask"].sum()),
            metrics={"nats_per_token": nats * targets},
        )

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """Teacher-forced perplexity (the paper's figure) and free-running reconstruction, held out."""
        device = next(model.parameters()).device
        nats, targets, sentences = 0.0, 0, []
        for index in range(self.settings.eval_batches):
            batch = {name: value.to(device) for name, value in self._heldout.batch(index).items()}
            output = model(**batch)
            nats += float(output.nll.double().sum())
            targets += int(output.targets.sum())
            rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
            sentences += [ids[mask].tolist() for ids, mask in rows]
        # Sample across batches: the sentences of a batch have about the same length.
        sample = sentences[:: max(1, len(sentences) // RECONSTRUCTED)][:RECONSTRUCTED]
        registry = get_registry()
        with gathered(model):
            written = reconstruct(model, self.text.tokenizer, sample)  # type: ignore[arg-type]
        return {
            "perplexity": float(torch.tensor(nats / targets).exp()),
            "tokens_right": registry.create("metric", "token-accuracy").compute(written)["tokens"],
            "sentences_exact": registry.create("metric", "exact-match").compute(written)["sentences"],
        }

    def state(self) -> dict[str, Tensor]:
        return whole_state(self.model)

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        self.model.save_pretrained(folder, state_dict=state)
        self.text.tokenizer.save_pretrained(folder)

    def card(self) -> Card:
        config = self.model.config
        return Card(
            title=f"SentenceVAE {config.hidden_size}-H{config.encoder_layers}",
            summary=f"Turns a sentence into {config.latents} vector(s) of {config.hidden_size} and back, for "
            f"grafting onto {self.recipe.backbone.model}.",
            data=self.text.describe(),
            heldout=f"On {RECONSTRUCTED} held-out sentences reconstructed free-running (greedy); perplexity is "
            "teacher-forced, the end mark included.",
            usage="import sentcompress\n\nvae = sentcompress.SentenceVAE.from_pretrained({folder})",
            tags=("sentence-vae",),
        )
