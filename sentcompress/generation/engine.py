"""The sentence-by-sentence engine: encode the prompt once, then one backbone step and one sentence at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sentcompress.contracts import Segmenter
from sentcompress.errors import InputError
from sentcompress.generation.backbone_cache import Cells, Prefix
from sentcompress.generation.compiled import CompiledStep
from sentcompress.generation.output_head import Head, make_head, make_shortlist_head
from sentcompress.generation.sentence_writer import RowPlan, Sampler, SentenceWriter, Told
from sentcompress.generation.settings import DEFAULT_SETTINGS, GenerationSettings
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.recipe.choices import CacheKind, HeadKind
from sentcompress.text.segmentation import checked_split, sentences_to_ids

ENCODE_AT_A_TIME = 512
"""Sentences encoded together; bounds memory for long prompts."""
TOGETHER = 0.5
"""Share of the open texts that have finished a sentence before the backbone reads these: it costs the same for a few as
for many, and meanwhile the others go on."""
WORTH_DROPPING = 0.75
"""Share of texts still open below which the others are dropped from the caches."""

PROBE_SENTENCE = "The next sentence stands here."


@dataclass
class Generation:
    """What was written for one prompt.

    Attributes:
        prompt: the prompt.
        text: the new text, to be put behind the prompt as it is.
        sentences: the new text in pieces as they were written; joined, they are ``text``.
        token_ids: the new tokens, end marks left out.
        finish_reason: ``stop`` (the termination layer), ``length`` (a limit), or ``context`` (no positions left).
    """

    prompt: str
    text: str = ""
    sentences: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""


@dataclass
class _Row:
    """The state of one prompt in the batch."""

    number: int
    context: list[list[int]]
    """Token ids of every whole sentence so far."""
    prefix: list[int]
    """The prompt's unfinished last sentence."""
    shown: str
    """Text of the prefix, which the user already has."""
    result: Generation
    new_sentences: int = 0


