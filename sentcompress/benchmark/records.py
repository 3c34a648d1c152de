"""What a benchmark finds, part by part: the pieces of ``results.json``. No torch."""

from __future__ import annotations

from typing import Any, Literal, get_args

from sentcompress.estimate.costs import DecodingCost
from sentcompress.provenance import Honesty, Record
from sentcompress.table import Figure

SCHEMA_VERSION = 1
Part = Literal["causality", "quality", "text", "reconstruct", "speed", "memory", "data", "segments"]
PARTS: tuple[Part, ...] = get_args(Part)
By = Literal["position", "length", "index"]
BY: tuple[By, ...] = get_args(By)


class Row(Record):
    """One line of a table."""

    part: Part
    system: str
    """What was measured."""
    figures: dict[str, Figure]
    note: str = ""
    honesty: Honesty


class Skipped(Record):
    """Something that was asked for and could not be measured."""

    part: str
    what: str
    reason: str


class CausalityCheck(Record):
    """One comparison of two runs of a model."""

    name: str
    kind: Literal["future", "equality"]
    """``future``: contents behind a point were changed, nothing before it may differ at all; ``equality``: two
    ways to compute the same, which may differ by rounding."""
    attention: str
    max_delta: float
    tolerance: float
    effect: float | None = None
    """How much the change moved what it may move; 0 would prove nothing."""
    passed: bool
    detail: str = ""


class CausalityReport(Record):
    """All checks of one model."""

    checks: list[CausalityCheck]

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> list[CausalityCheck]:
        return [check for check in self.checks if not check.passed]


class DocumentScore(Record):
    """One held-out document under one model."""

    document: int
    source: str
    bytes: int
    """Of everything after the first sentence: what is scored."""
    covered_bytes: int
    """Bytes of the pieces that were charged; equal to ``bytes``, or the scorer has refused."""
    nats: float
    targets: int
    """Tokens and end marks charged."""
    baseline_tokens: int
    """Tokens of the same text, cut nowhere, by the baseline's tokenizer."""


class Bucket(Record):
    """A part of what one system paid on all held-out documents; a breakdown's buckets add up to the whole."""

    label: str
    """Range of what it is broken down by; or ``end marks`` or ``stop decisions``, which stand for no bytes."""
    bytes: int
    nats: float
    """Of its bytes alone."""
    mark_nats: float = 0.0
    """End marks and decisions of its sentences, once more: they are counted in the buckets of those names."""


class ModelCounts(Record):
    """How large a model is, and what it was trained on: the abscissas of a scaling law."""

    parameters: int
    """All weights, shared ones once."""
    trainable_parameters: int | None
    """What learned in the model's last stage, adapters included; None when that is not known."""
    backbone_parameters: int
    """Weights of the LLM's blocks, without embedding tables: the same for the sentence model and its twin."""
    table_parameters: int
    """Weights of embedding tables that are only looked up, so that they cost no multiplication."""
    tokens_per_position: float
    """Tokens of text that one position of the backbone stands for; 1 for a token-level model."""
    training_tokens: dict[str, int]
    """By stage; a stage whose tokens are not known is left out."""


class QualityScore(Record):
    """One model on all held-out documents."""

    system: str
    bits_per_byte: float
    perplexity: float
    """exp(total nats / baseline tokens)."""
    nats: float
    bytes: int
    targets: int
    baseline_tokens: int
    context: str
    """What a prediction may look back on."""
    breakdown: dict[str, float] = {}
    """Nats by kind: tokens, end marks, stop decisions."""
    by: dict[By, list[Bucket]] = {}
    """Where they were paid; only what was asked for."""
    cost: DecodingCost | None = None
    """What it takes to write such text; None for what is no model."""
    counts: ModelCounts | None = None
    """None for the unigram model, and in files of versions that did not count."""
    documents: list[DocumentScore]


class ReconstructionReport(Record):
    """Free-running reconstruction of held-out sentences."""

    system: str
    sentences: int
    tokens: int
    token_accuracy: float
    exact_sentences: float
    teacher_forced_perplexity: float
    """The paper's number."""
    teacher_forced_exact: float
    """Sentences whose every token is the likeliest when the ones before it are given: flatters, for contrast."""
    extra: dict[str, float] = {}
    """Metric plugins, by ``name.figure``."""
    examples: list[tuple[str, str]] = []
    """Pairs of a sentence and what came back."""


class SpeedRun(Record):
    """One system at one batch size: medians over the repeats."""

    system: str
    batch_size: int
    prefill_tokens_per_second: float | None
    first_token_seconds: float
    output_tokens_per_second: float
    """New tokens after the first, over the time after the first."""
    total_seconds: float
    ratio: float | None
    """Median over the pairs of its output tokens/s and the backbone's measured beside it."""
    ratios: list[float] = []
    total_ratio: float | None = None
    """The same for the whole run, prefill included."""
    roofline_share: float | None = None
    """Seconds the bytes read per token take at the measured bandwidth, over the seconds measured."""
    fallback_rate: float | None = None
    """Tokens that took the full output head because no shortlist could be proved, over all tokens picked."""
    note: str = ""


