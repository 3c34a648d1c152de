"""The sections of a recipe: every field, its type, default, bounds and meaning."""

from __future__ import annotations

import pkgutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from sentcompress.contracts import UserInput
from sentcompress.errors import InputError
from sentcompress.files import expand_home

Precision = Literal["auto", "fp32", "bf16", "fp16"]
HeadKind = Literal["auto", "exact", "shortlist-exact", "shortlist"]
"""How the output head finds the next token (:mod:`sentcompress.generation.output_head`)."""
CacheKind = Literal["full", "int8", "offloaded", "offloaded-int8"]
"""How the backbone's keys and values are kept while generating (:mod:`sentcompress.generation.backbone_cache`)."""

MEASUREMENTS = Path(__file__).parent.parent / "benchmark" / "measurements"


def measurement_names() -> list[str]:
    """Names of the measurements, in alphabetical order: one for each file of ``benchmark/measurements``.

    Only file names are read. A recipe is checked against them without importing a measurement.
    """
    return sorted(module.name for module in pkgutil.iter_modules([str(MEASUREMENTS)]))


if TYPE_CHECKING:
    MeasurementName = str
else:
    MeasurementName = Literal[tuple(measurement_names())]


def _expanded(path: str) -> str:
    try:
        return expand_home(path)
    except InputError as error:
        raise ValueError(error.message.partition(": ")[2]) from None


UserPath = Annotated[str, AfterValidator(_expanded)]
"""A path, or another name in its place, such as an alias: ``~`` at its beginning is the home folder."""


class Section(UserInput):
    """Base of all sections of a recipe."""


class ComponentSpec(Section):
    """A component of a plugin, by name, with its options."""

    name: str
    """Registered name; ``sentcompress plugins`` lists them."""
    options: dict[str, Any] = {}
    """Options of the component, checked by its own ``Options`` class."""


NamedComponent = Annotated[
    ComponentSpec, BeforeValidator(lambda raw: {"name": raw} if isinstance(raw, str) else raw)
]
"""A component whose name alone will do."""


class BackboneSpec(Section):
    """The decoder LLM."""

    name: str | None = None
    """Adapter; null picks the one for this alias or model type, or ``auto`` if there is none."""
    model: UserPath = "opt-tiny"
    """Alias, hub name, local folder or GGUF file of the LLM."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    options: dict[str, Any] = {}
    """Options of the adapter, checked by its own ``Options`` class."""
    init: Literal["pretrained", "random"] = "pretrained"
    """``random`` uses only configuration and tokenizer: to train from scratch, or to measure speed and memory."""
    config: dict[str, Any] = {}
    """With ``init: random``: fields of the LLM's configuration to change, such as hidden_size."""

    @model_validator(mode="after")
    def _weights_fit_their_own_shape_only(self) -> BackboneSpec:
        if self.config and self.init != "random":
            raise ValueError(
                "config changes the shape of the LLM, so its weights no longer fit: use init: random"
            )
        return self


