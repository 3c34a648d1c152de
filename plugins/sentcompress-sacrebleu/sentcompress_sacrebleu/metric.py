"""Scores of machine translation, for reconstructions."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from sacrebleu.metrics import BLEU, CHRF, TER

import sentcompress


class SacreBLEU(sentcompress.Metric):
    """BLEU, chrF, chrF++ and TER of the reconstructions, by sacrebleu."""

    class Options(sentcompress.Options):
        scores: list[Literal["bleu", "chrf", "chrf++", "ter"]] = Field(default=["bleu", "chrf"], min_length=1)
        """Scores to compute, each over the whole corpus (not a mean over sentences)."""
        lowercase: bool = False
        """Ignore case (TER always does)."""
        tokenize: Literal["13a", "intl", "char", "zh", "none"] = "13a"
        """How BLEU splits words: ``13a`` as in WMT, ``zh`` for Chinese, ``char`` into characters."""

    def compute(self, reconstructions: Sequence[sentcompress.Reconstruction]) -> dict[str, float]:
        # sacrebleu fails if there is no sentence.
        if not reconstructions:
            return dict.fromkeys(self.options.scores, float("nan"))
        # Spaces around a sentence come from the segmenter and should not be scored.
        hypotheses = [r.hypothesis.strip() for r in reconstructions]
        references = [[r.reference.strip() for r in reconstructions]]
        return {
            name: float(self._scorer(name).corpus_score(hypotheses, references).score)
            for name in self.options.scores
        }

    def _scorer(self, name: str) -> BLEU | CHRF | TER:
        lowercase = self.options.lowercase
        if name == "bleu":
            # force: no warning about tokenized text, which reconstructions may be.
            return BLEU(lowercase=lowercase, tokenize=self.options.tokenize, force=True)
        if name == "ter":
            return TER()
        return CHRF(word_order=2 if name == "chrf++" else 0, lowercase=lowercase)
