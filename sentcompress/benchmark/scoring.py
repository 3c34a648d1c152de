"""Bits per byte and perplexity on held-out documents, after proof that every byte was scored exactly once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from sentcompress.benchmark.breakdown import Breakdown, TokenScores, sentence_token_scores
from sentcompress.benchmark.heldout_text import HeldoutDocument, Window, check_bytes, windows
from sentcompress.benchmark.measurement import SENTENCE_MODEL
from sentcompress.benchmark.measurements.causality import CausalityReport, require_causal
from sentcompress.benchmark.measurements.quality import DocumentScore, QualityScore
from sentcompress.benchmark.sentence_scoring import WindowScores, score_window, window_size, without_llm
from sentcompress.contracts.causal_lm import position_limit
from sentcompress.distributed import gathered_shares, own_share
from sentcompress.errors import CoverageError
from sentcompress.generation.shortlist_head import ShortlistHead
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.text.corpus import Corpus
from sentcompress.text.lossless_tokenizer import LosslessTokenizer

LOGITS_AT_A_TIME = 2**26
"""Logits of a token-level model computed at once: 256 MiB in fp32."""
UNIGRAM_BYTES = 4_000_000
"""Bytes of training text that the unigram frequencies are counted on."""


# ---- the sentence model


@dataclass
class DocumentTally:
    """Negative log-likelihoods of one document, by sentence."""

    nats: np.ndarray
    times: np.ndarray
    """How often each sentence was scored."""
    targets: np.ndarray
    decisions: np.ndarray
    """How often the decision after each sentence was."""
    decision_nats: np.ndarray
    """Of the decisions scored with each sentence: to begin or go on before it, to stop after the last one."""
    kinds: Counter[str] = field(default_factory=Counter)
    target_nats: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    """Targets and their nats, in the order in which they were scored."""


def score_sentence_model(
    model: SentenceLM,
    documents: Sequence[HeldoutDocument],
    tokenizer: LosslessTokenizer,
    *,
    causality: CausalityReport | None,
    context_sentences: int | None = None,
    system: str = SENTENCE_MODEL,
    breakdown: Breakdown | None = None,
    shortlist: ShortlistHead | None = None,
    use_llm: bool = True,
    progress: Callable[[], None] = lambda: None,
) -> QualityScore:
    """Score held-out documents: every sentence after the first, its end mark, and every stop decision.

    Args:
        causality: of this model; a model that failed, or was not checked, is refused.
        context_sentences: sentences a window holds; None takes all the backbone has positions for.
        breakdown: also splits the total; None leaves that out.
        shortlist: score what this head writes, which has a few tokens for each sentence; None: the full head.
        use_llm: False puts a constant in the place of the LLM's states (:func:`without_llm`).
        progress: called after each document.

    Raises:
        CausalityError: the model sees the future.
        CoverageError: a byte, an end mark or a decision was scored twice or never.
    """
    require_causal(causality)
    model.eval()
    size = window_size(model, context_sentences)
    scored = []
    with nullcontext() if use_llm else without_llm(model, documents[0].sentences[:size]):
        for document in own_share(documents):
            tally = score_document(model, document, size, shortlist)
            row = check_document(document, tally, tokenizer)
            token_scores = None
            if breakdown:
                nats = tally.nats - tally.decision_nats
                eos = model.config.eos_token_id
                token_scores = sentence_token_scores(
                    document, tokenizer, eos, tally.target_nats, nats, tally.decision_nats
                )
            scored.append(_Scored(row, tally.kinds, token_scores))
            progress()
    return _summary(system, scored, documents, f"{size} sentences", breakdown)


def score_document(
    model: SentenceLM, document: HeldoutDocument, size: int, shortlist: ShortlistHead | None = None
) -> DocumentTally:
    """Score a document from ``document.first_scored`` on, in windows of ``size`` sentences."""
    count = len(document.sentences)
    tally = DocumentTally(
        nats=np.zeros(count),
        times=np.zeros(count, dtype=np.int64),
        targets=np.zeros(count, dtype=np.int64),
        decisions=np.zeros(count, dtype=np.int64),
        decision_nats=np.zeros(count),
    )
    for window in windows(count, size, document.first_scored):
        what = f"document {document.number}"
        found = score_window(
            model, document.sentences, window, ends=document.whole, what=what, shortlist=shortlist
        )
        _add(tally, window, found)
    return tally


def _add(tally: DocumentTally, window: Window, found: WindowScores) -> None:
    """Add to the tally what each sentence of a window, and the decision before it, was scored."""
    decided = found.before.copy()
    decided[-1] += found.stop
    scored = slice(window.first_scored, window.stop)
    inside = slice(window.first_scored - window.start, None)
    tally.nats[scored] += (found.nats + decided)[inside]
    tally.decision_nats[scored] += decided[inside]
    tally.targets[scored] += found.targets[inside]
    tally.times[scored] += 1
    # The decision after sentence t comes with predicting sentence t + 1; the last one decides to stop.
    first = max(window.first_scored - 1, 0)
    tally.decisions[first : window.stop] += found.decisions[first - window.start :]
    tally.target_nats.append(found.target_nats)
    tally.kinds.update(
        {
            "tokens": float(found.nats.sum()) - found.end_nats,
            "end marks": found.end_nats,
            "stop decisions": float(decided.sum()),
        }
    )


def check_document(
    document: HeldoutDocument, tally: DocumentTally, tokenizer: LosslessTokenizer
) -> DocumentScore:
    """Prove that everything from ``document.first_scored`` on was scored once.

    Raises:
        CoverageError: a byte, an end mark or a decision was scored twice or never.
    """
    what = f"document {document.number} ({document.source})"
    expected_times = np.arange(len(document.sentences)) >= document.first_scored
    if not np.array_equal(tally.times, expected_times):
        times = sorted(set(tally.times[document.first_scored :].tolist()))
        raise CoverageError(f"{what}: sentences were scored {times} times, not once")
    expected_targets = np.array([len(ids) + 1 for ids in document.sentences]) * expected_times
    if not np.array_equal(tally.targets, expected_targets):
        wrong = int(np.flatnonzero(tally.targets != expected_targets)[0])
        raise CoverageError(
            f"{what}: sentence {wrong} has {expected_targets[wrong]} targets with its end mark, "
            f"{tally.targets[wrong]} were scored"
        )
    expected_decisions = np.ones(len(document.sentences), dtype=np.int64)
    expected_decisions[-1] = int(document.whole)
    if not np.array_equal(tally.decisions, expected_decisions):
        raise CoverageError(f"{what}: not every decision to stop or go on was scored once")
    scored = slice(document.first_scored, None)
    pieces = zip(document.sentences[scored], document.texts[scored], strict=True)
    covered = sum(sum(tokenizer.byte_sizes(ids, text)) for ids, text in pieces)
    check_bytes(what, covered, document.scored_bytes)
    return DocumentScore(
        document=document.number,
        source=document.source,
        bytes=document.scored_bytes,
        covered_bytes=covered,
        nats=float(tally.nats.sum()),
        targets=int(tally.targets.sum()),
        baseline_tokens=len(_scored_tokens(document, tokenizer)),
    )


# ---- token-level models


def score_token_model(
    model: PreTrainedModel,
    documents: Sequence[HeldoutDocument],
    tokenizer: LosslessTokenizer,
    bos_token_id: int,
    *,
    system: str,
    context_tokens: int | None = None,
    breakdown: Breakdown | None = None,
    progress: Callable[[], None] = lambda: None,
) -> QualityScore:
    """Score the same bytes with a token-level model: the first sentence is its context too.

    Args:
        bos_token_id: stands before each document, as in training.
        context_tokens: positions a window holds; None takes all the model has.
        breakdown: also splits the total; None leaves that out.

    Raises:
        CoverageError: a byte was scored twice or never.
    """
    model.eval()
    room = position_limit(model.config)
    size = max(2, min(context_tokens or room, room))

    def nll(ids: Tensor) -> Tensor:
        return _token_nll(model, ids, size)

    return score_tokens(
        nll, documents, tokenizer, bos_token_id, system, f"{size} tokens", progress, breakdown
    )


def score_unigram(
    corpus: Corpus,
    documents: Sequence[HeldoutDocument],
    tokenizer: LosslessTokenizer,
    vocab_size: int,
    bos_token_id: int,
    breakdown: Breakdown | None = None,
) -> QualityScore:
    """Score with the frequencies of the training documents' tokens, one added to each count: the cost without context.

    An evenly spaced sample of ``UNIGRAM_BYTES`` of the training text is enough for one figure per token.
    """
    counts = np.ones(vocab_size, dtype=np.float64)
    sizes = np.add.reduceat(corpus.sentence_bytes, corpus.document_offsets[:-1])[corpus.train]
    step = max(1, round(float(sizes.sum()) / UNIGRAM_BYTES))
    for number in corpus.train[::step].tolist():
        counts += np.bincount(tokenizer.encode(corpus.document_text(number)), minlength=vocab_size)
    table = torch.from_numpy(-np.log(counts / counts.sum()))

    def nll(ids: Tensor) -> Tensor:
        return table[ids[1:]]

    return score_tokens(nll, documents, tokenizer, bos_token_id, "unigram", "none", lambda: None, breakdown)


def score_tokens(
    nll: Callable[[Tensor], Tensor],
    documents: Sequence[HeldoutDocument],
    tokenizer: LosslessTokenizer,
    bos_token_id: int,
    system: str,
    context: str,
    progress: Callable[[], None],
    breakdown: Breakdown | None = None,
) -> QualityScore:
    """Score with a function from ``[T]`` tokens to the NLL ``[T - 1]`` of all but the first."""
    scored_documents = []
    for document in own_share(documents):
        # Apart, so that no token reaches from the context into the scored text: the bytes must match exactly.
        before = [bos_token_id, *tokenizer.encode(document.context_text)]
        scored = _scored_tokens(document, tokenizer)
        losses = nll(torch.tensor([*before, *scored]))
        nats = losses[len(before) - 1 :].double()
        if len(losses) != len(before) + len(scored) - 1 or not bool(torch.isfinite(nats).all()):
            raise CoverageError(
                f"document {document.number}: {len(nats)} of {len(scored)} tokens were scored"
            )
        sizes = np.array(tokenizer.byte_sizes(scored, document.scored_text))
        covered = int(sizes.sum())
        check_bytes(f"document {document.number} ({document.source})", covered, document.scored_bytes)
        row = DocumentScore(
            document=document.number,
            source=document.source,
            bytes=document.scored_bytes,
            covered_bytes=covered,
            nats=float(nats.sum()),
            targets=len(scored),
            baseline_tokens=len(scored),
        )
        token_scores = None
        if breakdown:
            token_scores = TokenScores(nats.numpy(), sizes)
        scored_documents.append(_Scored(row, Counter(), token_scores))
        progress()
    return _summary(system, scored_documents, documents, context, breakdown)


def _scored_tokens(document: HeldoutDocument, tokenizer: LosslessTokenizer) -> list[int]:
    return tokenizer.encode(document.scored_text, begins=not document.context_text)


@torch.no_grad()
def _token_nll(model: PreTrainedModel, ids: Tensor, size: int) -> Tensor:
    """NLL ``[T - 1]`` of tokens 1 on, from windows of ``size`` tokens; a NaN marks one that was left out."""
    device = next(model.parameters()).device
    losses = torch.full((len(ids) - 1,), float("nan"), dtype=torch.float64)
    todo = windows(len(ids), size)
    at_a_time = max(1, LOGITS_AT_A_TIME // (size * model.config.vocab_size))
    for begin in range(0, len(todo), at_a_time):
        block = todo[begin : begin + at_a_time]
        width = max(w.stop - w.start for w in block)
        rows = torch.zeros(len(block), width, dtype=torch.long)
        mask = torch.zeros_like(rows)
        for row, w in enumerate(block):
            rows[row, : w.stop - w.start] = ids[w.start : w.stop]
            mask[row, : w.stop - w.start] = 1
        logits = model(input_ids=rows.to(device), attention_mask=mask.to(device), use_cache=False).logits
        for row, w in enumerate(block):
            first = w.first_scored - w.start - 1
            predicted = logits[row, first : w.stop - w.start - 1].float()
            nll = F.cross_entropy(predicted, ids[w.first_scored : w.stop].to(device), reduction="none")
            positions = slice(w.first_scored - 1, w.stop - 1)
            if not bool(losses[positions].isnan().all()):
                raise CoverageError(f"tokens {w.first_scored} to {w.stop - 1} were scored twice")
            losses[positions] = nll.double().cpu()
    return losses


# ---- both


@dataclass
class _Scored:
    """A document's score, its nats by kind, and by token (if that was asked for)."""

    row: DocumentScore
    kinds: Counter[str]
    token_scores: TokenScores | None


