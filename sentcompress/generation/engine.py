"""The sentence-by-sentence engine: encode the prompt once, then one backbone step and one sentence at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sentcompress.contracts import Segmenter
from sentcompress.errors import InputError
from sentcompress.generation.decoding import RowPlan, Sampler, SentenceWriter, Told
from sentcompress.generation.heads import Head, make_head
from sentcompress.generation.prompts import ends_in_sentence
from sentcompress.generation.settings import GenerationSettings
from sentcompress.modeling.loading import load_segmenter
from sentcompress.modeling.sentence_lm import START, SentenceLM
from sentcompress.text.segmentation import sentences_to_ids

ENCODE_AT_A_TIME = 512
"""Sentences encoded together; bounds memory for long prompts."""


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
            self.segmenter = segmenter or load_segmenter(model.config.vae_config, tokenizer)
        self.device = next(model.parameters()).device
        self._heads: dict[str, Head] = {}

    def head(self, kind: str) -> Head:
        """The output head called ``kind``, made when first asked for: it counts how often a shortlist fell back.

        Raises:
            InputError: it cannot be had here.
        """
        if kind not in self._heads:
            self._heads[kind] = make_head(self.model.vae.output_weight, kind)
        return self._heads[kind]

    def generate(
        self,
        prompts: Sequence[str],
        settings: GenerationSettings | None = None,
        on_sentence: Callable[[int, str], None] | None = None,
    ) -> list[Generation]:
        """Continue each prompt; results come in the order of the prompts.

        Args:
            prompts: texts; one that ends in the middle of a sentence is finished first.
            settings: greedy with 128 new tokens unless given.
            on_sentence: called with the prompt's number and each new piece of text as it is written.

        Raises:
            InputError: a prompt is empty, or has more sentences than the backbone has positions.
        """
        rows = [self._read(number, Generation(prompt)) for number, prompt in enumerate(prompts)]
        for number, _, piece in self._run(rows, settings or GenerationSettings(max_new_tokens=128)):
            if on_sentence and piece:
                on_sentence(number, piece)
        return [row.result for row in rows]

    def continue_sentences(
        self, contexts: Sequence[Sequence[Sequence[int]]], settings: GenerationSettings
    ) -> Iterator[tuple[int, list[int]]]:
        """Continue whole sentences given as token ids: what benchmarks time, with no text work in it.

        Args:
            contexts: the sentences of each prompt.

        Yields:
            the prompt's number and the tokens of each new sentence, end mark left out.
        """
        rows = [
            _Row(number, [list(ids) for ids in sentences], [], "", Generation(""))
            for number, sentences in enumerate(contexts)
        ]
        for number, tokens, _ in self._run(rows, settings):
            if tokens:
                yield number, tokens

    @torch.no_grad()
    def prefill(self, contexts: Sequence[Sequence[Sequence[int]]]) -> tuple[Any, int]:
        """Encode whole sentences given as token ids and run the backbone over them; for benchmarks.

        Returns:
            the backbone's cache, and how many cells a row has (the start cell included).
        """
        state = _Cells(self.model.eval(), [self.encode(sentences) for sentences in contexts], use_cache=True)
        return state.cache, state.cells

    def stream(self, prompt: str, settings: GenerationSettings | None = None) -> Iterator[str]:
        """Yield the new text of one prompt piece by piece, a sentence at a time."""
        rows = [self._read(0, Generation(prompt))]
        for _, _, piece in self._run(rows, settings or GenerationSettings(max_new_tokens=128)):
            if piece:
                yield piece

    @torch.no_grad()
    def _run(self, rows: list[_Row], settings: GenerationSettings) -> Iterator[tuple[int, list[int], str]]:
        """Fill the rows' results, yielding each prompt's number with a new sentence's tokens and new text."""
        model = self.model.eval()
        sampler = Sampler(settings, self.device)
        state = _Cells(model, [self.encode(row.context) for row in rows], use_cache=settings.use_cache)
        writer = SentenceWriter(
            model.vae, sampler, head=self.head(settings.head), use_cache=settings.use_cache
        )
        writer.read([Told(row.context, state.told(i, len(row.context))) for i, row in enumerate(rows)])
        while rows:
            hidden = state.hidden_states
            stop = model.stop_logits(hidden).float().softmax(-1)[:, 1].tolist()
            going = [i for i, row in enumerate(rows) if not self._finished(row, stop[i], state, settings)]
            if len(going) < len(rows):
                for row in rows:
                    if row.result.finish_reason and (rest := self._new_text(row)):
                        yield row.number, [], rest  # half a character that waited for its other half
                rows = [rows[i] for i in going]
                if not rows:
                    return
                state.keep(going)
                writer.keep(going)
                hidden = state.hidden_states
            plans = [self._plan(row, settings) for row in rows]
            written, _ = writer.write(hidden, plans)
            for row, tokens in zip(rows, written, strict=True):
                yield row.number, tokens, self._take(row, tokens, settings)
            going = [i for i, row in enumerate(rows) if not row.result.finish_reason]
            if len(going) < len(rows):
                rows = [rows[i] for i in going]
                state.keep(going)
                writer.keep(going)
            if rows:
                state.append(self.encode([row.context[-1] for row in rows]))

    def _read(self, number: int, result: Generation) -> _Row:
        """Split a prompt into whole sentences and an unfinished one."""
        if not result.prompt.strip():
            raise InputError("the prompt is empty", fix="give some text to continue")
        pieces = sentences_to_ids(result.prompt, self.segmenter, self.tokenizer)
        context = [list(ids) for _, ids in pieces]
        prefix: list[int] = []
        shown = ""
        can_finish = self.model.config.start_latent or len(pieces) > 1
        if can_finish and not ends_in_sentence(result.prompt, self.segmenter):
            shown, prefix = pieces[-1][0], context.pop()
            if len(prefix) >= self.model.config.vae_config.max_sentence_tokens:
                context.append(prefix)  # full already: what follows is a new sentence
                shown, prefix = "", []
        room = self._cells_allowed() - 1
        if len(context) > room:
            raise InputError(
                f"the prompt has {len(context)} sentences, the model's context holds {room}",
                fix="shorten the prompt, or graft onto a backbone with more positions",
            )
        return _Row(number, context, prefix, shown, result)

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

    def _finished(self, row: _Row, stop: float, state: _Cells, settings: GenerationSettings) -> bool:
        """Whether a row is not to write another sentence; notes why."""
        if row.prefix:
            return False
        if state.cells >= self._cells_allowed():
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


