"""The training sections of a recipe: what all trainings have, and what each has of its own."""

from __future__ import annotations

import warnings
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sentcompress.recipe.sections import Precision, Section, UserPath


class TrainingSettings(Section):
    """Settings of every training stage."""

    steps: int = Field(default=1000, ge=1)
    """Optimizer steps."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of linear warm-up; null uses 5% of all steps. A cosine to ``final_learning_rate_share`` follows."""
    final_learning_rate_share: float = Field(default=0.0, ge=0, le=1)
    """Final learning rate as a share of the peak."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW weight decay (the paper: 0.01)."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Maximum gradient norm; larger gradients are clipped (the paper: 1)."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Micro-batches per step; their gradient is that of one large batch, each token counting equally."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the moving average of the weights, which is then evaluated and saved; null turns it off."""
    spike: float | None = Field(default=None, gt=1)
    """A loss over this multiple of the median of the last 50 steps (and at least half a nat over it) is a spike;
    null never reports one."""
    on_anomaly: Literal["stop", "skip", "rollback"] = Field(default="stop", serialization_alias="on_trouble")
    """When a loss or gradient is NaN or infinite, or the loss is a spike: end the run, skip the step, or go back to the
    newest checkpoint and continue with the data after the step (at most 25 steps in a row, or 5 times between two
    checkpoints)."""
    precision: Precision = "auto"
    """``auto`` takes bf16 on GPUs that have it, and on CPUs where it makes this training faster."""
    gradient_checkpointing: bool = False
    """Recompute the backbone's activations in the backward pass: less memory, slower."""
    compile: bool = False
    """Compile the model with torch.compile."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations on held-out text; null evaluates only at the end."""
    eval_batches: int = Field(default=8, ge=1)
    """Held-out batches per evaluation."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; null saves only at the end and on Ctrl-C."""
    keep: int = Field(default=2, ge=1)
    """Number of checkpoints to keep."""
    keep_best: bool = False
    """Keep the model with the best held-out result so far in ``best/`` (checked every ``eval_every`` steps)."""
    background_saves: bool = True
    """Keep training while a checkpoint is written: weights, optimizer state and moving average are copied to CPU memory
    first; false waits instead and needs no copy."""
    distributed: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: ``ddp`` replicates the model; ``fsdp`` shards weights, gradients and optimizer state."""
    tensorboard: bool = False
    """Also write TensorBoard events."""
    wandb: bool = False
    """Also log to Weights & Biases (project ``sentcompress``; ``WANDB_MODE=offline`` needs no account)."""

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or "on_trouble" not in raw:
            return raw
        warnings.warn(
            "the recipe field 'on_trouble' is now called 'on_anomaly': rename it", FutureWarning, stacklevel=2
        )
        # If both are there, the later one counts: --set comes after the recipe's own.
        return {("on_anomaly" if name == "on_trouble" else name): value for name, value in raw.items()}

    @model_validator(mode="after")
    def _rollback_needs_checkpoints(self) -> Self:
        if self.on_anomaly == "rollback" and not self.save_every:
            raise ValueError("on_anomaly: rollback goes back to a checkpoint: set save_every")
        return self


class PretrainSettings(TrainingSettings):
    """Token-level pretraining of a small backbone from scratch."""

    config: dict[str, Any] = {}
    """Fields of the transformers configuration for ``backbone.name``, such as hidden_size."""
    vocab_size: int = Field(default=4096, ge=300)
    """Vocabulary size of the byte-level BPE trained on the training documents."""
    sequence_length: int = Field(default=256, ge=8)
    """Tokens per sequence."""
    sequences_per_batch: int = Field(default=16, ge=1)
    """Sequences per micro-batch."""


class TrainVAESettings(TrainingSettings):
    """Self-supervised training of the SentenceVAE (paper section 3.1)."""

    steps: int = Field(default=1000, ge=0)
    """Optimizer steps; 0 leaves the SentenceVAE untrained, so that the graft trains all of it."""
    sentences_per_batch: int = Field(default=128, ge=1)
    """Sentences per micro-batch (the paper: 128)."""
    loss: Literal["focal", "cross-entropy"] = "focal"
    """Focal loss (the paper) or cross-entropy."""
    focal_gamma: float = Field(default=2.0, ge=0)
    """Focusing parameter of the focal loss (the paper: 2)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target probability distributed over the vocabulary."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of a KL term towards N(0, 1); 0 is the paper's deterministic model."""
    kl_floor: float = Field(default=0.0, ge=0)
    """Free bits: no KL penalty below this many nats per latent dimension."""
    latent_noise: float = Field(default=0.0, ge=0)
    """Standard deviation of the noise added to the latents in training."""


