"""Exact retrieval: facts planted in held-out text, asked for at its end. Made offline, and the same for the same seed.

Each question is the beginning of a planted sentence, so that an LLM that was never taught to answer questions can go on
with it. An answer counts if greedy decoding writes exactly its tokens. One forward pass finds that out: greedy decoding
writes them if and only if each is the most likely one after those before it (up to rounding in bf16 and fp16). With a
sentence memory that holds for ``full_prompts=False``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from transformers import PreTrainedModel

from sentcompress.contracts.causal_lm import CACHE
from sentcompress.errors import InputError
from sentcompress.text.corpus import Corpus
from sentcompress.text.lossless_tokenizer import LosslessTokenizer

Kind = Literal["fact", "number", "quotation", "pairs", "several"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""``fact``: who lives where. ``number``: four digits. ``quotation``: a sentence of another held-out document, whose
beginning is given. ``pairs``: one of eight keys and values that stand together. ``several``: four numbers at four
depths, all asked for."""

SEVERAL = 4
PAIRS = 8
GIVEN_WORDS, ASKED_WORDS = 8, 4
"""Words of a quotation that are given and asked for."""
MARGIN = 16
"""Tokens left free, since text may be cut into more tokens where needles were planted."""
FIRST_NAMES = (
    "Agnes Bertram Cordelia Desmond Edith Ferdinand Gwendolen Horace Imogen Jasper Leopold Millicent Nathaniel Ottilie "
    "Percival Rosalind Sebastian Theodora Ursula Winifred"
)
LAST_NAMES = (
    "Ashdown Blackwood Cavendish Drummond Ellsworth Fairbanks Greenhalgh Hathaway Ingram Kettering Lockhart Marchbanks "
    "Netherby Oakenshaw Pemberton Ravenscroft Sinclair Thornbury Underhill Wexford"
)
PLACES = (
    "Lisbon Vienna Cairo Oslo Lima Naples Dublin Prague Athens Warsaw Geneva Seville Havana Bombay Lyon Bergen Tunis "
    "Krakow Porto Quebec Malta Ghent Dresden Salzburg"
)
OBJECTS = (
    "anchor barrel candle drum engine feather gate hammer island jewel kettle ladder mirror needle organ piano quilt "
    "ribbon saddle tower umbrella violin wagon yacht"
)


@dataclass(frozen=True)
class Needle:
    """One planted sentence (or several that belong together), and what is asked for.

    Attributes:
        statement: planted text.
        question: the beginning of one of its sentences.
        answer: what follows there, with the space before it.
        depth: share of the text before it, from 0 to 1.
    """

    statement: str
    question: str
    answer: str
    depth: float


@dataclass(frozen=True)
class Task:
    """A text with needles in it.

    Attributes:
        length: tokens that text, questions and answers have at most, with a start token.
        text: held-out text with the needles planted at borders of sentences.
        needles: in the order in which they are asked for.
    """

    kind: Kind
    length: int
    text: str
    needles: tuple[Needle, ...]

    @property
    def questions(self) -> list[str]:
        """What is appended before each answer; the answers of earlier needles stand before later questions."""
        return [("\n\n" if n == 0 else ". ") + needle.question for n, needle in enumerate(self.needles)]

    @property
    def prompt(self) -> str:
        """The text and the first question; :attr:`answer` follows."""
        return self.text + self.questions[0]

    @property
    def answer(self) -> str:
        """The answer to the first question."""
        return self.needles[0].answer


@dataclass(frozen=True)
class EncodedTask:
    """A task in tokens.

    Attributes:
        ids: start token, text, and each question with its answer.
        answers: where the answers stand in ``ids``.
    """

    ids: list[int]
    answers: list[slice]


def encode_task(task: Task, tokenizer: LosslessTokenizer, bos_token_id: int) -> EncodedTask:
    """Tokens of a task. Answers are encoded apart, so that no token reaches from a question into its answer."""
    ids = [bos_token_id, *tokenizer.encode(task.text)]
    answers = []
    for question, needle in zip(task.questions, task.needles, strict=True):
        ids += tokenizer.encode(question, begins=False)
        answer = tokenizer.encode(needle.answer, begins=False)
        answers.append(slice(len(ids), len(ids) + len(answer)))
        ids += answer
    return EncodedTask(ids, answers)


# ---- making tasks


