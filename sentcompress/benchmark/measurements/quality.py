"""Bits per byte and perplexity, and where they are lost. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sentcompress.benchmark.breakdown import BY, Bucket, By, by_table, chosen, draw_by
from sentcompress.benchmark.drawing import bars
from sentcompress.benchmark.measurement import (
    BASELINES,
    OPPONENT_SYSTEM,
    SENTENCE_MODEL,
    WITHOUT_LLM,
    Flag,
    Measurement,
    Section,
)
from sentcompress.benchmark.measurements.causality import Causality, require_causal
from sentcompress.benchmark.paper import sllm_note
from sentcompress.provenance import Record
from sentcompress.recipe.training_sections import EQUAL_COST
from sentcompress.table import Figure, Table, byte_size, number
from sentcompress.training.run_folder import OPPONENT

if TYPE_CHECKING:
    from sentcompress.benchmark.results import Results
    from sentcompress.benchmark.runner import Bench

UNTRAINED = "sentence model, untrained"
IDLE_LLM = 1.005
"""Where the LLM saves a smaller share of the bits, the table says so."""
NOTES = {
    UNTRAINED: "weights drawn from the seed; ",
    WITHOUT_LLM: "the LLM's states replaced by their mean; ",
}
BY_FLAG = Flag(
    "--by",
    "by",
    "Break quality down by position, length, index or bytes; comma-separated.",
    settings=lambda words: {"by": chosen(words)},
    type=list[str],
    metavar="NAMES",
    in_all=True,
    recorded=False,
)


class DocumentScore(Record):
    """One held-out document under one model."""

    document: int
    source: str
    bytes: int
    """Of everything after the first sentence: what is scored."""
    covered_bytes: int
    """Bytes of the pieces that were scored; equal to ``bytes``, or the scorer has refused."""
    nats: float
    targets: int
    """Tokens and end marks scored."""
    baseline_tokens: int
    """Tokens of the same text, cut nowhere, by the baseline's tokenizer."""


class ModelCounts(Record):
    """How large a model is, and what it was trained on: the abscissas of a scaling law."""

    parameters: int
    """All weights, shared ones once."""
    trainable_parameters: int | None
    """What learned in the model's last stage, adapters included; None when that is not known."""
    backbone_parameters: int
    """Weights of the LLM's blocks (of a split LLM: its middle blocks), without embedding tables: the same for the
    sentence model and its baseline. An opponent has fewer."""
    table_parameters: int
    """Weights of embedding tables that are only looked up, so that they cost no multiplication."""
    tokens_per_position: float
    """Tokens of text that one position of the backbone stands for; 1 for a token-level model."""
    training_tokens: dict[str, int]
    """By stage; a stage whose tokens are not known is left out."""


class DecodingCost(Record):
    """Computed from shapes: the cost of one more token of text at batch 1, in the middle of a document."""

    flops: float
    """Floating-point operations."""
    bytes: float
    """Of weights and caches that have to be read."""
    text_tokens: float
    """Tokens of the text before it."""
    sentence_tokens: float
    """Mean length of a sentence."""


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
    """What a prediction may depend on."""
    breakdown: dict[str, float] = {}
    """Nats by kind: tokens, end marks, stop decisions."""
    by: dict[By, list[Bucket]] = {}
    """Where they were lost; only what was asked for."""
    cost: DecodingCost | None = None
    """Cost of writing such text; None for the unigram frequencies."""
    cost_share: float | None = None
    """An opponent's cost over the sentence model's, by the kind of cost that was to be equal."""
    counts: ModelCounts | None = None
    """None for the unigram frequencies, and in files of versions that did not count."""
    documents: list[DocumentScore]

    def figures(self) -> dict[str, Figure]:
        """The score as a row."""
        figures: dict[str, Figure] = {
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "nats": self.nats,
            "bytes": self.bytes,
            "baseline_tokens": self.baseline_tokens,
            "targets": self.targets,
        }
        if self.cost:
            figures["decoding_flops_per_token"] = self.cost.flops
            figures["decoding_bytes_per_token"] = self.cost.bytes
        for kind, nats in self.breakdown.items():
            figures[f"bits_per_byte_{kind.replace(' ', '_')}"] = nats / math.log(2) / self.bytes
        return figures


