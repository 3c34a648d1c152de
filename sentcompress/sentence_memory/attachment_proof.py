"""Proof, on random tokens, that an LLM attends through its memory and nothing else; run once for each LLM."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from sentcompress.contracts import Segmenter
from sentcompress.contracts.causal_lm import position_limit
from sentcompress.contracts.proof import Finding, largest_difference
from sentcompress.errors import InputError, is_out_of_memory
from sentcompress.sentence_memory.attachment import USE_ANOTHER

TOLERANCE = 1e-5
"""Largest difference allowed in fp32 between logits that should be equal, relative to the largest (at least 1)."""
SENTENCE, _LENGTH, _FIRST = 4, 16, 10
"""Tokens of a sentence, of a text, and of its beginning that is read at once before single tokens."""
_OTHER_TEXTS = 4
"""Texts that are put beside one, to see how much they change it by rounding."""
_proven: weakref.WeakKeyDictionary[PreTrainedModel, None] = weakref.WeakKeyDictionary()

MakeMemory = Callable[..., Cache]
"""Makes a memory from the names of memories and their options, for sentences of ``SENTENCE`` tokens."""


class Uncut(Segmenter):
    """Never cuts: sentences then end at their longest length."""

    def split(self, text: str) -> list[str]:
        return [text] if text else []


class Words:
    """Stands for a tokenizer: every token is a word."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join("word" for _ in ids)


CUT: dict[str, Any] = {
    "segmenter": Uncut(),
    "max_sentence_tokens": SENTENCE,
    "recall_blocks": "all",
    "prove": False,
}
"""Arguments of such a memory; all blocks recall, so that all are proven."""


def check_attachment(model: PreTrainedModel, make: MakeMemory) -> None:
    """Refuse an LLM that cannot be used with a memory. An LLM that has passed is not checked again.

    Raises:
        InputError: says what is wrong.
    """
    if model in _proven:
        return
    for finding in prove_attachment(model, make):
        if not finding.passed:
            raise InputError(
                f"{type(model).__name__} cannot be used with a memory: {finding.problem}",
                fix=USE_ANOTHER,
            ) from finding.cause
    _proven[model] = None


@torch.no_grad()
def prove_attachment(model: PreTrainedModel, make: MakeMemory) -> Iterator[Finding]:
    """Compare an LLM with a memory with the LLM alone, and with itself in all the ways it is used.

    Args:
        make: makes a memory for this LLM.
    """
    training = model.training
    model.eval()
    try:
        yield from _Proof(model, make).findings()
    finally:
        model.train(training)


