"""The sections of a recipe: every field, its type, default, bounds and meaning."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sentcompress.recipe.choices import CacheKind, HeadKind

Precision = Literal["auto", "fp32", "bf16", "fp16"]


class Section(BaseModel):
    """Base of all parts of a recipe: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ComponentSpec(Section):
    """A plugin's component by name, with its options."""

    name: str
    """Registered name (``sentcompress plugins`` lists them)."""
    options: dict[str, Any] = {}
    """Options of the component, checked by its own ``Options`` class."""


class BackboneSpec(Section):
    """The decoder LLM."""

    name: str | None = None
    """Adapter; null finds it by the alias or the model's type, and takes ``auto`` where none is made for it."""
    model: str = "opt-tiny"
    """Alias, hub name, local folder or GGUF file of the LLM."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    options: dict[str, Any] = {}
    """Options of the adapter, checked by its own ``Options`` class."""
    init: Literal["pretrained", "random"] = "pretrained"
    """``random`` keeps only the configuration and tokenizer: to learn from nothing, or for speed and memory work."""
    config: dict[str, Any] = {}
    """With ``init: random``: fields of the LLM's configuration to change, such as hidden_size: another shape of it."""

    @model_validator(mode="after")
    def _weights_fit_their_own_shape_only(self) -> BackboneSpec:
        if self.config and self.init != "random":
            raise ValueError("config changes the LLM's shape, which its weights do not fit: use init: random")
        return self


class VAESpec(Section):
    """Shape of the sentence encoder and decoder (paper section 3.1)."""

    encoder_layers: int = Field(default=1, ge=0)
    """Self-attention blocks of the sentence encoder; 0 leaves the fusion of embeddings with their positions."""
    decoder_layers: int = Field(default=1, ge=1)
    """Blocks of the sentence decoder."""
    num_heads: int | None = Field(default=None, ge=1)
    """Attention heads; null takes the backbone's."""
    feedforward_multiple: float = Field(default=2.0, gt=0)
    """Feed-forward width as a multiple of hidden (the paper: 2)."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout in the blocks (the paper: 0.1)."""
    conditioning: Literal["cross-attention", "add", "prefix"] = "cross-attention"
    """How the decoder is told what to write: cross-attention (the paper), an added vector, or a prefix."""
    unpack_size: int = Field(default=0, ge=0, le=1024)
    """Numbers of the latents each position of the decoder is given directly, by a matrix of its own; 0 gives none. Good
    for giving sentences back, bad for predicting them (docs/research-log.md)."""
    decoder_context: int = Field(default=0, ge=0, le=4096)
    """Positions before the sentence that the decoder sees too, across sentence borders; 0 is the paper's."""
    tie_embeddings: bool = False
    """One matrix for encoder embedding, decoder embedding and output head (the paper: three)."""
    init: Literal["random", "embeddings", "backbone"] = "random"
    """``embeddings`` starts the token embeddings and output head from the backbone's; ``backbone`` also makes encoder
    and decoder of the backbone's own first and last blocks (with ``conditioning: prefix``)."""
    freeze: Literal["nothing", "embeddings"] = "nothing"
    """``embeddings`` keeps the token embeddings and output head as they begin, in all stages."""

    @model_validator(mode="after")
    def _blocks_of_the_backbone_take_a_prefix(self) -> VAESpec:
        if self.init == "backbone" and self.conditioning != "prefix":
            raise ValueError(
                "init: backbone needs conditioning: prefix, all that the LLM's own blocks can be told by"
            )
        if self.init == "backbone" and not self.encoder_layers:
            raise ValueError(
                "init: backbone makes the encoder of the LLM's first blocks: encoder_layers is 0"
            )
        for option in ("decoder_context", "unpack_size"):
            if self.init == "backbone" and getattr(self, option):
                raise ValueError(f"{option} goes with blocks of our own: use init: embeddings or random")
        return self