class VAESpec(Section):
    """Shape of the sentence encoder and decoder (paper section 3.1)."""

    encoder_layers: int = Field(default=1, ge=0)
    """Self-attention blocks of the sentence encoder; with 0, the fusion reads token and position embeddings."""
    decoder_layers: int = Field(default=1, ge=1)
    """Blocks of the sentence decoder."""
    num_heads: int | None = Field(default=None, ge=1)
    """Attention heads; null uses as many as the backbone."""
    feedforward_multiple: float = Field(default=2.0, gt=0)
    """Feed-forward width as a multiple of the hidden size (the paper: 2)."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout in the blocks (the paper: 0.1)."""
    conditioning: Literal["cross-attention", "add", "prefix"] = "cross-attention"
    """How the decoder is conditioned on the latents: cross-attention (the paper), an added vector, or a prefix."""
    unpack_size: int = Field(default=0, ge=0, le=1024)
    """Latent features that each decoder position gets directly, through a matrix of its own; 0 turns this off. It helps
    reconstruction and hurts prediction (docs/research-log.md)."""
    decoder_context: int = Field(default=0, ge=0, le=4096)
    """Token positions before the sentence that the decoder also sees, across sentence borders (the paper: 0)."""
    tie_embeddings: bool = False
    """Share one matrix between encoder embedding, decoder embedding and output head (the paper: three matrices)."""
    init: Literal["random", "embeddings", "backbone"] = "random"
    """``embeddings`` copies token embeddings and output head from the backbone; ``backbone`` also builds encoder and
    decoder from copies of the backbone's first and last blocks (with ``conditioning: prefix``)."""
    freeze: Literal["nothing", "embeddings"] = "nothing"
    """``embeddings`` keeps the token embeddings and output head fixed in all stages."""

    @model_validator(mode="after")
    def _blocks_of_the_backbone_take_a_prefix(self) -> VAESpec:
        if self.init == "backbone" and self.conditioning != "prefix":
            raise ValueError(
                "init: backbone needs conditioning: prefix, since the LLM's blocks have no cross-attention"
            )
        if self.init == "backbone" and not self.encoder_layers:
            raise ValueError(
                "init: backbone builds the encoder from the LLM's first blocks: encoder_layers must be at least 1"
            )
        for option in ("decoder_context", "unpack_size"):
            if self.init == "backbone" and getattr(self, option):
                raise ValueError(
                    f"{option} does not work with the LLM's blocks: use init: embeddings or random"
                )
        return self


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
    """``auto`` times fp32 against bf16 once on this machine and reports its choice."""
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


class PassageSettings(TrainingSettings):
    """Training on passages: consecutive sentences of a document."""

    passages_per_batch: int = Field(default=8, ge=1)
    """Passages per micro-batch (the paper: 1)."""
    max_sentences: int = Field(default=64, ge=2)
    """Sentences per passage (the paper: 64); longer documents become consecutive passages."""
    overlap_sentences: int = Field(default=1, ge=1)
    """Sentences that a passage repeats from the one before it as context, without scoring them again. Without one, the
    first sentence of a passage could not be predicted."""


class GraftSettings(PassageSettings, TuneSettings):
    """Fine-tuning of encoder, backbone and decoder on text (paper section 3.2)."""

    vae: UserPath | None = Field(default=None, json_schema_extra={"path": True})
    """Folder of a trained SentenceVAE; null uses the one from this run."""
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


class MemorySettings(PassageSettings, TuneSettings):
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
    tune: Literal["full", "lora", "frozen", "last-n"] = "lora"
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