class LoraSettings(Section):
    """Low-rank adapters for ``tune: lora`` (through peft)."""

    rank: int = Field(default=16, ge=1)
    """Rank of the adapters."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale of the adapters."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of the adapters."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Linear layers of the backbone's blocks to adapt, by name; the experts of a mixture, too."""


class TuneSettings(Section):
    """Which weights of the LLM are trained."""

    tune: Literal["full", "lora", "frozen", "last-n"] = "full"
    """What to train of the backbone: all weights, low-rank adapters, nothing, or the last blocks."""
    last_n: int = Field(default=2, ge=1)
    """Blocks to train with ``tune: last-n``."""
    lora: LoraSettings = LoraSettings()
    """Adapters for ``tune: lora``."""


class TokenTuneSettings(TuneSettings):
    """Which weights of a token-level LLM are trained: with none there would be nothing to train."""

    tune: Literal["full", "lora", "last-n"] = "full"
    """What to train of the LLM: all weights, low-rank adapters, or the last blocks."""


class PassageSettings(TrainingSettings):
    """Training on passages: consecutive sentences of a document."""

    passages_per_batch: int = Field(default=8, ge=1)
    """Passages per micro-batch (the paper: 1)."""
    max_sentences: int = Field(default=64, ge=2)
    """Sentences per passage (the paper: 64); longer documents become consecutive passages."""
    overlap_sentences: int = Field(default=1, ge=1)
    """Sentences that a passage repeats from the one before it as context, without scoring them again. Without one, the
    first sentence of a passage could not be predicted."""


class SplitSettings(Section):
    """Which blocks of a split LLM run at every token. Those between them run once per sentence, at its last token."""

    first_blocks: int = Field(default=5, ge=1)
    """How many from the first one on."""
    last_blocks: int = Field(default=5, ge=1)
    """How many up to the last one."""


class GraftSettings(PassageSettings, TuneSettings):
    """Fine-tuning of encoder, backbone and decoder on text (paper section 3.2), or of a split LLM."""

    split: SplitSettings | None = None
    """Keep the LLM's first and last blocks at every token and run those between once per sentence, in place of a
    SentenceVAE around all of its blocks: ``{first_blocks: 5, last_blocks: 5}``. Nothing about the SentenceVAE, start
    latent and stop decisions is used then."""
    vae: UserPath | None = Field(default=None, json_schema_extra={"path": True})
    """Folder of a trained SentenceVAE; null uses the one from this run."""
    backbone_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the LLM's weights; null takes ``learning_rate``. A lower one can keep the LLM's states from
    becoming the same for every sentence."""
    loss: Literal["focal", "cross-entropy"] = "focal"
    """Loss of tokens and stop decisions."""
    focal_gamma: float = Field(default=2.0, ge=0)
    """Focusing parameter of the focal loss (the paper: 2)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target probability distributed over the vocabulary."""
    match_scale: bool = True
    """Scale the latents to the measured size of the backbone's token embeddings."""
    start_latent: bool = True
    """Put a learned vector before each document to predict its first sentence (the paper has none)."""
    stop_weight: float = Field(default=1.0, ge=0)
    """Weight of the loss on stop decisions."""
    teacher: UserPath | None = None
    """Distill from a token-level LLM on the same text: ``backbone`` (before training), ``baseline`` (then trained
    first), or the folder of a causal LM with the same tokenizer."""
    teacher_share: float = Field(default=0.5, gt=0, le=1)
    """Share of the token loss that is against the teacher's distribution; the rest is against the text."""
    shortlist_rank: int = Field(default=0, ge=0)
    """Rank of a predictor of the tokens a sentence will contain, trained for ``--head shortlist``; 0 trains none. Its
    gradients do not reach the rest of the model, but count in gradient clipping."""

    @model_validator(mode="after")
    def _one_softening(self) -> GraftSettings:
        if self.teacher and self.label_smoothing:
            raise ValueError("label_smoothing cannot be combined with a teacher; set it to 0")
        return self

    @model_validator(mode="after")
    def _frozen_blocks_have_no_rate(self) -> Self:
        if self.tune == "frozen" and self.backbone_learning_rate:
            raise ValueError("tune: frozen trains nothing of the LLM; remove backbone_learning_rate")
        return self

    @model_validator(mode="after")
    def _split_stands_alone(self) -> Self:
        if self.split and self.vae:
            raise ValueError("split keeps the LLM's own layers and needs no SentenceVAE; remove vae")
        if self.split and self.backbone_learning_rate:
            raise ValueError(
                "split trains nothing but the LLM; set learning_rate and remove backbone_learning_rate"
            )
        if self.split and self.shortlist_rank:
            raise ValueError("split has no sentence decoder for a shortlist; set shortlist_rank to 0")
        if self.split and (self.compile or self.gradient_checkpointing or self.distributed == "fsdp"):
            raise ValueError(
                "split cannot be combined with compile, gradient_checkpointing or distributed: fsdp; remove these"
            )
        if self.split and self.tune == "frozen":
            raise ValueError(
                "split adds no weights, so tune: frozen leaves none to train; use full, lora or last-n"
            )
        return self