class Quality(Measurement[list[QualityScore]]):
    """Bits per byte and perplexity on held-out documents.

    Refuses a model that sees the future, and a scorer that cannot prove it scored every byte once. --by shows where
    the loss is: by position of the token in its sentence, by the sentence's length, by its index in the document, or by
    the bytes of the document before.
    """

    title = "Quality on held-out documents"
    order = 20
    requires = (Causality,)
    distributed = True
    headline = True
    on_cards = True
    compared = ("bits_per_byte", "perplexity", "bytes")
    flags = (BY_FLAG,)
    examples = (
        "sentcompress bench quality out/quickstart",
        "sentcompress bench quality out/quickstart --by position,length,index",
    )

    def measure(self, bench: Bench) -> list[QualityScore]:
        from sentcompress.benchmark import scoring
        from sentcompress.benchmark.breakdown import Breakdown
        from sentcompress.benchmark.heldout_text import heldout_documents
        from sentcompress.benchmark.model_counts import model_counts
        from sentcompress.estimate.equal_cost import cost_share, shape_note
        from sentcompress.estimate.roofline import decoding_cost
        from sentcompress.generation.shortlist_head import make_shortlist_head
        from sentcompress.modeling.sentence_lm import SentenceLM
        from sentcompress.modeling.split import split_of
        from sentcompress.text.lossless_tokenizer import lossless

        models, settings = bench.models, bench.settings
        model = models.grafted
        causality = bench.report(Causality)
        documents = heldout_documents(models.corpus, settings)
        tokenizer = lossless(models.tokenizer)
        breakdown = Breakdown(settings.by, documents, tokenizer) if settings.by else None
        by_sentences: Callable[..., QualityScore] = partial(
            scoring.score_sentence_model,
            documents=documents,
            tokenizer=tokenizer,
            causality=causality,
            # Longer passages than it was trained on would measure something else.
            context_sentences=settings.context_sentences or bench.recipe.graft.max_sentences,
            breakdown=breakdown,
        )
        by_tokens: Callable[..., QualityScore] = partial(
            scoring.score_token_model,
            documents=documents,
            tokenizer=tokenizer,
            bos_token_id=models.bos_token_id,
            context_tokens=settings.context_tokens,
            breakdown=breakdown,
        )
        of_graft = by_sentences if isinstance(model, SentenceLM) else by_tokens
        systems: list[tuple[str, Callable[[], Any], Callable[..., QualityScore], tuple[str, ...]]] = [
            (SENTENCE_MODEL, lambda: model, of_graft, bench.graft_stages),
            (BASELINES[0], lambda: models.baseline, by_tokens, ("baseline",)),
            *(
                (OPPONENT_SYSTEM + name, partial(models.opponent, name), by_tokens, (OPPONENT + name,))
                for name in models.opponents
            ),
            (BASELINES[1], lambda: models.as_it_came, by_tokens, ()),
        ]
        approximate = ""
        if not isinstance(model, SentenceLM):
            require_causal(causality)
            whole = model.config.num_hidden_layers
        else:
            whole = model.backbone.config.num_hidden_layers
            without_llm = partial(by_sentences, use_llm=False)
            systems.append((WITHOUT_LLM, lambda: model, without_llm, bench.graft_stages))
            systems.append((UNTRAINED, models.untrained, by_sentences, ()))
            if model.shortlist is not None:
                head = make_shortlist_head(model, settings.shortlist_tokens)
                approximate = f"{SENTENCE_MODEL}, shortlist of {head.tokens:,}"
                by_shortlist = partial(by_sentences, shortlist=head)
                systems.insert(1, (approximate, lambda: model, by_shortlist, bench.graft_stages))
        scores: list[QualityScore] = []
        for system, load, score, stages in systems:
            with bench.bar(f"{self.name}: {system}", len(documents)) as bar:
                if (candidate := bench.attempt(self.name, system, load)) is None:
                    continue
                found = score(candidate, system=system, progress=partial(bar.advance, 1))
            sentence = bench.provenance.mean_sentence_tokens or 1.0
            middle = found.baseline_tokens / len(found.documents) / 2
            if system not in (approximate, WITHOUT_LLM):  # costs are those of the full head, and with the LLM
                flops, size = decoding_cost(candidate, middle, sentence)
                found.cost = DecodingCost(
                    flops=flops, bytes=size, text_tokens=middle, sentence_tokens=sentence
                )
            found.counts = model_counts(candidate, models, stages, sentence)
            scores.append(found)
            note = NOTES.get(system, "")
            if made := split_of(candidate):
                note = f"split: first {made.first} and last {made.last} of {whole} blocks at every token; "
            if system.startswith(OPPONENT_SYSTEM):
                own = models.opponent_settings(system.removeprefix(OPPONENT_SYSTEM))
                found.cost_share = cost_share(candidate, model, own, middle, sentence)
                note = shape_note(candidate.config, whole, own)
            note += f"left context: up to {found.context}"
            bench.row(self.name, system, found.figures(), stages, note, candidate)
            candidate = None  # free its memory before the next one is loaded
        unigram = scoring.score_unigram(
            models.corpus, documents, tokenizer, tokenizer.vocab_size, models.bos_token_id, breakdown
        )
        note = "frequencies in the training documents, add-one smoothing"
        bench.row(self.name, unigram.system, unigram.figures(), (), note)
        scores.append(unigram)
        scoring.require_same_bytes(scores)
        return scores

    def sections(self, results: Results) -> list[Section]:
        lines = [
            [
                row.system,
                number(row.figures["bits_per_byte"], 4),
                number(row.figures["perplexity"], 2),
                number(row.figures.get("bits_per_byte_end_marks"), 4),
                number(row.figures.get("bits_per_byte_stop_decisions"), 4),
                row.note,
            ]
            for row in results.rows_of(self.name)
        ]
        scores = self.of(results)
        notes = [*_coverage_note(scores), *_llm_note(scores), *_data_note(results), *_cost_note(scores)]
        notes += sllm_note(
            results.recipe,
            lambda paper: (
                f"perplexity {paper.perplexity}, OPT {paper.opt_perplexity} (not fine-tuned on the same text)"
            ),
        )
        columns = ["system", "bits/byte", "perplexity", "of which: end marks", "stop decisions", "note"]
        table = Table(self.title, columns, lines, notes)
        found = [Section(table, partial(_draw, scores) if scores else None)]
        broken_down = [by for by in BY if any(by in score.by for score in scores)]
        for by in broken_down:
            table = by_table(scores, by, explain=by == broken_down[0])
            found.append(Section(table, partial(draw_by, scores, by), (10.4, 3.2), wide=True))
        return found

    def tiles(self, results: Results) -> list[tuple[str, str]]:
        scores = {score.system: score for score in self.of(results)}
        if SENTENCE_MODEL not in scores:
            return []
        text = "bits per byte, sentence model"
        labels = {BASELINES[0]: "equal-data baseline"}
        labels |= {name: name for name in scores if name.startswith(OPPONENT_SYSTEM)}
        others = [
            f"{label} {scores[name].bits_per_byte:.3f}" for name, label in labels.items() if name in scores
        ]
        if others:
            text += f" ({', '.join(others)})"
        return [(f"{scores[SENTENCE_MODEL].bits_per_byte:.3f}", text)]

    def warnings(self, results: Sequence[Results]) -> list[str]:
        measured = [scores for result in results if (scores := self.of(result))]
        if len({tuple((d.source, d.bytes) for d in scores[0].documents) for scores in measured}) < 2:
            return []
        return ["they were scored on different held-out text: their bits per byte cannot be compared"]