class TrainingSettings(Section):
    """What every training stage has."""

    steps: int = Field(default=1000, ge=1)
    """Optimizer steps."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Linear warm-up; null takes 5% of the steps. Then cosine to ``final_learning_rate_share``."""
    final_learning_rate_share: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end as a share of the peak."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW weight decay (the paper: 0.01)."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradient norm is clipped to this (the paper: 1)."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Micro-batches a step."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of averaged weights, which are then what is evaluated and saved; null turns it off."""
    spike: float | None = Field(default=None, gt=1)
    """A loss over this multiple of the median of the last 50 steps is trouble (and at least half a nat over it)."""
    on_trouble: Literal["stop", "skip", "rollback"] = "stop"
    """When a loss or gradient is no number, or a spike: end the run, leave the step out, or go back to the newest
    checkpoint and on with the data after the step (at most 25 steps in a row, or 5 times between two checkpoints)."""
    precision: Precision = "auto"
    """``auto`` measures fp32 against bf16 once on this machine and says what it chose."""
    gradient_checkpointing: bool = False
    """Recompute the backbone's activations in the backward pass: less memory, more time."""
    compile: bool = False
    """torch.compile the model."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between held-out figures; null evaluates at the end only."""
    eval_batches: int = Field(default=8, ge=1)
    """Held-out batches an evaluation."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; null saves at the end and on Ctrl-C only."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints to keep."""
    keep_best: bool = False
    """Keep the model with the best held-out figure so far in ``best/`` (looked at every ``eval_every`` steps)."""
    background_saves: bool = True
    """Go on training while a checkpoint is written, from a copy of weights, moments and average in the computer's
    memory; false takes no copy and waits."""
    distributed: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: each holds the whole model, or a part of its weights, gradients and moments."""
    tensorboard: bool = False
    """Write TensorBoard events beside metrics.jsonl."""
    wandb: bool = False
    """Log to Weights & Biases too (project ``sentcompress``; ``WANDB_MODE=offline`` needs no account)."""

    @model_validator(mode="after")
    def _can_go_back(self) -> Self:
        if self.on_trouble == "rollback" and not self.save_every:
            raise ValueError("on_trouble: rollback goes back to a checkpoint: set save_every")
        return self


class PretrainSettings(TrainingSettings):
    """Token-level pretraining of a small backbone from nothing."""

    config: dict[str, Any] = {}
    """Fields of the transformers configuration of ``backbone.name``, such as hidden_size."""
    vocab_size: int = Field(default=4096, ge=300)
    """Size of the byte-level BPE trained on the training documents."""
    sequence_length: int = Field(default=256, ge=8)
    """Tokens a sequence."""
    sequences_per_batch: int = Field(default=16, ge=1)
    """Sequences a micro-batch."""


class TrainVAESettings(TrainingSettings):
    """Self-supervised training of the SentenceVAE (paper section 3.1)."""

    steps: int = Field(default=1000, ge=0)
    """Optimizer steps; 0 leaves the SentenceVAE as it begins, for a graft that learns all of it."""
    sentences_per_batch: int = Field(default=128, ge=1)
    """Sentences a micro-batch (the paper: 128)."""
    loss: Literal["focal", "cross-entropy"] = "focal"
    """The paper's focal loss, or plain cross-entropy."""
    focal_gamma: float = Field(default=2.0, ge=0)
    """Focusing parameter (the paper: 2)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of probability spread over the vocabulary."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of a KL term towards N(0, 1); 0 is the paper's deterministic model."""
    kl_floor: float = Field(default=0.0, ge=0)
    """Nats a latent dimension below which the KL term does not push (free bits)."""
    latent_noise: float = Field(default=0.0, ge=0)
    """Standard deviation of noise added to the latents in training."""


class LoraSettings(Section):
    """Low-rank adapters for ``tune: lora`` (through peft)."""

    rank: int = Field(default=16, ge=1)
    """Rank of the adapters."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale of the adapters."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on their input."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Linear modules of the backbone to adapt."""


class TuneSettings(Section):
    """What of the LLM learns."""

    tune: Literal["full", "lora", "frozen", "last-n"] = "full"
    """All of it, low-rank adapters, nothing, or its last blocks."""
    last_n: int = Field(default=2, ge=1)
    """Blocks that learn with ``tune: last-n``."""
    lora: LoraSettings = LoraSettings()
    """Adapters for ``tune: lora``."""


class GraftSettings(TrainingSettings, TuneSettings):
    """Fine-tuning of encoder, backbone and decoder on text (paper section 3.2)."""

    vae: str | None = None
    """Folder of a trained SentenceVAE; null takes the one of this run."""
    passages_per_batch: int = Field(default=8, ge=1)
    """Passages a micro-batch (the paper: 1)."""
    max_sentences: int = Field(default=64, ge=2)
    """Sentences a passage (the paper: 64); longer documents become consecutive passages."""
    overlap_sentences: int = Field(default=1, ge=1)
    """Sentences a passage carries over from the one before it as context, not scored again; with none, a
    passage's first sentence could not be predicted."""
    loss: Literal["focal", "cross-entropy"] = "focal"
    """Token and stop loss."""
    focal_gamma: float = Field(default=2.0, ge=0)
    """Focusing parameter (the paper: 2)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of probability spread over the vocabulary."""
    match_scale: bool = True
    """Scale the latents to the measured size of the backbone's token embeddings; false leaves them alone."""
    start_latent: bool = True
    """A learned vector before each document, which predicts its first sentence; the paper has none."""
    stop_weight: float = Field(default=1.0, ge=0)
    """Weight of the stop decisions' loss."""
    teacher: str | None = None
    """Learn also from what a token-level LLM expects of the same text: ``backbone`` (as it came), ``baseline`` (the
    twin, which is then trained first), or the folder of a causal LM with the same tokenizer."""
    teacher_share: float = Field(default=0.5, gt=0, le=1)
    """Of the token loss, against the teacher's distribution; the rest is against the text."""
    shortlist_rank: int = Field(default=0, ge=0)
    """Learn also to predict which tokens a sentence may hold, by scores of this rank, for ``--head shortlist``; 0 does
    not. No gradient of it reaches the rest of the model; they share the gradient clipping."""

    @model_validator(mode="after")
    def _one_softening(self) -> GraftSettings:
        if self.teacher and self.label_smoothing:
            raise ValueError("label_smoothing: a teacher takes its place; set it to 0")
        return self


