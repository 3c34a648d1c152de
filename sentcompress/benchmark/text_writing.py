"""Prompts from held-out documents, and the continuations that models write after them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from sentcompress.benchmark.models import Missing
from sentcompress.benchmark.results import Sample
from sentcompress.contracts.causal_lm import position_limit
from sentcompress.generation import GenerationSettings, SentenceGenerator
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.recipe import BenchSettings
from sentcompress.text.corpus import Corpus
from sentcompress.text.lossless_tokenizer import LosslessTokenizer, lossless

Advance = Callable[[int], None]
"""Called with the number of prompts that were finished."""
BATCH = 16
"""Prompts continued together; the draws of a seed depend on it."""
SAMPLE_SENTENCES = 3
"""Of a document, that a sample continues."""


@dataclass(frozen=True)
class TextPrompt:
    """The beginning of a held-out document, how many tokens it has, and how the document goes on."""

    text: str
    tokens: int
    reference: str


def text_prompts(corpus: Corpus, tokenizer: LosslessTokenizer, settings: BenchSettings) -> list[TextPrompt]:
    """Beginnings of held-out documents: as many whole sentences as make ``bench.prompt_tokens`` tokens or more.

    Documents that do not go on for ``bench.text_new_tokens`` tokens are left out.

    Raises:
        Missing: no document is long enough.
    """
    prompts: list[TextPrompt] = []
    for number in corpus.heldout.tolist():
        sentences = corpus.document_sentences(number)
        ends = np.cumsum(corpus.sentence_lengths[sentences.start : sentences.stop])
        cut = int(np.searchsorted(ends, settings.prompt_tokens)) + 1
        if cut >= len(ends):
            continue
        # Twice as many tokens as are wanted, since cutting into sentences adds some; not the rest of a book.
        stop = int(np.searchsorted(ends, ends[cut - 1] + 2 * settings.text_new_tokens)) + 1
        begin, cut, stop = (sentences.start + n for n in (0, cut, min(stop, len(ends))))
        text, rest = corpus.span_text(begin, cut), corpus.span_text(cut, stop)
        if len(tokenizer.encode(rest, begins=False)) < settings.text_new_tokens:
            continue
        reference = first_tokens(rest, tokenizer, settings.text_new_tokens)
        prompts.append(TextPrompt(text, len(tokenizer.encode(text)), reference))
        if len(prompts) == settings.text_prompts:
            break
    if not prompts:
        raise Missing(
            f"no held-out document has {settings.prompt_tokens} tokens for a prompt and {settings.text_new_tokens} "
            "after them; lower bench.prompt_tokens or bench.text_new_tokens"
        )
    return prompts


def first_tokens(text: str, tokenizer: LosslessTokenizer, count: int) -> str:
    """The first ``count`` tokens of a text that continues another; a character they end in is kept whole."""
    ids = tokenizer.encode(text, begins=False)
    if len(ids) <= count:
        return text
    end = tokenizer.to_bytes(ids[:count])
    whole = text[: len(end.decode("utf-8", "ignore"))]
    return whole if len(whole.encode()) == len(end) else text[: len(whole) + 1]


class TextWriter:
    """Continues the prompts with each system, by the same number of the baseline's tokens.

    No system may end the document or stop, so all of them write as much. They write an eighth more than is wanted, and
    the texts are then cut, because text that a model wrote in many tokens may be encoded in fewer.

    Args:
        prompts: texts.
        tokenizer: of the run.
        settings: how many tokens, and how they are drawn.
        seed: of the draws.
        bos_token_id: starts a prompt for a token-level model.
    """

    def __init__(
        self, prompts: Sequence[str], tokenizer: Any, settings: BenchSettings, seed: int, bos_token_id: int
    ) -> None:
        self.prompts, self.settings, self.seed = list(prompts), settings, seed
        self.hf_tokenizer, self.tokenizer, self.bos = tokenizer, lossless(tokenizer), bos_token_id
        self.new_tokens = settings.text_new_tokens * 9 // 8 + 1

    def write(self, model: SentenceLM | PreTrainedModel, progress: Advance) -> list[str]:
        """Continue the prompts with a model of either kind."""
        if isinstance(model, SentenceLM):
            return self.by_sentences(model, progress)
        return self.by_tokens(model, progress)

    def by_sentences(self, model: SentenceLM, progress: Advance = lambda _: None) -> list[str]:
        """Continue with a sentence model."""
        generator = SentenceGenerator(model, self.hf_tokenizer)

        def write(prompts: list[str], seed: int) -> list[str]:
            drawn = GenerationSettings(
                max_new_tokens=self.new_tokens,
                do_sample=True,
                temperature=self.settings.text_temperature,
                top_p=self.settings.text_top_p,
                stop_threshold=1,
                seed=seed,
            )
            return [generation.text for generation in generator.generate(prompts, drawn)]

        return self._in_batches(write, progress)

    def by_tokens(self, model: PreTrainedModel, progress: Advance = lambda _: None) -> list[str]:
        """Continue with a token-level model in transformers' ``generate``.

        Raises:
            Missing: prompt and text are longer than the model has positions for.
        """
        longest = 1 + max(len(self.tokenizer.encode(prompt)) for prompt in self.prompts) + self.new_tokens
        if longest > position_limit(model.config):
            raise Missing(
                f"prompt and text take {longest} tokens, but the model has {position_limit(model.config)} positions; "
                "lower bench.prompt_tokens or bench.text_new_tokens"
            )
        own = model.generation_config
        # Replace the model's own, which would fill in what is not set here.
        model.generation_config = self._drawing(own)
        try:
            return self._in_batches(lambda prompts, seed: self._write_tokens(model, prompts, seed), progress)
        finally:
            model.generation_config = own

    def _drawing(self, own: GenerationConfig) -> GenerationConfig:
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        return GenerationConfig(
            max_new_tokens=self.new_tokens,
            min_new_tokens=self.new_tokens,
            do_sample=True,
            temperature=self.settings.text_temperature,
            top_k=0,
            top_p=self.settings.text_top_p,
            eos_token_id=sorted({self.hf_tokenizer.eos_token_id, *(end for end in ends if end is not None)}),
            pad_token_id=self.hf_tokenizer.pad_token_id,
        )

    @torch.no_grad()
    def _write_tokens(self, model: PreTrainedModel, prompts: list[str], seed: int) -> list[str]:
        rows = [[self.bos, *self.tokenizer.encode(prompt)] for prompt in prompts]
        width = max(len(row) for row in rows)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        ids = torch.full(mask.shape, self.hf_tokenizer.pad_token_id)
        ids[mask.bool()] = torch.tensor([token for row in rows for token in row])
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            output = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
        return [self.tokenizer.decode(new) for new in output[:, width:].tolist()]

    def _in_batches(self, write: Callable[[list[str], int], list[str]], progress: Advance) -> list[str]:
        texts: list[str] = []
        for begin in range(0, len(self.prompts), BATCH):
            block = self.prompts[begin : begin + BATCH]
            written = write(block, self.seed + begin)
            # The last character may lack its other bytes.
            texts += [
                first_tokens(text.rstrip("\ufffd"), self.tokenizer, self.settings.text_new_tokens)
                for text in written
            ]
            progress(len(block))
        return texts


def write_samples(
    model: SentenceLM, tokenizer: Any, texts: Sequence[Sequence[str]], seed: int
) -> list[Sample]:
    """Continue documents, each given as its sentences."""
    if not texts:
        return []
    settings = GenerationSettings(max_new_tokens=60, do_sample=True, temperature=0.7, top_p=0.9, seed=seed)
    prompts = ["".join(sentences[:SAMPLE_SENTENCES]) for sentences in texts]
    return [
        Sample(
            system="sentence model, temperature 0.7, top-p 0.9",
            prompt=generation.prompt,
            text=generation.text,
            finish_reason=generation.finish_reason,
        )
        for generation in SentenceGenerator(model, tokenizer).generate(prompts, settings)
    ]
