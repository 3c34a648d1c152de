"""Sentence-by-sentence generation: encode the prompt once, then alternate one backbone step and one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sentcompress.contracts import Segmenter
from sentcompress.errors import InputError
from sentcompress.files import checked_text
from sentcompress.generation.backbone_cache import BackboneCache
from sentcompress.generation.compiled import CompiledStep
from sentcompress.generation.output_head import OutputHead, make_head
from sentcompress.generation.sentence_writer import Sampler
from sentcompress.generation.settings import GenerationSettings
from sentcompress.generation.text_batch import Generation, TextBatch, TextState
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.modeling.vae import pad_sentences
from sentcompress.recipe.sections import CacheKind, HeadKind
from sentcompress.text.lossless_tokenizer import lossless
from sentcompress.text.segmentation import sentences_to_ids

if TYPE_CHECKING:
    from sentcompress.generation.prefix import Prefix

ENCODE_BATCH_SIZE = 512
"""Sentences encoded together; bounds memory for long prompts."""


class SentenceGenerator:
    """Generates text with a SentenceLM.

    Args:
        model: the model.
        tokenizer: the one saved with it; with None only :meth:`continue_sentences` works.
        segmenter: the one it was trained with; None builds it from the model's configuration.
    """

    def __init__(self, model: SentenceLM, tokenizer: Any, segmenter: Segmenter | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        if tokenizer is not None:
            _require_tokenizer(tokenizer)
            self.segmenter = segmenter or model.config.vae_config.load_segmenter(tokenizer)
        self.device = next(model.parameters()).device
        self._heads: dict[tuple[HeadKind, int], OutputHead] = {}
        self._compiled: CompiledStep | None = None

    def head(self, kind: HeadKind, shortlist_tokens: int = 1024) -> OutputHead:
        """The output head called ``kind``, created at the first call. It counts how often a shortlist fell back.

        Args:
            shortlist_tokens: tokens per sentence of a predicted ``shortlist``.

        Raises:
            InputError: the head is not available for this model or device.
        """
        key = (kind, shortlist_tokens if kind == "shortlist" else 0)
        if key not in self._heads:
            if kind == "shortlist":
                from sentcompress.generation.shortlist_head import make_shortlist_head

                self._heads[key] = make_shortlist_head(self.model, shortlist_tokens)
            else:
                self._heads[key] = make_head(self.model.vae.output_weight, kind)
        return self._heads[key]

    def compiled(self) -> CompiledStep:
        """The compiled decoder step for ``compile``, created at the first call.

        Raises:
            InputError: the decoder cannot be compiled.
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
        """Continue each prompt; results are in the order of the prompts.

        Args:
            prompts: a list of texts, not a single one; the model first ends or completes the last sentence of each.
            settings: by default greedy with 128 new tokens.
            on_sentence: called with the prompt's index and each new piece of text as it is generated.
            prefix: text before every prompt, from :meth:`read_prefix`.

        Raises:
            InputError: a prompt is empty or not text, or has more sentences than the backbone has positions.
        """
        # A mapping is what a tokenizer returns, as other models' generate() wants it; its names would be the prompts.
        single = isinstance(prompts, str | bytes | Mapping) or getattr(prompts, "ndim", 1) == 0
        if single or not isinstance(prompts, Iterable):
            raise InputError(
                f"prompts must be a list of texts, not {type(prompts).__name__}",
                fix='put a single prompt in a list: generate(["The sun is up."])',
            )
        settings = GenerationSettings.given(settings)
        texts = [self.read(index, Generation(prompt), prefix) for index, prompt in enumerate(prompts)]
        if not texts:
            return []
        for index, _, piece in self._run(texts, settings, prefix):
            if on_sentence and piece:
                on_sentence(index, piece)
        return [text.result for text in texts]

    @torch.no_grad()
    def read_prefix(self, text: str) -> Prefix:
        """Read a text once that stands before many prompts, such as an instruction or a long document.

        Pass the result to :meth:`generate` or :meth:`stream` as often as you like, with prompts that leave the text
        out. The output is the same as if the text stood before them.

        Args:
            text: with a space at its end, if one is wanted.

        Raises:
            InputError: the text is empty, or has more sentences than the backbone has positions.
        """
        _require_tokenizer(self.tokenizer)
        if not checked_text(text, "the prefix").strip():
            raise InputError("the prefix is empty", fix="give some text, or leave it out")
        sentences = [list(ids) for _, ids in sentences_to_ids(text, self.segmenter, self.tokenizer)]
        self._require_room("the prefix", len(sentences))
        return self.prefix_of(sentences, text)

    @torch.no_grad()
    def prefix_of(self, sentences: list[list[int]], text: str = "") -> Prefix:
        """Like :meth:`read_prefix` for complete sentences given as token ids; for :meth:`continue_sentences`."""
        from sentcompress.generation.prefix import Prefix

        return Prefix.read(self.model.eval(), text, [*sentences], self.encode(sentences))

    def continue_sentences(
        self,
        contexts: Sequence[Sequence[Sequence[int]]],
        settings: GenerationSettings,
        prefix: Prefix | None = None,
    ) -> Iterator[tuple[int, list[int]]]:
        """Continue complete sentences given as token ids. Benchmarks time this, as it does not process text.

        Args:
            contexts: the sentences of each prompt.
            settings: of generation.
            prefix: sentences that all contexts begin with, from :meth:`prefix_of`.

        Yields:
            the prompt's index and the tokens of each new sentence, without its end mark.
        """
        texts = [
            TextState(index, [list(ids) for ids in sentences], [], Generation(""))
            for index, sentences in enumerate(contexts)
        ]
        for index, tokens, _ in self._run(texts, settings, prefix):
            if tokens:
                yield index, tokens

    @torch.no_grad()
    def prefill(
        self, contexts: Sequence[Sequence[Sequence[int]]], cache: CacheKind = "full"
    ) -> BackboneCache:
        """Encode complete sentences given as token ids and run the backbone over them; for benchmarks."""
        return BackboneCache(self.model.eval(), self.encode_texts(contexts), use_cache=True, kind=cache)

    def stream(
        self, prompt: str, settings: GenerationSettings | None = None, prefix: Prefix | None = None
    ) -> Iterator[str]:
        """The new text of one prompt piece by piece, a sentence at a time; the prompt is checked at once."""
        settings = GenerationSettings.given(settings)
        texts = [self.read(0, Generation(prompt), prefix)]
        return (piece for _, _, piece in self._run(texts, settings, prefix) if piece)

    def _run(
        self, texts: list[TextState], settings: GenerationSettings, prefix: Prefix | None = None
    ) -> Iterator[tuple[int, list[int], str]]:
        """Fill the texts' results; yield each prompt's index with a new sentence's tokens and the new text."""
        batch, sampler = TextBatch(self, settings), Sampler(settings, self.device)
        for text in texts:
            text.settings, text.sampler = settings, sampler
        batch.join(texts, prefix and prefix.common(text.sentences for text in texts))
        while batch.busy:
            for text, tokens, piece in batch.step():
                yield text.index, tokens, piece

    def read(self, index: int, result: Generation, before: Prefix | None = None) -> TextState:
        """Split a prompt into sentences, the last of which may go on.

        Whether it does cannot be seen: a line end or a quotation mark may follow, and belong to it.
        """
        _require_tokenizer(self.tokenizer)
        text = (before.text if before else "") + checked_text(result.prompt, f"prompt {index + 1}")
        if not text.strip():
            raise InputError("the prompt is empty", fix="give some text to continue")
        # A model writes a space together with the word behind it: it has to write the prompt's last ones again.
        read = text.rstrip(" ")
        sentences = [ids for _, ids in sentences_to_ids(read, self.segmenter, self.tokenizer)]
        unfinished: list[int] = []
        longest = self.model.config.vae_config.max_sentence_tokens
        # Without a start latent nothing predicts the first sentence, and a sentence may be full already.
        if (self.model.config.start_latent or len(sentences) > 1) and len(sentences[-1]) < longest:
            unfinished = sentences.pop()
        self._require_room("the prompt", len(sentences))
        stream = lossless(self.tokenizer).streamed(spaces=len(text) - len(read))
        return TextState(index, sentences, unfinished, result, stream)

    def _require_room(self, what: str, sentences: int) -> None:
        room = self.max_slots() - 1
        if sentences > room:
            raise InputError(
                f"{what} has {sentences} sentences, but the model's context holds {room}",
                fix=f"shorten {what}, or graft onto a backbone with more positions",
            )

    def max_slots(self) -> int:
        """Sentences (and the start latent) that the backbone has positions for."""
        return self.model.backbone.max_positions // self.model.latents

    def encode_texts(self, texts: Sequence[Sequence[Sequence[int]]]) -> list[Tensor]:
        """Encode the sentences of texts, all in one batch: ``[n, k, H]`` for each text."""
        latents = self.encode([ids for sentences in texts for ids in sentences])
        return list(latents.split([len(sentences) for sentences in texts]))

    def encode(self, sentences: Sequence[Sequence[int]]) -> Tensor:
        """Encode sentences given as token ids for the backbone: ``[S, k, H]``."""
        if not sentences:
            weight = self.model.termination.weight
            return weight.new_zeros(0, self.model.latents, self.model.backbone.hidden_size)
        starts = range(0, len(sentences), ENCODE_BATCH_SIZE)
        batches = [pad_sentences(sentences[i : i + ENCODE_BATCH_SIZE], self.device) for i in starts]
        return torch.cat([self.model.encode(*batch) for batch in batches])


def _require_tokenizer(tokenizer: Any) -> None:
    if not callable(getattr(tokenizer, "decode", None)) or isinstance(tokenizer, bytes):
        raise InputError(
            f"the tokenizer is {type(tokenizer).__name__}, not a tokenizer",
            fix="give the one saved with the model: AutoTokenizer.from_pretrained(FOLDER)",
        )