class BaselineSettings(TuneSettings):
    """The equal-data twin: the same backbone, token by token, on the graft's passages for as many steps.

    All of it learns unless it is told otherwise, whatever the graft does: the stronger twin is the honest one.
    """

    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate; null takes the graft's."""
    enabled: bool = True
    """False leaves the twin out; reports then say that there is none."""


class BenchSettings(Section):
    """What ``bench all`` measures."""

    metrics: list[
        Literal["causality", "quality", "text", "reconstruct", "speed", "memory", "data", "segments"]
    ] = [
        "causality",
        "quality",
        "reconstruct",
        "speed",
        "memory",
        "data",
    ]
    """Parts of the benchmark."""
    by: list[Literal["position", "length", "index"]] = []
    """Break quality down by token position in the sentence, sentence length, sentence index in the document."""
    extra_metrics: list[ComponentSpec] = []
    """Metric plugins run on the reconstructions."""
    max_documents: int | None = Field(default=None, ge=1)
    """Held-out documents scored; null scores all."""
    max_bytes_per_document: int | None = Field(default=None, ge=200)
    """Score the beginning of each document only, cut at a sentence; null scores all of it."""
    context_sentences: int | None = Field(default=None, ge=2)
    """Sentences a scored window of the sentence model holds; null takes ``graft.max_sentences``."""
    context_tokens: int | None = Field(default=None, ge=2)
    """Tokens a scored window of a token-level model holds; null takes all its positions."""
    max_sentences: int = Field(default=500, ge=1)
    """Held-out sentences reconstructed."""
    repeats: int = Field(default=5, ge=1)
    """Alternating speed runs; medians are reported."""
    prompt_tokens: int = Field(default=128, ge=1)
    """Prompt length of the speed runs; ``text`` takes whole sentences of as many tokens or a little more."""
    new_tokens: int = Field(default=128, ge=1)
    """Tokens generated a speed run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where everything is measured; ``auto`` takes a GPU where there is one."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Weights of both models in the speed and memory runs; quality is measured in fp32, but for ``device_map``."""
    device_map: Literal["none", "auto"] = "none"
    """`auto` spreads the LLM's blocks over all GPUs, then the computer's memory, then its disk, for models that one
    device does not hold; everything is measured in ``dtype`` then."""
    max_memory: dict[int | Literal["cpu"], int | str] | None = None
    """Weights that ``device_map`` may put on each device, such as `{0: 20GiB, cpu: 60GiB}`: half of it for the sentence
    model, half for what it is compared with; null takes nine tenths of what is free."""
    head: HeadKind = "auto"
    """How the sentence model finds the likeliest token in the speed runs; all but ``shortlist`` write the same."""
    shortlist_tokens: int = Field(default=1024, ge=2)
    """Tokens each sentence is written with where a ``shortlist`` is predicted for it."""
    quantize: list[Literal["encoder", "backbone", "decoder"]] = []
    """Parts of the sentence model whose weights are rounded to 8 bits (on a CPU) before anything is measured."""
    cache: CacheKind = "full"
    """How speed and memory runs keep the backbone's keys and values in the sentence model; `int8`: in 8 bits;
    `offloaded`: in the computer's memory, for a model on a GPU."""
    compile: bool = False
    """torch.compile the sentence model's decoder in the speed runs: on a GPU its step is a CUDA graph then."""
    break_even: bool = True
    """Measure also from which sentence and text length on the sentence model is faster, at batch 1."""
    profile: bool = False
    """Measure where a token's time goes, in both models."""
    batch_sizes: list[int] = Field(default=[1, 8], min_length=1)
    """Batch sizes of the speed runs."""
    largest_batch: bool = False
    """Also time each system at the largest batch whose cache fits into `memory_budget_bytes`."""
    memory_budget_bytes: int = Field(default=2**30, ge=1)
    """Bytes of cache for which the longest context is computed, and the largest batch timed."""
    samples: int = Field(default=3, ge=0)
    """Generated samples in the report."""
    text_prompts: int = Field(default=32, ge=1)
    """Held-out documents whose beginnings are continued for ``text``."""
    text_new_tokens: int = Field(default=128, ge=1)
    """Tokens each system writes after a prompt for ``text``."""
    text_temperature: float = Field(default=1.0, gt=0)
    """Divides the logits when ``text`` is drawn."""
    text_top_p: float = Field(default=0.95, gt=0, le=1)
    """``text`` is drawn from the likeliest tokens of this probability."""
    text_judge: str | None = Field(default=None, min_length=1)
    """LLM that scores ``text``: an alias, hub name, folder or GGUF file; null has none."""