class BaselineSettings(TuneSettings):
    """The baseline: the same LLM, fine-tuned token by token on the same passages for the same number of steps.

    They are the graft's, or the memory's if the recipe has a section ``memory``. All its weights are trained by
    default, whatever they train: the fair comparison is with the strongest baseline.
    """

    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate; null uses that of ``graft`` or ``memory``."""
    enabled: bool = True
    """Train a baseline; without one, reports say so."""


class DecodingOptions(Section):
    """How a SentenceLM computes its tokens: options of ``generate`` and of the benchmark alike."""

    head: HeadKind = "auto"
    """How to find the most likely token: ``exact`` computes every logit; ``shortlist-exact`` reads a quarter of the
    head's bytes and proves that the token is the same (on a CPU, without sampling); ``auto`` takes the faster of these
    two; ``shortlist`` considers only the tokens predicted for each sentence, so the text may differ."""
    shortlist_tokens: int = Field(default=1024, ge=2)
    """Number of tokens predicted for each sentence by ``shortlist``."""
    cache: CacheKind = "full"
    """How to store the backbone's keys and values: ``full`` as they are; ``int8`` in 8 bits, about a quarter of the
    memory; ``offloaded`` and ``offloaded-int8`` in CPU memory, with one block at a time on the GPU."""
    compile: bool = False
    """Compile the sentence decoder with torch.compile: a CUDA graph on a GPU, fused loops on a CPU (faster for small
    models only). The first sentence waits for compilation, and rounding may differ."""

    def decoding(self) -> dict[str, Any]:
        """These options alone, without the fields of a subclass."""
        return {name: getattr(self, name) for name in DecodingOptions.model_fields}


class BenchSettings(DecodingOptions):
    """What ``bench all`` measures. The decoding options apply to the sentence model in speed and memory runs."""

    metrics: list[MeasurementName] = ["causality", "quality", "reconstruct", "speed", "memory", "data"]
    """Measurements to run."""
    by: list[Literal["position", "length", "index", "bytes"]] = []
    """Break quality down by token position in the sentence, sentence length, sentence index in the document, or bytes
    of the document before."""
    extra_metrics: list[ComponentSpec] = []
    """Metric plugins to run on the reconstructions."""
    max_documents: int | None = Field(default=None, ge=1)
    """Held-out documents to score; null scores all."""
    max_bytes_per_document: int | None = Field(default=None, ge=200)
    """Score only the beginning of each document, up to the end of a sentence; null scores all of it."""
    context_sentences: int | None = Field(default=None, ge=2)
    """Sentences per scored window of the sentence model; null uses ``graft.max_sentences``."""
    context_tokens: int | None = Field(default=None, ge=2)
    """Tokens per scored window of a token-level model; null uses all its positions."""
    max_sentences: int = Field(default=500, ge=1)
    """Held-out sentences to reconstruct."""
    repeats: int = Field(default=5, ge=1)
    """Speed runs of each system, alternating; medians are reported."""
    prompt_tokens: int = Field(default=128, ge=1)
    """Prompt length of the speed runs; ``text`` uses whole sentences, so its prompts may be a little longer."""
    new_tokens: int = Field(default=128, ge=1)
    """Tokens to generate in each speed run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to measure on; ``auto`` uses a GPU if there is one."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Data type of the weights in speed and memory runs; quality is measured in fp32, except with ``device_map``."""
    device_map: Literal["none", "auto"] = "none"
    """`auto` distributes the LLM's blocks over all GPUs, then CPU memory, then disk, for models too large for one
    device; everything is then measured in ``dtype``."""
    max_memory: dict[int | Literal["cpu"], int | str] | None = None
    """Weights that ``device_map`` may put on each device, such as `{0: 20GiB, cpu: 60GiB}`: half for the sentence
    model, half for the model it is compared with; null uses nine tenths of the free memory."""
    quantize: list[Literal["encoder", "backbone", "decoder"]] = []
    """Modules of the sentence model to quantize to 8 bits (on a CPU) before anything is measured."""
    break_even: bool = True
    """Also measure the sentence and text length above which the sentence model is faster, at batch size 1."""
    profile: bool = False
    """Profile the time per token in both models."""
    batch_sizes: list[int] = Field(default=[1, 8], min_length=1)
    """Batch sizes of the speed runs."""
    largest_batch: bool = False
    """Also time each system at the largest batch size whose cache fits into `memory_budget_bytes`."""
    memory_budget_bytes: int = Field(default=2**30, ge=1)
    """Cache size in bytes for which the longest context is computed and the largest batch is timed."""
    samples: int = Field(default=3, ge=0)
    """Generated samples in the report."""
    text_prompts: int = Field(default=32, ge=1)
    """Held-out documents whose beginnings are the prompts of ``text``."""
    text_new_tokens: int = Field(default=128, ge=1)
    """Tokens that each system generates per prompt of ``text``."""
    text_temperature: float = Field(default=1.0, ge=1e-6)
    """Sampling temperature of ``text``."""
    text_top_p: float = Field(default=0.95, gt=0, le=1)
    """Nucleus sampling of ``text``: sample from the most likely tokens that add up to this probability."""
    text_judge: UserPath | None = Field(default=None, min_length=1)
    """LLM that scores ``text``: an alias, hub name, folder or GGUF file; null uses none."""
    memories: list[NamedComponent] = Field(
        default=["window", {"name": "window", "options": {"recent_sentences": 40}}, "window+recall"],
        validate_default=True,
    )
    """Sentence memories to measure: names joined by `+`, or `{name: window+recall, options: {recall: 8}}` with options
    of `SentenceMemory`."""
    text_lengths: list[Annotated[int, Field(ge=100)]] = Field(default=[1000, 4000], min_length=1)
    """Tokens of the texts in which `recall` hides its needles and after which `memory_speed` writes."""
    recall_tasks: int = Field(default=5, ge=1)
    """Texts of each kind and length in `recall`, with needles at depths spread evenly from beginning to end."""
