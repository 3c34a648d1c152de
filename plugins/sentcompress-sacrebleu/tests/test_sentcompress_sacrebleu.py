import math

import pytest
import sacrebleu

from sentcompress import Reconstruction
from sentcompress.errors import RecipeError
from sentcompress.registry import get_registry

ALL = {"scores": ["bleu", "chrf", "chrf++", "ter"]}
PAIRS = [
    ("The people of this nation have seen peace. ", "The people of this nation have seen war. "),
    ("No law was read with more care; none. ", "No law was read with care; none."),
    ("It is so.\n", "It is so."),
]


def compute(pairs, **options):
    metric = get_registry().create("metric", "sacrebleu", options)
    return metric.compute([Reconstruction(a, b, (1,), (1,)) for a, b in pairs])


def test_it_fulfils_the_contract_of_a_metric(check_plugin):
    check_plugin("metric", "sacrebleu")
    check_plugin("metric", "sacrebleu", options=ALL)


def test_it_says_what_sacrebleu_says():
    hypotheses, references = [b.strip() for _, b in PAIRS], [[a.strip() for a, _ in PAIRS]]
    assert compute(PAIRS, **ALL) == {
        "bleu": sacrebleu.corpus_bleu(hypotheses, references).score,
        "chrf": sacrebleu.corpus_chrf(hypotheses, references).score,
        "chrf++": sacrebleu.corpus_chrf(hypotheses, references, word_order=2).score,
        "ter": sacrebleu.corpus_ter(hypotheses, references).score,
    }


def test_the_ends_of_the_scale():
    perfect = compute([(a, a) for a, _ in PAIRS], **ALL)
    assert perfect == {
        "bleu": pytest.approx(100),
        "chrf": pytest.approx(100),
        "chrf++": pytest.approx(100),
        "ter": 0.0,
    }
    lost = compute([(a, "") for a, _ in PAIRS])
    assert lost == {"bleu": 0.0, "chrf": 0.0}
    assert all(math.isnan(value) for value in compute([]).values())


def test_case_and_words():
    pairs = [("THE PEOPLE OF THIS NATION.", "the people of this nation.")]
    assert compute(pairs)["bleu"] < 50 < compute(pairs, lowercase=True)["bleu"]
    chinese = [("我们今天去看电影吧", "我们今天去看话剧吧")]
    assert compute(chinese)["bleu"] < compute(chinese, tokenize="zh")["bleu"]


def test_a_score_it_does_not_have():
    with pytest.raises(RecipeError, match="scores"):
        compute(PAIRS, scores=["meteor"])