class SentenceGenerator:
    """Generates with a SentenceLM.

    Args:
        model: in eval mode.
        tokenizer: the one saved with it; None leaves :meth:`continue_sentences` only.
        segmenter: the one it was trained with; None builds it from the model's configuration.
    """

    def __init__(self, model: SentenceLM, tokenizer: Any, segmenter: Segmenter | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        if tokenizer is not None:
            self.segmenter = segmenter or model.config.vae_config.load_segmenter(tokenizer)
        self.device = next(model.parameters()).device
        self._heads: dict[tuple[HeadKind, int], Head] = {}
        self._compiled: CompiledStep | None = None

    def head(self, kind: HeadKind, shortlist_tokens: int = 1024) -> Head:
        """The output head called ``kind``, made when first asked for: it counts how often a shortlist fell back.

        Args:
            shortlist_tokens: of a predicted ``shortlist``.

        Raises:
            InputError: it cannot be had here.
        """
        key = (kind, shortlist_tokens if kind == "shortlist" else 0)
        if key not in self._heads:
            if kind == "shortlist":
                self._heads[key] = make_shortlist_head(self.model, shortlist_tokens)
            else:
                self._heads[key] = make_head(self.model.vae.output_weight, kind)
        return self._heads[key]

    def compiled(self) -> CompiledStep:
        """The decoder's step, compiled, for ``compile``; made when first asked for.

        Raises:
            InputError: it cannot be had for this model.
        """
        self._compiled = self._compiled or CompiledStep(self.model.vae.decoder)
        return self._compiled

    def generate(
        self,
        prompts: Sequence[str],
        settings: GenerationSettings | None = None,
        on_sentence: Callable[[int, str], None] | None = None,
        prefix: Prefix | None = None,
    ) -> list[Generation]:
        """Continue each prompt; results come in the order of the prompts.

        Args:
            prompts: texts; one that ends in the middle of a sentence is finished first.
            settings: greedy with 128 new tokens unless given.
            on_sentence: called with the prompt's number and each new piece of text as it is written.
            prefix: text that stands before every prompt, from :meth:`read_prefix`.

        Raises:
            InputError: a prompt is empty, or has more sentences than the backbone has positions.
        """
        rows = [self._read(number, Generation(prompt), prefix) for number, prompt in enumerate(prompts)]
        settings = settings or DEFAULT_SETTINGS
        for number, _, piece in self._run(rows, settings, prefix):
            if on_sentence and piece:
                on_sentence(number, piece)
        return [row.result for row in rows]

    @torch.no_grad()
    def read_prefix(self, text: str) -> Prefix:
        """Read once what many prompts have before them, such as an instruction or a long document.

        Pass the result to :meth:`generate` or :meth:`stream` as often as you like, with prompts that leave it out: what
        is written is the same as with the text before them.

        Args:
            text: with the space after it, if there is to be one.

        Raises:
            InputError: it is empty, or longer than the backbone's positions.
        """
        if not text.strip():
            raise InputError("the prefix is empty", fix="give some text, or leave it out")
        sentences = [list(ids) for _, ids in sentences_to_ids(text, self.segmenter, self.tokenizer)]
        self._require_room("the prefix", len(sentences))
        return self.prefix_of(sentences, text)

    @torch.no_grad()
    def prefix_of(self, sentences: list[list[int]], text: str = "") -> Prefix:
        """The same of whole sentences given as token ids, for :meth:`continue_sentences`."""
        return Prefix.read(self.model.eval(), text, sentences, self.encode(sentences))

    def continue_sentences(
        self,
        contexts: Sequence[Sequence[Sequence[int]]],
        settings: GenerationSettings,
        prefix: Prefix | None = None,
    ) -> Iterator[tuple[int, list[int]]]:
        """Continue whole sentences given as token ids: what benchmarks time, with no text work in it.

        Args:
            contexts: the sentences of each prompt.
            prefix: sentences that all of these begin with, from :meth:`prefix_of`.

        Yields:
            the prompt's number and the tokens of each new sentence, end mark left out.
        """
        rows = [
            _Row(number, [list(ids) for ids in sentences], [], "", Generation(""))
            for number, sentences in enumerate(contexts)
        ]
        for number, tokens, _ in self._run(rows, settings, prefix):
            if tokens:
                yield number, tokens

    @torch.no_grad()
    def prefill(self, contexts: Sequence[Sequence[Sequence[int]]], cache: CacheKind = "full") -> Cells:
        """Encode whole sentences given as token ids and run the backbone over them; for benchmarks."""
        latents = [self.encode(sentences) for sentences in contexts]
        return Cells(self.model.eval(), latents, use_cache=True, kind=cache)

    def stream(
        self, prompt: str, settings: GenerationSettings | None = None, prefix: Prefix | None = None
    ) -> Iterator[str]:
        """Yield the new text of one prompt piece by piece, a sentence at a time."""
        rows = [self._read(0, Generation(prompt), prefix)]
        for _, _, piece in self._run(rows, settings or DEFAULT_SETTINGS, prefix):
            if piece:
                yield piece

    @torch.no_grad()
    def _run(
        self, rows: list[_Row], settings: GenerationSettings, prefix: Prefix | None = None
    ) -> Iterator[tuple[int, list[int], str]]:
        """Fill the rows' results, yielding each prompt's number with a new sentence's tokens and new text."""
        model = self.model.eval()
        prefix = prefix and prefix.common(row.context for row in rows)
        known = len(prefix.sentences) if prefix else 0
        cells = Cells(
            model,
            [self.encode(row.context[known:]) for row in rows],
            use_cache=settings.use_cache,
            kind=settings.cache,
            prefix=prefix,
        )
        writer = SentenceWriter(
            model.vae,
            Sampler(settings, self.device),
            head=self.head(settings.head, settings.shortlist_tokens),
            use_cache=settings.use_cache,
            compiled=self.compiled() if settings.compile else None,
        )
        writer.read([Told(row.context, cells.told(i, len(row.context))) for i, row in enumerate(rows)])
        waiting = list(range(len(rows)))
        while waiting or writer.busy:
            going = sum(not row.result.finish_reason for row in rows)
            if waiting and (not writer.busy or len(waiting) >= TOGETHER * going):
                # All but those that have just been read have one sentence that the backbone has not.
                if unread := [i for i in waiting if rows[i].new_sentences]:
                    cells.append(unread, self.encode([rows[i].context[-1] for i in unread]))
                stop = model.stop_logits(cells.hidden_states[waiting]).float().softmax(-1)[:, 1].tolist()
                begun = [
                    i
                    for i, p in zip(waiting, stop, strict=True)
                    if not self._finished(rows[i], p, cells.counts[i], settings)
                ]
                for i in waiting:
                    if rows[i].result.finish_reason and (rest := self._new_text(rows[i])):
                        yield rows[i].number, [], rest  # half a character that waited for its other half
                if begun:
                    writer.begin(
                        begun, cells.hidden_states[begun], [self._plan(rows[i], settings) for i in begun]
                    )
                waiting = []
                left = [i for i, row in enumerate(rows) if not row.result.finish_reason]
                if left and len(left) <= WORTH_DROPPING * len(rows):
                    rows = [rows[i] for i in left]
                    cells.keep(left)
                    writer.keep(left)
            for written in writer.step() if writer.busy else ():
                row = rows[written.row]
                yield row.number, written.tokens, self._take(row, written.tokens, settings)
                if not row.result.finish_reason:
                    waiting.append(written.row)

    def _read(self, number: int, result: Generation, before: Prefix | None = None) -> _Row:
        """Split a prompt into whole sentences and an unfinished one."""
        text = (before.text if before else "") + result.prompt
        if not text.strip():
            raise InputError("the prompt is empty", fix="give some text to continue")
        pieces = sentences_to_ids(text, self.segmenter, self.tokenizer)
        context = [list(ids) for _, ids in pieces]
        prefix: list[int] = []
        shown = ""
        can_finish = self.model.config.start_latent or len(pieces) > 1
        if can_finish and not ends_in_sentence(text, self.segmenter):
            shown, prefix = pieces[-1][0], context.pop()
            if len(prefix) >= self.model.config.vae_config.max_sentence_tokens:
                context.append(prefix)  # full already: what follows is a new sentence
                shown, prefix = "", []
        self._require_room("the prompt", len(context))
        return _Row(number, context, prefix, shown, result)

    def _require_room(self, what: str, sentences: int) -> None:
        room = self._cells_allowed() - 1
        if sentences > room:
            raise InputError(
                f"{what} has {sentences} sentences, the model's context holds {room}",
                fix=f"shorten {what}, or graft onto a backbone with more positions",
            )

    def _cells_allowed(self) -> int:
        return self.model.backbone.max_positions // self.model.latents

    def encode(self, sentences: Sequence[Sequence[int]]) -> Tensor:
        """Token ids of sentences to what the backbone reads: ``[S, k, H]``."""
        parts = []
        for begin in range(0, len(sentences), ENCODE_AT_A_TIME):
            block = sentences[begin : begin + ENCODE_AT_A_TIME]
            lengths = torch.tensor([len(ids) for ids in block])
            mask = torch.arange(int(lengths.max())) < lengths[:, None]
            input_ids = torch.zeros(mask.shape, dtype=torch.long)
            input_ids[mask] = torch.tensor([token for ids in block for token in ids])
            parts.append(self.model.encode(input_ids.to(self.device), mask.to(self.device)))
        if parts:
            return torch.cat(parts)
        weight = self.model.termination.weight
        return weight.new_zeros(0, self.model.latents, self.model.backbone.hidden_size)

    def _finished(self, row: _Row, stop: float, cells: int, settings: GenerationSettings) -> bool:
        """Whether a row is not to write another sentence; notes why."""
        if row.prefix:
            return False
        if cells >= self._cells_allowed():
            row.result.finish_reason = "context"
        elif (
            settings.sentence_lengths is None
            and settings.stop_threshold < 1
            and stop >= settings.stop_threshold
        ):
            row.result.finish_reason = "stop"
        return bool(row.result.finish_reason)

    def _plan(self, row: _Row, settings: GenerationSettings) -> RowPlan:
        longest = self.model.config.vae_config.max_sentence_tokens
        limit = min(longest, max(settings.max_sentence_tokens or longest, len(row.prefix) + 1))
        length = None
        if settings.sentence_lengths:
            # Rows begin at different places: in a batch, sentences are of uneven length as they are in text.
            draw = settings.sentence_lengths[
                (row.number + row.new_sentences) % len(settings.sentence_lengths)
            ]
            length = min(longest, max(draw, len(row.prefix) + 1))
        if settings.max_new_tokens is not None:
            left = settings.max_new_tokens - len(row.result.token_ids) + len(row.prefix)
            limit = min(limit, left)
            length = min(length, left) if length else None
        history = []
        if settings.repetition_penalty != 1.0:
            history = [token for sentence in row.context for token in sentence]
        return RowPlan(limit=limit, prefix=row.prefix, length=length, history=history)

    def _take(self, row: _Row, tokens: list[int], settings: GenerationSettings) -> str:
        """Book a written sentence; return its new text."""
        result = row.result
        result.token_ids += tokens[len(row.prefix) :]
        row.new_sentences += 1
        row.context.append(tokens)
        row.prefix = []
        enough_tokens = (
            settings.max_new_tokens is not None and len(result.token_ids) >= settings.max_new_tokens
        )
        enough_sentences = (
            settings.max_new_sentences is not None and row.new_sentences >= settings.max_new_sentences
        )
        if enough_tokens or enough_sentences:
            result.finish_reason = "length"
        return self._new_text(row)

    def _new_text(self, row: _Row) -> str:
        """Text of the tokens so far that was not shown yet; an unfinished character waits for its other half."""
        result = row.result
        if self.tokenizer is None or not result.token_ids:
            return ""
        prefix_ids = self._prefix_ids(row)
        text = self._decode([*prefix_ids, *result.token_ids])[len(self._decode(prefix_ids)) :]
        if not result.finish_reason:
            text = text.rstrip("\ufffd")
        piece = text[len(result.text) :]
        result.text = text
        if piece:
            result.sentences.append(piece)
        return piece

    def _prefix_ids(self, row: _Row) -> list[int]:
        return self.tokenizer(row.shown, add_special_tokens=False)["input_ids"] if row.shown else []

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def ends_in_sentence(text: str, segmenter: Segmenter) -> bool:
    """Whether the segmenter would cut right behind ``text`` if another sentence followed."""
    follow = PROBE_SENTENCE if text[-1:].isspace() else f" {PROBE_SENTENCE}"
    end = 0
    for piece in checked_split(text + follow, segmenter):
        end += len(piece)
        if end == len(text):
            return True
    return False