def heldout_texts(corpus: Corpus) -> list[list[str]]:
    """The sentences of each held-out document."""
    return [
        [corpus.sentence_text(number) for number in corpus.document_sentences(document)]
        for document in corpus.heldout.tolist()
    ]


def make_tasks(
    documents: Sequence[Sequence[str]],
    tokenizer: LosslessTokenizer,
    *,
    lengths: Sequence[int],
    tasks: int,
    kinds: Sequence[Kind] = KINDS,
    seed: int = 0,
) -> list[Task]:
    """Make tasks of each kind and length, at depths spread evenly from 0 to 1.

    Args:
        documents: sentences of held-out documents; joined, they are the documents. Where one is too short for a text,
            others follow it.
        lengths: tokens of the texts.
        tasks: of each kind and length.
        seed: the same one makes the same tasks.

    Raises:
        InputError: the documents are too short for a text, or have no sentence that can be quoted.
    """
    sizes = [np.array([len(ids) for ids in tokenizer.encode_batch(sentences)]) for sentences in documents]
    available = sum(int(size.sum()) for size in sizes)
    if not lengths or max(lengths) > available:
        raise InputError(
            f"bench.text_lengths: {max(lengths, default=0):,} tokens, but the held-out documents have {available:,}",
            fix="lower it, or hold out more documents (data.options.heldout_documents)",
        )
    found = []
    for kind in kinds:
        for length in lengths:
            for number in range(tasks):
                # A task depends on nothing but its own numbers: more tasks leave the first ones as they are.
                draw = np.random.default_rng([seed, KINDS.index(kind), length, number])
                depth = number / (tasks - 1) if tasks > 1 else 0.5
                order = draw.permutation(len(documents)).tolist()
                needles = _needles(kind, depth, [documents[n] for n in order], draw)
                found.append(
                    _task(
                        kind,
                        length,
                        needles,
                        [documents[n] for n in order],
                        [sizes[n] for n in order],
                        tokenizer,
                    )
                )
    return found


def _needles(
    kind: Kind, depth: float, documents: Sequence[Sequence[str]], draw: np.random.Generator
) -> tuple[Needle, ...]:
    if kind == "quotation":
        return (_quotation(documents, depth, draw),)
    if kind == "fact":
        name = f"{draw.choice(FIRST_NAMES.split())} {draw.choice(LAST_NAMES.split())}"
        return (_cloze(f"{name} lives in a small house near", draw.choice(PLACES.split()), depth),)
    count = {"number": 1, "pairs": PAIRS, "several": SEVERAL}[kind]
    places = draw.choice(PLACES.split(), count, replace=False)
    things = draw.choice(OBJECTS.split(), count, replace=False)
    numbers = draw.choice(np.arange(1000, 10000), count, replace=False)
    if kind == "pairs":
        lines = [
            _cloze(f"The key {thing} has the value", value, depth)
            for thing, value in zip(things, numbers, strict=True)
        ]
        statement = " ".join(line.statement for line in lines)
        asked = lines[int(draw.integers(count))]
        return (Needle(statement, asked.question, asked.answer, depth),)
    # Several needles lie at equal distances; the depth turns them around, as on a ring.
    return tuple(
        _cloze(
            f"The secret number of the {thing} in {place} is", value, (depth + n / count) % 1 if n else depth
        )
        for n, (thing, place, value) in enumerate(zip(things, places, numbers, strict=True))
    )


def _cloze(question: str, answer: Any, depth: float) -> Needle:
    return Needle(f"{question} {answer}.", question, f" {answer}", depth)


def _quotation(documents: Sequence[Sequence[str]], depth: float, draw: np.random.Generator) -> Needle:
    """A sentence of the last document, which no other text quotes."""
    *others, last = documents
    words_of = [text.split() for text in last]
    long_enough = [
        words
        for words, text in zip(words_of, last, strict=True)
        if GIVEN_WORDS + ASKED_WORDS < len(words) <= 60 and " ".join(words) == text.strip()
    ]
    elsewhere = " ".join(" ".join(text.split()) for document in others for text in document)
    for number in draw.permutation(len(long_enough)).tolist():
        words = long_enough[number]
        given, asked = words[:GIVEN_WORDS], words[GIVEN_WORDS : GIVEN_WORDS + ASKED_WORDS]
        if " ".join(given[-3:]) not in elsewhere:
            answer = " " + " ".join(asked)
            return Needle(" ".join(words), " ".join(given), answer.rstrip(".,;:"), depth)
    raise InputError(
        f"recall: no sentence of a held-out document has more than {GIVEN_WORDS + ASKED_WORDS} words that stand "
        "nowhere else",
        fix="use longer documents, or leave recall out of bench.metrics",
    )