class _Cells:
    """The backbone's side of a batch: its cells so far, and the state that predicts the next sentence.

    Rows are padded on the left, so that every row's newest cell is the last column.
    """

    def __init__(self, model: SentenceLM, latents: list[Tensor], *, use_cache: bool) -> None:
        self.model = model
        self.use_cache = use_cache
        device = latents[0].device
        start = int(model.config.start_latent)
        width = max(len(x) for x in latents) + start
        index = torch.full((len(latents), width), -1, device=device)
        offset = 0
        for row, x in enumerate(latents):
            begin = width - len(x)
            index[row, begin:] = torch.arange(offset, offset + len(x), device=device)
            if start:
                index[row, begin - 1] = START
            offset += len(x)
        joined = torch.cat(latents)
        if not len(joined):
            joined = joined.new_zeros(1, *joined.shape[1:])
        self.inputs = model.rows(joined, index)
        self.passage_ids = torch.where(index == -1, -1, 0)
        self.cache: Any = None
        self._run(self.inputs, past=0)

    @property
    def cells(self) -> int:
        """Columns so far."""
        return int(self.passage_ids.shape[1])

    def _run(self, inputs: Tensor, past: int) -> None:
        positions = ((self.passage_ids >= 0).long().cumsum(1) - 1)[:, past:]
        passage_ids = self.passage_ids[:, past:]
        states, self.cache = self.model.backbone_states(
            inputs,
            passage_ids >= 0,
            passage_ids,
            positions,
            past_key_values=self.cache,
            past_passage_ids=self.passage_ids[:, :past] if past else None,
            use_cache=self.use_cache,
        )
        self.states = states
        """``[B, N, k, H]`` of the cells that were run last."""
        self.hidden_states = states[:, -1]
        """``[B, k, H]``: what the decoder is told for the next sentence."""

    def told(self, row: int, sentences: int) -> Tensor:
        """What predicted the last ``sentences`` of a row: ``[sentences, k, H]``, zeros where nothing did."""
        start = int(self.model.config.start_latent)
        real = self.states[row, self.states.shape[1] - sentences - start : -1]
        nothing = real.new_zeros(1 - start, *real.shape[1:])
        return torch.cat([nothing, real])[:sentences]

    def append(self, latents: Tensor) -> None:
        """One more sentence in every row: ``[B, k, H]``."""
        self.passage_ids = torch.cat([self.passage_ids, self.passage_ids.new_zeros(len(latents), 1)], 1)
        if self.use_cache:
            self._run(latents[:, None], past=self.cells - 1)
        else:
            self.inputs = torch.cat([self.inputs, latents[:, None]], 1)
            self._run(self.inputs, past=0)

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        if not rows:
            return
        index = torch.tensor(rows, device=self.passage_ids.device)
        self.passage_ids = self.passage_ids[index]
        self.hidden_states = self.hidden_states[index]
        self.inputs = self.inputs[index]
        if self.cache is not None:
            self.cache.batch_select_indices(index)
