"""Checks that prove that a SentenceLM does not see the future, and that all ways to run it agree.

Only contents are changed, never shapes, so in fp32 on one machine nothing before the change may move by even one
bit: the required difference is 0.0. Where shapes differ (cached or not, packed or alone, padded left or right)
sums are taken in another order, and equality means within ``TOLERANCE`` of the states' own size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sentcompress.benchmark.measurements.causality import CausalityCheck, CausalityReport
from sentcompress.generation import GenerationSettings, SentenceGenerator
from sentcompress.generation.conditioned_text import ConditionedText
from sentcompress.generation.sentence_writer import SentenceWriter
from sentcompress.modeling.int8 import Int8Linear
from sentcompress.modeling.layers import Ragged
from sentcompress.modeling.losses import TokenLoss
from sentcompress.modeling.sentence_lm import PADDING, START, SentenceLM

TOLERANCE = 1e-4
"""Largest difference of two equal computations, as a share of the largest state (at least 1)."""
INT8_TOLERANCE = 1e-3
"""The same with 8-bit weights: activations are rounded to 14 bits, and another order of a sum may round differently."""


@torch.no_grad()
def check_causality(
    model: SentenceLM,
    *,
    attention: Sequence[str] | None = None,
    sentences: int = 7,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> CausalityReport:
    """Run all checks on a model, in eval mode, on sentences of random tokens.

    Args:
        attention: implementations of the backbone's attention to check; None takes all that are right for it.
        sentences: sentences per passage, reduced to what the backbone has positions for.
        tolerance: for equality where shapes differ; checks of the future have no tolerance.
    """
    was_training = model.training
    model.eval()
    try:
        checks = []
        for name in attention or sorted(model.backbone.attention_implementations(model.backbone.config)):
            with attention_of(model, name):
                checks += _Checks(model, name, sentences, seed, tolerance).run()
        return CausalityReport(checks=checks)
    finally:
        model.train(was_training)


@torch.no_grad()
def first_difference(
    model: SentenceLM, prompt: list[list[int]], one: list[list[int]], two: list[list[int]]
) -> tuple[Tensor, tuple[int, int]] | None:
    """Where two continuations of a prompt part: what the model says there, computed anew without any cache.

    Args:
        prompt, one, two: sentences of token ids, without end marks.

    Returns:
        logits ``[V]`` of the next token in fp32, and the two tokens taken; None if one is the beginning of the other.
    """
    checks = _Checks(model, "", 2, 0, TOLERANCE)
    eos = model.config.eos_token_id
    for n, (x, y) in enumerate(zip(one, two, strict=False)):
        if x == y:
            continue
        at = next((i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), min(len(x), len(y)))
        before = prompt + one[:n]
        states = checks._states(*checks._prompts([before], "left"))[0]
        unseen = states.new_zeros(1 - checks.start, *states.shape[1:])
        writer = SentenceWriter(model.vae, use_cache=False)
        writer.read([ConditionedText(before, torch.cat([unseen, states[:-1]]))])
        logits = model.vae.logits(writer.last_hidden(states[-1:], [x[:at]])[0]).float()
        return logits, (([*x, eos])[at], ([*y, eos])[at])
    return None


@contextmanager
def attention_of(model: SentenceLM, name: str) -> Iterator[None]:
    """Switch the backbone's attention implementation, which transformers looks up at every call."""
    configs = {id(c): c for m in model.backbone.modules() if (c := getattr(m, "config", None)) is not None}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


@dataclass
class _Outputs:
    """What a training forward gives for each sentence of a passage, in the order of the sentences."""

    states: Tensor
    """``[N, k, H]``: of the position of each sentence."""
    nll: Tensor
    """``[N]``: of predicting it."""
    stop: Tensor
    """``[N]``: of the decision after it."""


