"""A batch of texts that are written together: each joins it, ends and leaves it between any two steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from sentcompress.generation.backbone_cache import BackboneCache
from sentcompress.generation.conditioned_text import ConditionedText
from sentcompress.generation.prefix import Prefix
from sentcompress.generation.sentence_writer import Sampler, SentencePlan, SentenceWriter
from sentcompress.generation.settings import DEFAULT_SETTINGS, GenerationSettings
from sentcompress.text.lossless_tokenizer import TextStream

if TYPE_CHECKING:
    from sentcompress.generation.engine import SentenceGenerator

BACKBONE_BATCH_SHARE = 0.5
"""Share of the unfinished texts that must have completed a sentence before the backbone reads those sentences. Its step
costs about the same for few as for many, and the other texts continue in the meantime."""
COMPACTION_SHARE = 0.75
"""Share of unfinished texts below which the finished ones are dropped from the caches."""


@dataclass
class Generation:
    """The continuation of one prompt.

    Attributes:
        prompt: the prompt.
        text: the new text, to be appended to the prompt unchanged.
        sentences: the new text in the pieces in which it was generated; joined, they are ``text``.
        token_ids: the new tokens, without end marks.
        finish_reason: ``stop`` (the termination layer), ``length`` (a limit), ``context`` (no positions left), or
            ``dropped`` (the caller has dropped it).
    """

    prompt: str
    text: str = ""
    sentences: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""


@dataclass
class TextState:
    """The state of one prompt in the batch.

    Attributes:
        index: of the prompt, for the caller.
        sentences: token ids of every complete sentence so far.
        unfinished: token ids of the prompt's last sentence: the model says where it ends.
        result: what was written.
        stream: decodes the new tokens; None leaves the text out.
        settings: limits, and when to stop.
        sampler: picks its tokens; texts may share one.
        new_sentences: sentences written.
        unread: its last sentence was not read by the backbone.
    """

    index: int
    sentences: list[list[int]]
    unfinished: list[int]
    result: Generation
    stream: TextStream | None = None
    settings: GenerationSettings = DEFAULT_SETTINGS
    sampler: Sampler | None = None
    new_sentences: int = 0
    unread: bool = False


class TextBatch:
    """Texts in different stages, which share the steps of decoder and backbone.

    Args:
        generator: the model, its tokenizer and its output heads.
        settings: how texts are computed and stored; limits and sampling are those of each text.

    Attributes:
        texts: one for each row of the caches; some may be finished.
        cache: what the backbone has read; None before the first text joins.
        writer: the open sentences.
    """

    def __init__(self, generator: SentenceGenerator, settings: GenerationSettings) -> None:
        self.generator = generator
        self.settings = settings
        self.model = generator.model.eval()
        self.texts: list[TextState] = []
        self.cache: BackboneCache | None = None
        self.writer: SentenceWriter | None = None
        self._waiting: list[int] = []
        """Rows of texts that wait for the backbone, or for their first sentence."""

    @property
    def busy(self) -> bool:
        """Whether any text is unfinished."""
        return any(not text.result.finish_reason for text in self.texts)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of backbone and decoder, with room to grow."""
        if self.cache is None or self.writer is None:
            return 0
        return self.cache.stored_bytes + self.writer.cache_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of the backbone's keys and values of one sentence; 0 if they are not kept."""
        return 0 if self.cache is None else self.cache.slot_bytes

    @torch.no_grad()
    def join(
        self,
        texts: Sequence[TextState],
        prefix: Prefix | None = None,
        keep: Callable[[Prefix], None] | None = None,
    ) -> None:
        """Read texts; they are written from the next step on.

        Args:
            texts: each with its settings and a sampler.
            prefix: sentences that all of them begin with.
            keep: called with what was read of each text, for later texts that begin with it.
        """
        if not texts:
            return
        shared = len(prefix.sentences) if prefix else 0
        latents = self.generator.encode_texts([text.sentences[shared:] for text in texts])
        cache = BackboneCache(
            self.model,
            latents,
            use_cache=self.settings.use_cache,
            kind=self.settings.cache,
            prefix=prefix,
        )
        writer = SentenceWriter(
            self.model.vae,
            head=self.generator.head(self.settings.head, self.settings.shortlist_tokens),
            use_cache=self.settings.use_cache,
            compiled=self.generator.compiled() if self.settings.compile else None,
        )
        writer.read(
            [
                ConditionedText(text.sentences, cache.conditioning(row, len(text.sentences)))
                for row, text in enumerate(texts)
            ]
        )
        for row, (text, own) in enumerate(zip(texts, latents, strict=True)) if keep else ():
            assert keep is not None
            whole = own if prefix is None else torch.cat([prefix.latents, own])
            keep(Prefix("", [*text.sentences], whole, *cache.read(row)))
        self._keep([row for row, text in enumerate(self.texts) if not text.result.finish_reason])
        if self.cache is None or self.writer is None:
            self.cache, self.writer = cache, writer
        else:
            self.cache.join(cache)
            self.writer.join(writer)
        self._waiting += range(len(self.texts), len(self.texts) + len(texts))
        self.texts += texts

    def drop(self, text: TextState) -> None:
        """End a text where it is. What its open sentence has so far is lost."""
        if text.result.finish_reason:
            return
        text.result.finish_reason = "dropped"
        row = next(row for row, other in enumerate(self.texts) if other is text)
        self._waiting = [other for other in self._waiting if other != row]
        assert self.writer is not None
        self.writer.sentences[row] = None

    @torch.no_grad()
    def step(self) -> list[tuple[TextState, list[int], str]]:
        """One step of the decoder for every open sentence, and of the backbone if enough texts wait for it.

        Returns:
            each text that has finished a sentence, with the tokens and the new text; and texts that have ended.
        """
        assert self.cache is not None
        assert self.writer is not None
        new: list[tuple[TextState, list[int], str]] = []
        unfinished = sum(not text.result.finish_reason for text in self.texts)
        begins = self._waiting
        if self.writer.busy and len(begins) < BACKBONE_BATCH_SHARE * unfinished:
            begins = [
                row for row in begins if not self.texts[row].unread
            ]  # the backbone has read their prompts
        if begins:
            self._begin(begins, new)
        for sentence in self.writer.step() if self.writer.busy else ():
            text = self.texts[sentence.row]
            new.append((text, sentence.tokens, self._add(text, sentence.tokens)))
            if not text.result.finish_reason:
                self._waiting.append(sentence.row)
        if not self.busy:
            self._keep([])
        return new

    def _begin(self, rows: list[int], new: list[tuple[TextState, list[int], str]]) -> None:
        """Let the backbone read what these texts have written; begin their next sentences, or end them."""
        cache, writer = self.cache, self.writer
        assert cache is not None
        assert writer is not None
        texts = self.texts
        self._waiting = [row for row in self._waiting if row not in set(rows)]
        # The backbone has read the prompts already, but not the sentences generated since.
        if unread := [row for row in rows if texts[row].unread]:
            cache.append(unread, self.generator.encode([texts[row].sentences[-1] for row in unread]))
            for row in unread:
                texts[row].unread = False
        stop = self.model.stop_logits(cache.hidden_states[rows]).float().softmax(-1)[:, 1].tolist()
        begun = [
            row
            for row, probability in zip(rows, stop, strict=True)
            if not self._finished(texts[row], probability, cache.lengths[row])
        ]
        for row in rows:
            if texts[row].result.finish_reason:  # an incomplete character was held back until now
                new.append((texts[row], [], self._new_text(texts[row])))
        if begun:
            writer.begin(begun, cache.hidden_states[begun], [self._plan(texts[row]) for row in begun])
        left = [row for row, text in enumerate(texts) if not text.result.finish_reason]
        if left and len(left) <= COMPACTION_SHARE * len(texts):
            self._keep(left)

    def _keep(self, rows: list[int]) -> None:
        """Drop all other texts from the caches."""
        if len(rows) == len(self.texts):
            return
        if not rows:
            self.texts, self.cache, self.writer, self._waiting = [], None, None, []
            return
        assert self.cache is not None
        assert self.writer is not None
        self.texts = [self.texts[row] for row in rows]
        self.cache.keep(rows)
        self.writer.keep(rows)
        moved = {row: new for new, row in enumerate(rows)}
        self._waiting = [moved[row] for row in self._waiting if row in moved]

    def _finished(self, text: TextState, stop: float, slots: int) -> bool:
        """Whether a text ends here; records the reason."""
        if text.unfinished:
            return False
        settings = text.settings
        if slots >= self.generator.max_slots():
            text.result.finish_reason = "context"
        elif (
            settings.sentence_lengths is None
            and settings.stop_threshold < 1
            and stop >= settings.stop_threshold
        ):
            text.result.finish_reason = "stop"
        return bool(text.result.finish_reason)

    def _plan(self, text: TextState) -> SentencePlan:
        settings = text.settings
        assert text.sampler is not None
        longest = self.model.config.vae_config.max_sentence_tokens
        begun = len(text.unfinished)
        limit = min(longest, max(settings.max_sentence_tokens or longest, begun + 1))
        exact = None
        if lengths := settings.sentence_lengths:
            # Texts start at different lengths, so that a batch is as uneven as real text.
            exact = min(longest, max(lengths[(text.index + text.new_sentences) % len(lengths)], begun + 1))
        if settings.max_new_tokens is not None:
            left = settings.max_new_tokens - len(text.result.token_ids) + begun
            limit = min(limit, left)
            exact = min(exact, left) if exact else None
        history = []
        if settings.repetition_penalty != 1.0:
            history = [token for sentence in text.sentences for token in sentence]
        return SentencePlan(limit, text.unfinished, exact, history, text.sampler)

    def _add(self, text: TextState, tokens: list[int]) -> str:
        """Add a finished sentence to a text; return what is new of it."""
        result, begun, settings = text.result, len(text.unfinished), text.settings
        result.token_ids += tokens[begun:]
        text.sentences.append(tokens)
        text.unfinished, text.unread = [], True
        tokens_left = settings.max_new_tokens is None or len(result.token_ids) < settings.max_new_tokens
        new = "" if text.stream is None else text.stream.add(tokens[begun:])
        text.new_sentences += not begun or bool(new.strip())  # the prompt's last one may only have ended
        sentences_left = settings.max_new_sentences is None or text.new_sentences < settings.max_new_sentences
        if not (tokens_left and sentences_left):
            result.finish_reason = "length"
        return self._new_text(text, new)

    def _new_text(self, text: TextState, new: str = "") -> str:
        """Add new text to a result; an incomplete character is held back until the text is finished."""
        result = text.result
        if result.finish_reason and text.stream is not None:
            new += text.stream.add([], ends=True)
        result.text += new
        if new:
            result.sentences.append(new)
        return new
