"""The sections of a recipe but for the trainings: every field, its type, default, bounds and meaning."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    embed_init_std: float | None = Field(default=None, gt=0)
    """With ``init: random``: standard deviation of the token embeddings' initial weights; null: the LLM's
    configuration decides, as for all its weights."""

    @model_validator(mode="after")
    def _pretrained_weights_are_what_they_are(self) -> BackboneSpec:
        if self.config and self.init != "random":
            raise ValueError(
                "config changes the shape of the LLM, so its weights no longer fit: use init: random"
            )
        if self.embed_init_std and self.init != "random":
            raise ValueError(
                "embed_init_std is for an LLM with random weights: set it to null, or use init: random"
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
    init_std: float | None = Field(default=None, gt=0)
    """Standard deviation of the matrices' initial random weights; null: the inverse square root of their inputs. From
    nothing, at width 192, 0.02 is better (docs/results/equal-cost.md)."""
    embed_init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the embeddings' initial random weights."""
    embedding_multiplier: float = Field(default=1.0, gt=0)
    """Factor on the token embeddings that the decoder reads. Where they are small beside what attention adds, the
    decoder hardly sees the last token. From nothing, at width 192, 4 is better. A factor also helped with the
    embeddings of ``opt-tiny``, but not with the larger ones of SmolLM2 (docs/research-log.md)."""
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
        for option in ("decoder_context", "unpack_size", "embedding_multiplier"):
            if self.init == "backbone" and getattr(self, option) != type(self).model_fields[option].default:
                raise ValueError(
                    f"{option} does not work with the LLM's blocks: use init: embeddings or random"
                )
        return self


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