def _summary(
    system: str,
    own: list[_Scored],
    documents: Sequence[HeldoutDocument],
    context: str,
    breakdown: Breakdown | None,
) -> QualityScore:
    """Totals over the documents of all processes; figures come from sums, never from averages of averages.

    Raises:
        CoverageError: a document was scored twice or by nobody, or the total is NaN or infinite.
    """
    scored = gathered_shares(own)
    rows = [one.row for one in scored]
    if [row.document for row in rows] != [document.number for document in documents]:
        raise CoverageError(
            f"{system}: {len(rows)} documents were scored, but {len(documents)} are held out, or the order differs"
        )
    kinds = Counter[str]()
    for one in scored:
        kinds.update(one.kinds)
    token_scores = [one.token_scores for one in scored if one.token_scores is not None]
    nats, size = sum(row.nats for row in rows), sum(row.bytes for row in rows)
    tokens = sum(row.baseline_tokens for row in rows)
    if not math.isfinite(nats):
        raise CoverageError(f"{system}: the total negative log-likelihood is {nats}")
    return QualityScore(
        system=system,
        bits_per_byte=nats / math.log(2) / size,
        perplexity=math.exp(min(nats / tokens, 700.0)),
        nats=nats,
        bytes=size,
        targets=sum(row.targets for row in rows),
        baseline_tokens=tokens,
        context=context,
        breakdown=dict(kinds),
        by=breakdown.split(system, token_scores, nats) if breakdown else {},
        documents=rows,
    )


def require_same_bytes(scores: Sequence[QualityScore]) -> None:
    """Refuse scores of different text.

    Raises:
        CoverageError: naming the two systems.
    """
    for score in scores[1:]:
        mine = [(d.document, d.covered_bytes) for d in score.documents]
        theirs = [(d.document, d.covered_bytes) for d in scores[0].documents]
        if mine != theirs:
            raise CoverageError(
                f"'{score.system}' and '{scores[0].system}' were not scored on the same bytes"
            )