class _Checks:
    """The checks of one model under one attention implementation."""

    def __init__(
        self, model: SentenceLM, attention: str, sentences: int, seed: int, tolerance: float
    ) -> None:
        self.model, self.attention = model, attention
        rounded = any(isinstance(module, Int8Linear) for module in model.modules())
        self.tolerance = max(tolerance, INT8_TOLERANCE) if rounded else tolerance
        self.device = next(model.parameters()).device
        self.start = int(model.config.start_latent)
        room = model.backbone.max_positions // model.latents - self.start
        self.count = max(2, min(sentences, room))
        self.longest = min(model.config.vae_config.max_sentence_tokens, 9)
        self.random = torch.Generator().manual_seed(seed)
        self.passage = [self._sentence(i) for i in range(self.count)]
        self.other = [self._sentence(i + 3) for i in range(self.count)]
        self.points = sorted({0, self.count // 2, self.count - 2})
        """The sentence after each of these is changed."""

    def run(self) -> list[CausalityCheck]:
        return [
            self.training_forward(),
            self.packed_rows(),
            self.packed_equals_alone(),
            self.prefill("left"),
            self.prefill("right"),
            self.left_equals_right(),
            self.cached_decoding(),
            self.cached_equals_uncached(),
            self.sentence_decoder(),
            self.generation_cached(),
            self.generation_batched(),
        ]

    # ---- inputs

    def _sentence(self, i: int) -> list[int]:
        length = 1 + (3 * i) % self.longest
        return self._tokens(length)

    def _tokens(self, length: int) -> list[int]:
        config = self.model.config.vae_config
        special = {config.bos_token_id, config.eos_token_id, config.pad_token_id}
        ids = torch.randint(0, config.vocab_size, (length,), generator=self.random).tolist()
        return [t if t not in special else (max(special) + 1) % config.vocab_size for t in ids]

    def _changed(self, sentence: list[int]) -> list[int]:
        """Other tokens, as many."""
        new = self._tokens(len(sentence))
        vocab = self.model.config.vae_config.vocab_size
        return [(b + 1) % vocab if a == b else b for a, b in zip(sentence, new, strict=True)]

    def _with_changes(self, passage: list[list[int]], at: int) -> list[list[int]]:
        """The passage with every sentence from ``at`` on changed."""
        return passage[:at] + [self._changed(s) for s in passage[at:]]

    def _padded(self, sentences: list[list[int]]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([len(s) for s in sentences])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.full(mask.shape, self.model.config.pad_token_id)
        ids[mask] = torch.tensor([t for s in sentences for t in s])
        return ids.to(self.device), mask.long().to(self.device)

    def _forward(self, rows: list[list[list[list[int]]]]) -> list[list[_Outputs]]:
        """The training forward of rows of passages of sentences; outputs by row and passage."""
        flat = [s for row in rows for passage in row for s in passage]
        index: list[list[int]] = []
        ids: list[list[int]] = []
        last: list[bool] = []
        spans: list[list[tuple[int, int, int]]] = []
        for row in rows:
            row_index, passages, starts = [], [], []
            for number, passage in enumerate(row):
                row_index += [START] * self.start
                starts.append((len(row_index), len(last), len(passage)))
                row_index += range(len(last), len(last) + len(passage))
                passages += [number] * (len(passage) + self.start)
                last += [False] * (len(passage) - 1) + [True]
            index.append(row_index)
            ids.append(passages)
            spans.append(starts)
        width = max(map(len, index))
        input_ids, mask = self._padded(flat)
        output = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            sentence_index=_rectangle(index, width, PADDING).to(self.device),
            passage_ids=_rectangle(ids, width, -1).to(self.device),
            scored=torch.ones(len(flat), dtype=torch.bool, device=self.device),
            last=torch.tensor(last, device=self.device),
            token_loss=TokenLoss(gamma=0.0),
        )
        return [
            [
                _Outputs(
                    output.hidden_states[row, position : position + n],
                    output.sentence_nll[first : first + n],
                    output.stop_nll[first : first + n],
                )
                for position, first, n in starts
            ]
            for row, starts in enumerate(spans)
        ]

    def _prompts(self, passages: list[list[list[int]]], side: str) -> tuple[Tensor, Tensor, Tensor]:
        """Rows as prompts: inputs ``[R, N, k, H]``, passage ids and positions ``[R, N]``, padded on a side."""
        flat, index, first = [s for p in passages for s in p], [], 0
        width = max(len(p) for p in passages) + self.start
        for passage in passages:
            row = [START] * self.start + list(range(first, first + len(passage)))
            padding = [PADDING] * (width - len(row))
            index.append(padding + row if side == "left" else row + padding)
            first += len(passage)
        sentence_index = torch.tensor(index, device=self.device)
        inputs = self.model.rows(self.model.encode(*self._padded(flat)), sentence_index)
        passage_ids = torch.where(sentence_index == PADDING, -1, 0)
        return inputs, passage_ids, (passage_ids >= 0).long().cumsum(1) - 1

    def _states(
        self, inputs: Tensor, passage_ids: Tensor, positions: Tensor, prefilled: int | None = None
    ) -> Tensor:
        """Backbone states ``[R, N, k, H]``: at once, or one position at a time with a cache after a prefill."""
        valid = passage_ids >= 0
        if prefilled is None:
            return self.model.backbone_states(inputs, valid, passage_ids, positions)[0]
        found: list[Tensor] = []
        cache: Any = None
        for begin, end in [(0, prefilled), *((i, i + 1) for i in range(prefilled, inputs.shape[1]))]:
            states, cache = self.model.backbone_states(
                inputs[:, begin:end],
                valid[:, begin:end],
                passage_ids[:, begin:end],
                positions[:, begin:end],
                past_key_values=cache,
                past_passage_ids=passage_ids[:, :begin] if begin else None,
                use_cache=True,
            )
            found.append(states)
        return torch.cat(found, 1)

    # ---- nothing before a point may depend on what comes after it

    def training_forward(self) -> CausalityCheck:
        before = self._forward([[self.passage]])[0][0]
        deltas, effects = [], []
        for t in self.points:
            after = self._forward([[self._with_changes(self.passage, t + 1)]])[0][0]
            deltas += [
                _delta(before.states[: t + 1], after.states[: t + 1]),
                _delta(before.nll[: t + 1], after.nll[: t + 1]),
                # The decision after sentence t is what may not know whether another sentence comes.
                _delta(before.stop[: t + 1], after.stop[: t + 1]),
            ]
            effects.append(_delta(before.states[t + 1 :], after.states[t + 1 :]))
        return self._future("training forward", deltas, effects)

    def packed_rows(self) -> CausalityCheck:
        """Of two passages in one row, neither sees the other, whichever comes first."""
        before = self._forward([[self.passage, self.other]])[0]
        later = self._forward([[self.passage, self._with_changes(self.other, 0)]])[0]
        earlier = self._forward([[self._with_changes(self.passage, 0), self.other]])[0]
        deltas, effects = [], []
        for kept, changed, after in ((0, 1, later), (1, 0, earlier)):
            deltas += [
                _delta(before[kept].states, after[kept].states),
                _delta(before[kept].nll, after[kept].nll),
                _delta(before[kept].stop, after[kept].stop),
            ]
            effects.append(_delta(before[changed].states, after[changed].states))
        return self._future("packed rows", deltas, effects)

    def prefill(self, side: str) -> CausalityCheck:
        short = self.other[: self.count // 2]
        before = self._states(*self._prompts([self.passage, short], side), prefilled=self.count + self.start)
        deltas, effects = [], []
        for t in self.points:
            changed = self._with_changes(self.passage, t + 1)
            after = self._states(*self._prompts([changed, short], side), prefilled=self.count + self.start)
            end = self.start + t + 1
            deltas += [_delta(before[0, :end], after[0, :end]), _delta(before[1], after[1])]
            effects.append(_delta(before[0, end:], after[0, end:]))
        return self._future(f"prefill, {side} padding", deltas, effects)

    def cached_decoding(self) -> CausalityCheck:
        """With the prompt in the cache, later sentences change no earlier output and no other row."""
        short = self.other[: self.count // 2]
        prefilled = self.start + 1
        before = self._states(*self._prompts([self.passage, short], "left"), prefilled=prefilled)
        deltas, effects = [], []
        for t in self.points:
            changed = self._with_changes(self.passage, t + 1)
            after = self._states(*self._prompts([changed, short], "left"), prefilled=prefilled)
            end = self.start + t + 1
            deltas += [_delta(before[0, :end], after[0, :end]), _delta(before[1], after[1])]
            effects.append(_delta(before[0, end:], after[0, end:]))
        return self._future("cached decoding", deltas, effects)

    def sentence_decoder(self) -> CausalityCheck:
        """Within a sentence, a later token changes no earlier state of the decoder."""
        vae = self.model.vae
        ids = self._tokens(self.longest)
        latents = self.model.encode(*self._padded([ids]))
        layout = Ragged(torch.tensor([len(ids)], device=self.device))

        def states(tokens: list[int]) -> Tensor:
            return vae.decoder(vae.embed_targets(torch.tensor(tokens, device=self.device)), layout, latents)

        before, cut = states(ids), len(ids) // 2
        after = states(ids[:cut] + self._changed(ids[cut:]))
        return self._future(
            "tokens in the decoder", [_delta(before[:cut], after[:cut])], [_delta(before[cut:], after[cut:])]
        )

    # ---- all ways to compute the same agree

    def packed_equals_alone(self) -> CausalityCheck:
        packed = self._forward([[self.passage, self.other], [self.other[:2]]])
        pairs = []
        for outputs, passage in (
            (packed[0][0], self.passage),
            (packed[0][1], self.other),
            (packed[1][0], self.other[:2]),
        ):
            alone = self._forward([[passage]])[0][0]
            pairs += [(outputs.states, alone.states), (outputs.nll, alone.nll), (outputs.stop, alone.stop)]
        return self._equal("packed equals alone", pairs)

    def left_equals_right(self) -> CausalityCheck:
        short = self.other[: self.count // 2]
        rows = [self.passage, short]
        left = self._states(*self._prompts(rows, "left"))
        right = self._states(*self._prompts(rows, "right"))
        alone = [self._states(*self._prompts([row], "left"))[0] for row in rows]
        pairs = []
        for row, states in enumerate(alone):
            pairs += [(left[row, -len(states) :], states), (right[row, : len(states)], states)]
        return self._equal("padding left equals right equals none", pairs)

    def cached_equals_uncached(self) -> CausalityCheck:
        prompts = self._prompts([self.passage, self.other[: self.count // 2]], "left")
        real = prompts[1] >= 0
        uncached = self._states(*prompts)[real]
        pairs = [
            (self._states(*prompts, prefilled=n)[real], uncached) for n in (1, self.count // 2, self.count)
        ]
        return self._equal("cached equals uncached", pairs)

    def generation_cached(self) -> CausalityCheck:
        prompts = [self.passage[:2], self.other[:1]]
        return self._same_tokens(
            "greedy: cached equals uncached",
            prompts,
            self._write(prompts),
            self._write(prompts, use_cache=False),
        )

    def generation_batched(self) -> CausalityCheck:
        prompts = [self.passage[:2], self.other[:1], self.passage[1:2]]
        alone = [self._write([prompt])[0] for prompt in prompts]
        return self._same_tokens("greedy: batched equals alone", prompts, self._write(prompts), alone)

    def _write(self, prompts: list[list[list[int]]], use_cache: bool = True) -> list[list[list[int]]]:
        """Sentences written greedily after each prompt."""
        written: list[list[list[int]]] = [[] for _ in prompts]
        longest = min(8, self.model.config.vae_config.max_sentence_tokens)
        settings = GenerationSettings(
            max_new_sentences=3, max_sentence_tokens=longest, stop_threshold=1, use_cache=use_cache
        )
        generator = SentenceGenerator(self.model, None)
        for number, sentence in generator.continue_sentences(prompts, settings):
            written[number].append(sentence)
        return written

    # ---- verdicts

    def _future(self, name: str, deltas: list[float], effects: list[float]) -> CausalityCheck:
        delta, effect = max(deltas), min(effects)
        detail = ""
        if not effect > 0:
            detail = "changing sentences had no effect at all, so this check proves nothing"
        return self._check(
            name, "future", delta, 0.0, passed=delta == 0.0 and effect > 0, effect=effect, detail=detail
        )

    def _equal(self, name: str, pairs: list[tuple[Tensor, Tensor]]) -> CausalityCheck:
        delta = max(_delta(a, b) for a, b in pairs)
        allowed = self.tolerance * max(1.0, *(float(b.abs().max()) for _, b in pairs))
        return self._check(name, "equality", delta, allowed, passed=delta <= allowed)

    def _same_tokens(
        self, name: str, prompts: list[list[list[int]]], a: list[list[list[int]]], b: list[list[list[int]]]
    ) -> CausalityCheck:
        """Token for token; where two tokens differ, their logits must be a tie within the tolerance."""
        delta, allowed, ties = 0.0, self.tolerance, 0
        for prompt, one, two in zip(prompts, a, b, strict=True):
            if one == two:
                continue
            ties += 1
            gap, scale = self._gap(prompt, one, two)
            delta, allowed = max(delta, gap), max(allowed, self.tolerance * scale)
        detail = (
            f"{ties} of {len(prompts)} differ after an exact tie of two tokens"
            if ties and delta <= allowed
            else ""
        )
        if delta > allowed:
            detail = "other tokens were written"
        return self._check(name, "equality", delta, allowed, passed=delta <= allowed, detail=detail)

    def _gap(
        self, prompt: list[list[int]], one: list[list[int]], two: list[list[int]]
    ) -> tuple[float, float]:
        """How far apart the logits of the first differing tokens are, and the size of the logits."""
        found = first_difference(self.model, prompt, one, two)
        if found is None:
            return float("inf"), 1.0  # one wrote more sentences than the other
        logits, (first, second) = found
        return float((logits[first] - logits[second]).abs()), float(logits.abs().max())

    def _check(self, name: str, kind: str, delta: float, tolerance: float, **rest: Any) -> CausalityCheck:
        return CausalityCheck(
            name=name, kind=kind, attention=self.attention, max_delta=delta, tolerance=tolerance, **rest
        )


def _rectangle(rows: list[list[int]], width: int, fill: int) -> Tensor:
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def _delta(a: Tensor, b: Tensor) -> float:
    """Largest difference; infinite when one of the two is not finite, so that NaN is never equal to anything."""
    if not a.numel():
        return 0.0
    difference = (a.double() - b.double()).abs().max()
    return float(difference) if torch.isfinite(difference) else float("inf")