class _Proof:
    def __init__(self, model: PreTrainedModel, make: MakeMemory) -> None:
        self.model, self.make = model, make
        table = model.get_input_embeddings().weight
        length = min(_LENGTH, position_limit(model.config))
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, len(table), (2, length), generator=generator).to(table.device)
        self.vocabulary = len(table)
        half = next(model.parameters()).dtype.itemsize < 4
        self.tolerance = 2**-5 if half else TOLERANCE
        self.allowed = 0.0

    def findings(self) -> Iterator[Finding]:
        for check in (
            self.equivalence,
            self.forgetting,
            self.keeping,
            self.steps,
            self.recalling,
            self.batches,
        ):
            try:
                delta, allowed, problem = check()
            except Exception as error:  # models raise anything
                if is_out_of_memory(error):
                    raise
                short = " ".join(str(error).split())[:160]
                yield Finding(
                    check.__name__,
                    float("inf"),
                    0.0,
                    f"its forward failed ({type(error).__name__}: {short})",
                    error,
                )
                return
            yield Finding(check.__name__, delta, allowed, problem if not delta <= allowed else "")

    def _run(self, ids: Tensor, memory: Cache | None, **more: Any) -> Tensor:
        if memory is None:
            return self.model(input_ids=ids, use_cache=False, **more).logits.float()
        return self.model(input_ids=ids, past_key_values=memory, use_cache=True, **more).logits.float()

    def _changed(self, start: int, stop: int) -> Tensor:
        """The tokens with some of them replaced."""
        ids = self.ids.clone()
        ids[:, start:stop] = (ids[:, start:stop] + 1) % self.vocabulary
        return ids

    def _influence(self, start: int, stop: int, seen_from: int, name: str, **options: Any) -> float:
        """How much changed tokens change the logits from a position on."""
        before, after = (
            self._run(ids, self.make(name, **options)) for ids in (self.ids, self._changed(start, stop))
        )
        return largest_difference(before[:, seen_from:], after[:, seen_from:])

    def equivalence(self) -> tuple[float, float, str]:
        """A memory that keeps everything gives the LLM's own logits."""
        own = self._run(self.ids, None)
        self.allowed = self.tolerance * max(1.0, float(own.abs().max()))
        whole = self._run(self.ids, self.make("window", recent_sentences=_LENGTH))
        return (
            largest_difference(own, whole),
            self.allowed,
            "with a memory that keeps everything its logits are not its own",
        )

    def forgetting(self) -> tuple[float, float, str]:
        """What is dropped has no influence at all: after the first sentence only its sinks are left."""
        options = {"recent_sentences": 0, "sinks": 2}
        influence = self._influence(2, SENTENCE, SENTENCE, "window", **options)
        allowed = 10 * self._noise() if influence else 0.0
        return influence, allowed, "it attends to tokens that its memory has dropped"

    def _noise(self) -> float:
        """How much other texts in the batch change the logits: 0, but for rounding in a mixture of experts.

        There it depends on how many tokens each expert gets, so one other text may change nothing.
        """
        options = {"recent_sentences": 0, "sinks": 2}
        before = self._run(self.ids, self.make("window", **options))[:1]
        noise = 0.0
        for shift in range(1, _OTHER_TEXTS + 1):
            others = torch.cat([self.ids[:1], (self.ids[1:] + shift) % self.vocabulary])
            after = self._run(others, self.make("window", **options))[:1]
            noise = max(noise, largest_difference(before, after))
        return noise

    def keeping(self) -> tuple[float, float, str]:
        """What is kept has an influence."""
        options = {"recent_sentences": 0, "sinks": 2}
        influence = self._influence(0, 1, SENTENCE, "window", **options)
        return (0.0 if influence else float("inf")), 0.0, "it does not attend to tokens that its memory keeps"

    def _by_steps(self, memory: Cache) -> Tensor:
        first = min(_FIRST, self.ids.shape[1] - 1)
        parts = [self._run(self.ids[:, :first], memory)]
        parts += [self._run(self.ids[:, i : i + 1], memory) for i in range(first, self.ids.shape[1])]
        return torch.cat(parts, 1)

    def steps(self) -> tuple[float, float, str]:
        """Token by token equals one pass."""
        options = {"recent_sentences": 1}
        delta = largest_difference(
            self._run(self.ids, self.make("window+entries", **options)),
            self._by_steps(self.make("window+entries", **options)),
        )
        return delta, self.allowed, "token by token its logits differ from those of one pass"

    def recalling(self) -> tuple[float, float, str]:
        """Token by token with every sentence recalled, it gives the LLM's own logits."""
        memory = self.make("recall", recall=_LENGTH)
        delta = largest_difference(self._run(self.ids, None), self._by_steps(memory))
        return delta, self.allowed, "with every sentence recalled its logits are not its own"

    def batches(self) -> tuple[float, float, str]:
        """A text padded on the left equals the text alone."""
        pad = 3
        text = self.ids[:1, pad:]
        mask = torch.ones_like(self.ids)
        mask[0, :pad] = 0
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        options = {"recent_sentences": 1}
        alone = self._run(text, self.make("window", **options))
        ids = torch.cat([torch.cat([self.ids[:1, :pad], text], 1), self.ids[1:]])
        together = self._run(ids, self.make("window", **options), attention_mask=mask, position_ids=positions)
        return (
            largest_difference(together[:1, pad:], alone),
            self.allowed,
            "in a batch with padding its logits differ",
        )