class MemorySettings(PassageSettings, TokenTuneSettings):
    """Fine-tuning of an LLM, token by token, with a sentence memory in effect; its backbone is not grafted.

    One model then serves all settings of the memory that were drawn in training.
    """

    name: str = "window+recall"
    """The memory: registered names, combined by ``+``; ``sentcompress plugins`` lists them."""
    options: dict[str, Any] = {}
    """Its options, of all combined memories together. They are saved with the model as its defaults."""
    draw: dict[str, tuple[int, int]] | None = None
    """Options drawn anew for each micro-batch, with the least and the most; ``{}`` draws none. Null draws what the
    memory has of ``recent_sentences`` (2 to 24), ``recall`` (2 to 16) and ``entries`` (1 to 8)."""
    tune: Literal["full", "lora", "last-n"] = "lora"
    """What to train of the backbone: all weights, low-rank adapters (merged when it is saved), or the last blocks."""
    passages_per_batch: int = Field(default=1, ge=1)
    """Passages per micro-batch."""
    max_sentences: int = Field(default=96, ge=2)
    """Sentences per passage: enough that many of them are older than what the memory keeps whole."""
    forward_kl: float = Field(default=0.1, ge=0)
    """Weight of the KL divergence from the LLM before training, under full attention, to the one in training."""
    reverse_kl: float = Field(default=0.1, ge=0)
    """Weight of the KL divergence from the LLM in training to the one before training, under full attention."""

    @model_validator(mode="after")
    def _ranges_are_in_order(self) -> Self:
        for name, (least, most) in (self.draw or {}).items():
            if not 0 <= least <= most:
                raise ValueError(f"draw.{name}: [{least}, {most}] is not a range: write [least, most]")
        return self


class BaselineSettings(TokenTuneSettings):
    """The baseline: the same LLM, fine-tuned token by token on the same passages for the same number of steps.

    They are the graft's, or the memory's if the recipe has a section ``memory``. All its weights are trained by
    default, whatever they train: the fair comparison is with the strongest baseline.
    """

    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate; null uses that of ``graft`` or ``memory``."""
    enabled: bool = True
    """Train a baseline; without one, reports say so."""


EQUAL_COST = 0.1
"""Costs that differ by this share or less count as equal."""


class OpponentSettings(TokenTuneSettings):
    """An opponent of the graft: the same LLM with fewer blocks or a sliding window, so that a token costs as much.

    It is trained token by token on the graft's passages for as many steps, as the baseline is. A pretrained LLM is
    pruned. One with random weights is built with fewer blocks, and the width of their feed-forward layers makes up
    what is left of the difference in cost.
    """

    cost: Literal["operations", "serving"] = "operations"
    """What has to be equal: the ``operations`` of a token at batch 1, or the bytes read for a token when ``serving``
    the largest batch that fits into ``serving_bytes``."""
    text_tokens: int = Field(default=1000, ge=1)
    """Tokens of the text before that token, in each text of a batch."""
    serving_bytes: float = Field(default=4 * 2**30, gt=0)
    """Memory for the weights and caches of the largest batch."""
    blocks: int | None = Field(default=None, ge=1)
    """Number of blocks, whatever they cost; null finds the number whose cost is closest."""
    window: Annotated[int, Field(ge=2)] | Literal["auto"] | None = None
    """Tokens that a block attends to, the token itself included, so that the cache holds no more; null: all tokens.
    ``auto`` finds the window whose cost is closest, for all blocks of the LLM or the given number of them. Either needs
    random weights, and an LLM of a type that has such a window."""
    keep: Literal["least-similar", "ends"] | None = None
    """Which blocks of the LLM are kept: those whose output is least similar to their input (arXiv 2403.03853), or the
    first and last ones. null: the least similar ones of a pretrained LLM, the ends where its weights are random."""
    taught: bool = True
    """Learn from ``graft.teacher`` as the graft does, if it names one."""
    config: dict[str, Any] = {}
    """Fields of the LLM's configuration to change, such as its dropout or the size of its initial weights."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate; null uses that of ``baseline`` or ``graft``."""