# ---- notes below the table


def _coverage_note(scores: Sequence[QualityScore]) -> list[str]:
    if not scores:
        return []
    first = scores[0]
    return [
        f"Every system scored the same {first.bytes:,} bytes of {len(first.documents)} held-out documents: "
        "everything after the first sentence of each. Coverage proven: each byte scored exactly once, no "
        "padding. Perplexity is per token of the uncut text by the baseline's tokenizer "
        f"({first.baseline_tokens:,})."
        + (
            " The sentence model also has to predict end marks and stop decisions; their share of its bits is shown."
            if any("end marks" in score.breakdown for score in scores)
            else ""
        )
    ]


def _llm_note(scores: Sequence[QualityScore]) -> list[str]:
    """Whether the LLM of a sentence model adds anything."""
    bits = {score.system: score.bits_per_byte for score in scores}
    if SENTENCE_MODEL not in bits or WITHOUT_LLM not in bits:
        return []
    ratio = bits[WITHOUT_LLM] / bits[SENTENCE_MODEL]
    note = f"Without its LLM, the sentence model needs {ratio:.3f} times the bits."
    if ratio < IDLE_LLM:
        note += f" So the LLM saves less than {IDLE_LLM - 1:.1%} of them: the decoder hardly uses it."
    return [note]