class PartTime(Record):
    """Where a token's time goes in one system, at one batch size; the prefill is spread over the tokens written."""

    system: str
    batch_size: int
    part: str
    milliseconds_per_token: float
    """Of the time of a token of the whole batch."""
    share: float
    """Of the system's time; the shares of its parts sum to 1."""


class Throughput(Record):
    """Output speed of some of a run's processes, each with a device and prompts of its own."""

    system: str
    processes: int
    batch_size: int
    """Of each process."""
    tokens_per_second: float
    """Of all together, the prefill included; median of ``rates``."""
    rates: list[float]
    """Of each repeat."""
    efficiency: float
    """Over as many times what the first brings alone; median over the repeats, measured in turns."""


class SpeedReport(Record):
    """Speed beside the backbone's."""

    prompt_tokens: int
    new_tokens: int
    repeats: int
    trained: bool
    sentence_lengths: list[int]
    """The draw of forced sentence lengths."""
    bandwidth_bytes_per_second: float
    head: str = "exact"
    """Output head the sentence model picked tokens with."""
    quantized: list[str] = []
    """Parts of the sentence model with weights in 8 bits."""
    runs: list[SpeedRun]
    output_ratio: float | None = None
    """The sentence model's output tokens/s over the backbone's, at the smallest batch."""
    prefill_ratio: float | None = None
    """The same for the prompt's tokens."""
    fallback_rate: float | None = None
    """Of the output head, at the smallest batch."""
    roofline_share: float | None = None
    """Of the sentence model, at batch 1."""
    profile: list[PartTime] = []
    throughput: list[Throughput] = []
    """By number of devices, where several processes measured."""
    skipped: list[Skipped] = []
    break_even: dict[str, Figure] = {}
    advice: list[str] = []
    """The break-even in words, and when something else is the better choice."""


class MemoryReport(Record):
    """Cache and peak memory of one system."""

    system: str
    weight_bytes: int
    cache_bytes_per_token: float
    """Exact: bytes of the cache's tensors over the tokens of text they stand for."""
    cache_bytes_per_position: int
    transient_bytes: int
    """Held only while a sentence is written (the decoder's own cache)."""
    peak_slope_bytes_per_token: float
    """Straight line through allocated memory against tokens generated: the paper's way."""
    series: list[tuple[int, int]]
    """Tokens of text, and bytes allocated beyond the weights at the most since the point before."""
    budget_bytes: int
    longest_context_tokens: int
    """Tokens of text whose cache fits in the budget."""
    position_limit_tokens: int
    """Tokens of text the backbone has positions for."""


class DataReport(Record):
    """The corpus the recipe names."""

    summary: dict[str, Any]
    heldout_documents: int
    mean_sentence_tokens: float
    """Of the held-out documents."""
    histogram: list[tuple[int, int]]
    """Tokens of a held-out sentence, and how many there are."""
    padding: dict[str, float]
    """Share of padding a sampler's batches have."""
    cutting_overhead: float
    """Tokens of the sentences over tokens of the uncut text, less 1, on the held-out documents."""


class Curve(Record):
    """A figure of a stage against its steps."""

    stage: str
    name: str
    points: list[tuple[int, float]]


class Sample(Record):
    """What a model wrote after a prompt."""

    system: str
    prompt: str
    text: str
    finish_reason: str


class Interval(Record):
    """A figure with its 95% bootstrap interval over prompts; no interval where one prompt is all there is."""

    value: float
    low: float | None = None
    high: float | None = None


class TextScore(Record):
    """What one system wrote after the prompts."""

    system: str
    texts: list[str]
    """One a prompt."""
    measures: dict[str, Interval]
    differences: dict[str, Interval] = {}
    """To the equal-data baseline's, prompt by prompt; empty for itself and where there is none."""


class TextReport(Record):
    """What the systems wrote after the same prompts."""

    prompts: list[str]
    prompts_asked: int
    prompt_tokens: float
    """Mean, by the baseline's tokenizer, as all tokens here."""
    new_tokens: int
    """Of each text."""
    temperature: float
    top_p: float
    judge: str | None
    judge_is_backbone: bool
    """The LLM the run started from is no outsider."""
    scores: list[TextScore]


class Results(Record):
    """Everything measured on one folder."""

    schema_version: int = SCHEMA_VERSION
    title: str
    created: str
    """UTC."""
    rows: list[Row] = []
    skipped: list[Skipped] = []
    causality: CausalityReport | None = None
    quality: list[QualityScore] = []
    text: TextReport | None = None
    reconstruction: ReconstructionReport | None = None
    speed: SpeedReport | None = None
    memory: list[MemoryReport] = []
    data: DataReport | None = None
    curves: list[Curve] = []
    samples: list[Sample] = []
    recipe: dict[str, Any] = {}
    """The resolved recipe."""
    models: dict[str, str] = {}
    """Digests of the weights that were measured, by stage."""

    def measured(self) -> list[Part]:
        """Parts that have rows."""
        present = {row.part for row in self.rows}
        return [part for part in PARTS if part in present]