def _task(
    kind: Kind,
    length: int,
    needles: tuple[Needle, ...],
    documents: Sequence[Sequence[str]],
    sizes: Sequence[np.ndarray],
    tokenizer: LosslessTokenizer,
) -> Task:
    """Take whole sentences, document by document, until the text is full, and plant the needles."""
    extra = "".join(needle.statement + needle.question + needle.answer for needle in needles)
    room = length - len(tokenizer.encode(extra)) - MARGIN
    if room <= 0:
        raise InputError(
            f"bench.text_lengths: {length} tokens are too few for the needles of '{kind}'",
            fix="use at least 500",
        )
    quoted = {needle.statement for needle in needles}
    pieces: list[tuple[str, int]] = []
    for sentences, counts in zip(documents, sizes, strict=True):
        texts = [*sentences[:-1], sentences[-1].rstrip() + "\n\n"]
        pieces += [
            piece for piece in zip(texts, counts.tolist(), strict=True) if piece[0].strip() not in quoted
        ]
    tokens = np.cumsum([size for _, size in pieces])
    count = max(1, int(np.searchsorted(tokens, room, side="right")))
    flat = [text for text, _ in pieces[:count]]
    for border in reversed(_borders(flat)[1:] or [count]):
        task = Task(kind, length, _planted(flat[:border], tokens[:border], needles), needles)
        if len(encode_task(task, tokenizer, 0).ids) <= length:
            break
    return task


def _borders(texts: Sequence[str]) -> list[int]:
    """Where needles may stand, as numbers of pieces before them. Pieces may be clauses: a sentence must have ended."""
    return [0, *(n for n, text in enumerate(texts, 1) if text.rstrip().endswith((".", "!", "?")))]


def _planted(sentences: Sequence[str], tokens: np.ndarray, needles: Sequence[Needle]) -> str:
    """The sentences with each needle at the border that is nearest to its depth.

    Args:
        tokens: ``[S]`` tokens up to the end of each sentence.
    """
    before = np.array([0, *tokens])
    places: dict[int, list[str]] = {}
    for needle in sorted(needles, key=lambda needle: needle.depth):
        wanted = needle.depth * before[-1]
        nearest = min(_borders(sentences), key=lambda n: abs(before[n] - wanted))
        places.setdefault(nearest, []).append(needle.statement)
    text = ""
    for number in range(len(sentences) + 1):
        for statement in places.get(number, []):
            text += ("" if not text or text[-1].isspace() else " ") + statement + " "
        text += sentences[number] if number < len(sentences) else ""
    return text.rstrip()


# ---- scoring them


@torch.no_grad()
def answered(model: PreTrainedModel, task: EncodedTask, cache: Any = None) -> list[bool]:
    """Whether greedy decoding writes each answer, found out in one forward pass.

    Args:
        cache: an empty transformers cache, such as a sentence memory; None: full attention.
    """
    first = task.answers[0].start
    ids = torch.tensor([task.ids], device=model.device)
    given = {"use_cache": False} if cache is None else {CACHE: cache, "use_cache": True}
    keep = len(task.ids) - first + 1
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=keep, **given).logits[0]
    best = [0] * first + logits.argmax(-1).tolist()  # best[t] is the most likely token t
    return [best[answer] == task.ids[answer] for answer in task.answers]


@torch.no_grad()
def generated(
    model: PreTrainedModel, task: EncodedTask, make_cache: Callable[[], Any] = lambda: None
) -> list[bool]:
    """The same with the LLM's own ``generate``, one call for each answer: slow, and it needs no proof.

    Args:
        make_cache: an empty cache for each call.
    """
    found = []
    for answer in task.answers:
        ids = torch.tensor([task.ids[: answer.start]], device=model.device)
        cache = make_cache()
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=answer.stop - answer.start,
            do_sample=False,
            pad_token_id=model.config.pad_token_id,
            **({} if cache is None else {CACHE: cache}),
        )
        found.append(written[0, answer.start :].tolist() == task.ids[answer])
    return found