def _data_note(results: Results) -> list[str]:
    """What the sentence model and its baseline were trained on."""
    tokens = {row.system: row.honesty.training_tokens for row in results.rows_of(Quality.name)}
    ours, baseline = tokens.get(SENTENCE_MODEL), tokens.get(BASELINES[0])
    if not ours or not baseline:
        return []
    before = "include the SentenceVAE's training, which has no counterpart there"
    if results.recipe["graft"].get("split"):
        before = "are the same passages and steps"
    elif not results.recipe["train_vae"]["steps"]:
        before = "are the same text, read sentence by sentence; its SentenceVAE was not trained beforehand"
    return [
        f"Equal data: the baseline was trained on the graft's passages for the same number of steps ({baseline:,} "
        f"tokens). The sentence model's {ours:,} tokens {before}."
    ]


def _cost_note(scores: Sequence[QualityScore]) -> list[str]:
    """The cost of decoding a token: the sentence model's, also as a share of its baseline's and its opponents'."""
    costs = {score.system: score.cost for score in scores if score.cost}
    baseline = next((name for name in BASELINES if name in costs), None)
    others = [name for name in costs if name == baseline or name.startswith(OPPONENT_SYSTEM)]
    if not others or SENTENCE_MODEL not in costs:
        return []
    ours = costs[SENTENCE_MODEL]
    note = (
        f"To write one token of such text at batch 1 (computed from shapes, {ours.text_tokens:,.0f} tokens into the "
        f"text, sentences of {ours.sentence_tokens:.1f} tokens) the sentence model takes {ours.flops / 1e6:,.2f} MFLOP "
        f"and reads {byte_size(ours.bytes)}"
    )
    for name in others:
        theirs = costs[name]
        note += (
            f", the {name.partition(',')[0]} {theirs.flops / 1e6:,.2f} MFLOP and {byte_size(theirs.bytes)}: "
            f"{ours.flops / theirs.flops:.0%} and {ours.bytes / theirs.bytes:.0%}"
        )
    notes = [note + "."]
    shares = {score.system: score.cost_share for score in scores if score.cost_share is not None}
    if shares:
        listed = ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
        notes.append(f"Cost over the sentence model's, by the kind of cost that was to be equal: {listed}.")
    if not any(abs(share - 1) <= EQUAL_COST for share in shares.values()):
        notes.append("No opponent of equal cost was measured, so this does not show that sentences help.")
    return notes


def _draw(scores: Sequence[QualityScore], figure: Any) -> None:
    axes = figure.subplots()
    bars(
        axes,
        [score.system for score in scores],
        [score.bits_per_byte for score in scores],
        [f"{score.bits_per_byte:.3f}" for score in scores],
    )
    axes.set_title("Bits per byte on the same held-out bytes (lower is better)")
    axes.set_xlabel("bits per byte")
