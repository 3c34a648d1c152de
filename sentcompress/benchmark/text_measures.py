"""Measures of generated text, with the contribution of each prompt, from which intervals are drawn. No torch."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sentcompress.benchmark.measurements.quality import QualityScore
from sentcompress.benchmark.measurements.text import BootstrapInterval, TextScore
from sentcompress.registry import get_registry
from sentcompress.text.lossless_tokenizer import LosslessTokenizer
from sentcompress.text.segmentation import checked_split

RESAMPLES = 4000
LOOP_TOKENS = 32
"""A sample loops if this many tokens at its end are one cycle."""
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True)
class Measure:
    """A total over all samples divided by their size.

    Attributes:
        total: over all samples.
        lost: ``[N]``, what the total would lose without each sample.
        sizes: ``[N]``.
    """

    total: float
    lost: np.ndarray
    sizes: np.ndarray

    @property
    def value(self) -> float:
        """NaN if there is nothing to divide by."""
        size = float(self.sizes.sum())
        return self.total / size if size else math.nan

    @property
    def by_prompt(self) -> np.ndarray | None:
        """``[N]`` values whose mean is ``value``; None if leaving one sample out leaves nothing.

        They come from leaving one prompt out at a time (the jackknife), and are the samples' own values where the
        measure is their mean. Resampling them, and not the samples, keeps distinct n-grams right: a sample that
        is drawn twice would repeat itself word for word.
        """
        left = self.sizes.sum() - self.sizes
        if not left.all():
            return None
        without = (self.total - self.lost) / left
        return self.value + (len(without) - 1) * (without.mean() - without)


def sum_over(own: Sequence[float], sizes: Sequence[float]) -> Measure:
    """A ratio of two sums."""
    return Measure(float(np.sum(own)), np.asarray(own, np.float64), np.asarray(sizes, np.float64))


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def distinct(samples: Sequence[Sequence[Hashable]], n: int) -> Measure:
    """Unique n-grams over all n-grams, of all samples together."""
    grams = [_grams(sample, n) for sample in samples]
    inside = [set(g) for g in grams]
    found = Counter(gram for unique in inside for gram in unique)
    lost = [sum(found[gram] == 1 for gram in unique) for unique in inside]
    return Measure(float(len(found)), np.array(lost, np.float64), np.array([len(g) for g in grams]))


def repetition(samples: Sequence[Sequence[Hashable]], n: int) -> Measure:
    """Share of n-grams that occurred in the same sample before (seq-rep-n)."""
    grams = [_grams(sample, n) for sample in samples]
    return sum_over([len(g) - len(set(g)) for g in grams], [len(g) for g in grams])


def loops(samples: Sequence[Sequence[Hashable]]) -> Measure:
    """Share of samples that end in a loop."""
    return sum_over([float(ends_in_loop(sample)) for sample in samples], [1.0] * len(samples))


def ends_in_loop(sample: Sequence[Hashable]) -> bool:
    """Whether the last ``LOOP_TOKENS`` tokens, or more, are one cycle that comes at least twice."""
    newest = list(reversed(sample))
    for period in range(1, len(newest) // 2 + 1):
        looked_at = max(LOOP_TOKENS, 2 * period)
        if looked_at <= len(newest) and newest[period:looked_at] == newest[: looked_at - period]:
            return True
    return False


def measure_texts(
    texts: Sequence[str], tokenizer: LosslessTokenizer, judged: QualityScore | None = None
) -> dict[str, Measure]:
    """All measures of one system's texts, by name; those with nothing to divide by are left out.

    Args:
        texts: one for each prompt.
        tokenizer: the run's; repetition is counted in its tokens.
        judged: the texts' score under a judge.
    """
    # Whole sentences in every run, whatever its own segmenter cuts.
    segmenter = get_registry().create("segmenter", "regex", {"preset": "sentence"})
    text_words, tokens = (
        [words(text) for text in texts],
        [tokenizer.encode(text, begins=False) for text in texts],
    )
    lengths = [len(sample) for sample in text_words]
    sentences = [sum(bool(words(piece)) for piece in checked_split(text, segmenter)) for text in texts]
    found = {
        "repeated_4_grams": repetition(tokens, 4),
        "loops": loops(tokens),
        **{f"distinct_{n}": distinct(text_words, n) for n in range(1, 5)},
        "words": sum_over(lengths, [1.0] * len(texts)),
        "sentence_words": sum_over(lengths, sentences),
    }
    if judged:
        bits = [document.nats / math.log(2) for document in judged.documents]
        found["judge_bits_per_byte"] = sum_over(bits, [document.bytes for document in judged.documents])
    return {name: measure for name, measure in found.items() if not math.isnan(measure.value)}


def score_texts(
    system: str,
    texts: Sequence[str],
    measured: Mapping[str, Measure],
    baseline: Mapping[str, Measure] | None,
    seed: int,
) -> TextScore:
    """A system's measures with their intervals, and their differences to the baseline's, prompt by prompt.

    Args:
        baseline: measures of the system it is compared with; None leaves differences out.
        seed: of the bootstrap.
    """
    differences = {}
    for name, theirs in (baseline or {}).items():
        if name not in measured:
            continue
        mine = measured[name]
        a, b = mine.by_prompt, theirs.by_prompt
        paired = None if a is None or b is None else a - b
        differences[name] = interval(paired, mine.value - theirs.value, seed)
    return TextScore(
        system=system,
        texts=list(texts),
        measures={name: interval(m.by_prompt, m.value, seed) for name, m in measured.items()},
        differences=differences,
    )


def interval(values: np.ndarray | None, value: float, seed: int) -> BootstrapInterval:
    """The 95% bootstrap interval of the mean of values of prompts.

    Args:
        values: ``[N]``, or None if there is no interval.
        value: the figure the interval belongs to.
        seed: the same one draws the same prompts.
    """
    if values is None:
        return BootstrapInterval(value=value)
    drawn = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(1), (0.025, 0.975)).tolist()
    return BootstrapInterval(value=value, low=low, high=high)


def _grams(sample: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return list(zip(*(sample[i:] for i in range(n)), strict=False))
