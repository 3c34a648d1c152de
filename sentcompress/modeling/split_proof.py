"""Proof, on random tokens, that a split LLM sees nothing that comes later and computes the same in all ways of use."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sentcompress.contracts.causal_lm import CACHE, position_limit
from sentcompress.contracts.proof import TOLERANCE, Finding, largest_difference
from sentcompress.errors import InputError, is_out_of_memory
from sentcompress.modeling.split import Split, split_of

SENTENCE, _LENGTH, _PADDING = 3, 16, 2
"""Tokens of a sentence, of a text, and of its padding."""
_CHECKS = ("future", "sentences", "steps", "padding")


class _EqualLengths:
    """Ends a sentence after so many tokens."""

    def begins(self, sentence: list[int], token: int) -> bool:
        return len(sentence) == SENTENCE


def check_split(lm: PreTrainedModel) -> None:
    """Refuse a split LLM that does not compute what it should.

    Raises:
        InputError: says what is wrong.
    """
    for finding in prove_split(lm):
        if not finding.passed:
            raise InputError(
                f"an LLM of type '{lm.config.model_type}' cannot be split: {finding.problem}",
                fix="graft it whole (without graft.split), or use another LLM",
            ) from finding.cause


@torch.no_grad()
def prove_split(lm: PreTrainedModel) -> Iterator[Finding]:
    """Compare a split LLM with itself on other texts, token by token, and in a batch."""
    made = split_of(lm)
    assert made is not None
    training, finder, middle = lm.training, made.finder, made.has_middle
    lm.eval()
    made.finder = _EqualLengths()
    try:
        proof = _Proof(lm, made)
        for name in _CHECKS:
            try:
                delta, allowed, problem = getattr(proof, name)()
            except Exception as error:  # models raise anything
                if is_out_of_memory(error):
                    raise
                short = " ".join(str(error).split())[:160]
                text = f"its forward failed ({type(error).__name__}: {short})"
                yield Finding(name, float("inf"), 0.0, text, error)
                return
            yield Finding(name, delta, allowed, "" if delta <= allowed else problem)
    finally:
        made.finder, made.has_middle = finder, middle
        lm.train(training)


class _Proof:
    def __init__(self, lm: PreTrainedModel, made: Split) -> None:
        self.lm, self.made = lm, made
        table = lm.get_input_embeddings().weight
        self.length = min(_LENGTH, position_limit(lm.config))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, len(table), (2, self.length), generator=generator)
        self.ids, self.vocab_size = ids.to(table.device), len(table)
        self.logits = self._run(self.ids)
        half = next(lm.parameters()).dtype.itemsize < 4
        self.allowed = (2**-5 if half else TOLERANCE) * max(1.0, float(self.logits.abs().max()))

    def _run(self, ids: Tensor, **more: object) -> Tensor:
        return self.lm(input_ids=ids, use_cache=False, **more).logits.float()

    def future(self) -> tuple[float, float, str]:
        """What comes later has no influence at all."""
        seen = self.length // 2
        ids = self.ids.clone()
        ids[:, seen:] = (ids[:, seen:] + 1) % self.vocab_size
        delta = largest_difference(self._run(ids)[:, :seen], self.logits[:, :seen])
        return delta, 0.0, "a token changes the logits of tokens before it"

    def sentences(self) -> tuple[float, float, str]:
        """The middle blocks have an influence, and only after the first sentence."""
        self.made.has_middle = False
        pruned = self._run(self.ids)
        self.made.has_middle = True
        changed = (pruned - self.logits).abs().amax((0, 2)) > self.allowed
        right = not changed[:SENTENCE].any() and bool(changed[SENTENCE:].any())
        return (0.0 if right else float("inf")), 0.0, "its middle blocks do not count where they should"

    def steps(self) -> tuple[float, float, str]:
        """Token by token equals one pass."""
        first = self.length // 2
        output = self.lm(input_ids=self.ids[:, :first], use_cache=True)
        parts = [output.logits]
        for n in range(first, self.length):
            more = {CACHE: getattr(output, CACHE), "use_cache": True}
            output = self.lm(input_ids=self.ids[:, n : n + 1], **more)
            parts.append(output.logits)
        delta = largest_difference(torch.cat(parts, 1).float(), self.logits)
        return delta, self.allowed, "token by token its logits differ from those of one pass"

    def padding(self) -> tuple[float, float, str]:
        """A text padded on the left, in a batch, equals the text alone."""
        mask = torch.ones_like(self.ids)
        mask[0, :_PADDING] = 0
        positions = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
        ids = torch.stack([self.ids[0].roll(_PADDING), self.ids[1]])
        found = self._run(ids, attention_mask=mask, **positions)
        delta = largest_difference(found[0, _PADDING:], self.logits[0, :-_PADDING])
        return delta, self.allowed, "in a batch with padding its logits differ"
