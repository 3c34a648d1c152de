"""The log-likelihood of a text that continues another one, under a sentence model.

A sentence model writes a text as a series of events: the decision to begin, the tokens of the first sentence, its end
mark, the decision to go on, the tokens of the second sentence, and so on. What counts for a continuation is every
event after the last token of the context, up to the last token of the continuation. So

- in the sentence in which the continuation begins, the tokens of the context are given (the decoder is fed with them)
  and only those after them count;
- if the context ends with its sentence, that sentence's end mark and the decision to go on count too: the
  context's text does not show that its sentence is over;
- end marks and decisions between sentences of the continuation count, but what comes after its last token (an
  end mark, a decision to stop or go on) does not, since more might follow;
- with an empty context the decision to begin counts as well.

Likelihoods of consecutive continuations therefore add up, wherever the text is cut and tokenized the same way.
A model without a start latent cannot predict a text's first sentence. It is given that sentence whole, with its end
mark, as in ``bench quality``, and refuses to score a part of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sentcompress.benchmark.heldout_text import windows
from sentcompress.benchmark.sentence_scoring import score_window
from sentcompress.errors import CoverageError, InputError
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.text.lossless_tokenizer import LosslessTokenizer
from sentcompress.text.segmentation import Sentence

STOP_NATS = math.log(2)
"""Greedy generation with its usual threshold stops where the decision to go on costs this much."""


@dataclass(frozen=True)
class Continuation:
    """Score of a continuation.

    Attributes:
        nats: negative log-likelihood.
        tokens: of the continuation.
        end_marks: scored.
        decisions: to begin or go on, scored.
        greedy: every one of these is what greedy generation would choose.
    """

    nats: float
    tokens: int
    end_marks: int
    decisions: int
    greedy: bool


NOTHING = Continuation(nats=0.0, tokens=0, end_marks=0, decisions=0, greedy=True)


def score_continuation(
    model: SentenceLM, sentences: Sequence[Sentence], border: int, tokenizer: LosslessTokenizer, size: int
) -> Continuation:
    """Score the part of a text from a border on.

    Args:
        model: in eval mode.
        sentences: text and tokens of each sentence of context and continuation together.
        border: characters of the context; a token that reaches across belongs to the continuation.
        tokenizer: the model's.
        size: sentences a window holds.

    Raises:
        InputError: the model would have to predict a first sentence and has no start latent.
        CoverageError: the tokens do not spell the text, or others than those were scored.
    """
    ids = [tokens for _, tokens in sentences]
    owner, given = _last_given(sentences, border, tokenizer)
    if given == sum(map(len, ids)):
        return NOTHING
    position = given - sum(map(len, ids[:owner]))
    if owner == 0 and not model.config.start_latent:
        if position < len(ids[0]):
            raise InputError(
                "the model has no start latent, so it cannot predict the first sentence of a text: "
                f"{sentences[0][0][:60]!r}",
                fix="give a context of at least one whole sentence, or graft with graft.start_latent: true",
            )
        owner, position = 1, 0
    found = [
        (window, score_window(model, ids, window, ends=False, what="continuation", greedy=True))
        for window in windows(len(ids), size, owner)
    ]
    eos = model.config.eos_token_id
    targets, nats = (
        np.concatenate(columns) for columns in zip(*(scores.target_nats for _, scores in found), strict=True)
    )
    if not np.array_equal(targets, [token for sentence in ids[owner:] for token in (*sentence, eos)]):
        raise CoverageError("the model does not score the sentences' tokens in their order")
    scored = slice(position, -1)  # the last end mark comes after the continuation
    before = np.concatenate([scores.before[window.first_scored - window.start :] for window, scores in found])
    # Where the context has tokens of this sentence, the decision to begin it was made.
    decisions = before[1:] if position else before
    greedy = np.concatenate([scores.greedy for _, scores in found])[scored]
    end_marks = int((targets[scored] == eos).sum())
    return Continuation(
        nats=float(nats[scored].sum() + decisions.sum()),
        tokens=len(targets[scored]) - end_marks,
        end_marks=end_marks,
        decisions=len(decisions),
        greedy=bool(greedy.all()) and bool((decisions < STOP_NATS).all()),
    )


def _last_given(sentences: Sequence[Sentence], border: int, tokenizer: LosslessTokenizer) -> tuple[int, int]:
    """The sentence of the context's last token (0 where it has none), and how many tokens are the context's."""
    owner = given = 0
    begin = 0
    for number, (text, ids) in enumerate(sentences):
        inside = len(text[: max(0, border - begin)].encode("utf-8"))
        stops = np.cumsum(tokenizer.byte_sizes(ids, text))
        starts = np.concatenate([[0], stops[:-1]])
        mine = int(((stops <= inside) & (starts < inside)).sum())
        if mine:
            owner, given = number, given + mine
        if mine < len(ids):
            break
        begin += len(text)
    return owner, given
