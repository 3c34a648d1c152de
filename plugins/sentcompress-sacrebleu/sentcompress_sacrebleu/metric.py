"""Translation's scores, of reconstructions."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from sacrebleu.metrics import BLEU, CHRF, TER

import sentcompress


class SacreBLEU(sentcompress.Metric):
    """BLEU, chrF and their kin of the reconstructions, by sacrebleu."""

    class Options(sentcompress.Options):
        scores: list[Literal["bleu", "chrf", "chrf++", "ter"]] = Field(default=["bleu", "chrf"], min_length=1)
        """What to compute, over all sentences at once (not a mean over sentences)."""
        lowercase: bool = False
        """Do not tell upper from lower case (TER never does)."""
        tokenize: Literal["13a", "intl", "char", "zh", "none"] = "13a"
        """How BLEU cuts words: ``13a`` as in WMT, ``zh`` for Chinese, ``char`` for single characters."""

    def compute(self, reconstructions: Sequence[sentcompress.Reconstruction]) -> dict[str, float]:
        # Without any sentence there is nothing to score, and sacrebleu would fail on it.
        if not reconstructions:
            return dict.fromkeys(self.options.scores, float("nan"))
        # Spaces around a sentence belong to the way it was cut, not to what was reconstructed.
        hypotheses = [r.hypothesis.strip() for r in reconstructions]
        references = [[r.reference.strip() for r in reconstructions]]
        return {
            name: float(self._scorer(name).corpus_score(hypotheses, references).score)
            for name in self.options.scores
        }

    def _scorer(self, name: str) -> BLEU | CHRF | TER:
        lowercase = self.options.lowercase
        if name == "bleu":
            # force: a corpus of marks set apart by spaces is as it should be, not a mistake to warn about.
            return BLEU(lowercase=lowercase, tokenize=self.options.tokenize, force=True)
        if name == "ter":
            return TER()
        return CHRF(word_order=2 if name == "chrf++" else 0, lowercase=lowercase)
