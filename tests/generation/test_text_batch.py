"""Texts that join a batch and leave it while others are being written: each gets what it would get alone."""

from __future__ import annotations

import pytest

from sentcompress.generation import Generation, GenerationSettings, SentenceGenerator
from sentcompress.generation.sentence_writer import Sampler
from sentcompress.generation.text_batch import TextBatch
from sentcompress.testing import tiny_sentence_lm

PROMPTS = [
    "The Union is strong. The people are free. We meet again this year",
    "One sentence only.",
    "the beginning of",
    "A first sentence. A second one! A third, with a comma? And a fourth. And yet one more.",
    "A first sentence. A second one! Then something else",
]
VAES = {
    "k1": {"max_sentence_tokens": 16},
    "k2-prefix": {
        "max_sentence_tokens": 16,
        "fusion": {"name": "attention", "options": {}},
        "latents": 2,
        "conditioning": "prefix",
    },
    "k1-context": {"max_sentence_tokens": 16, "decoder_context": 11, "decoder_layers": 2},
}


@pytest.fixture(scope="module", params=list(VAES))
def generator(request, tokenizer):
    return SentenceGenerator(tiny_sentence_lm(len(tokenizer), vae=VAES[request.param]), tokenizer)


def settings(number: int = 0, **changes) -> GenerationSettings:
    """Greedy for even numbers, sampling with a seed of its own for odd ones; lengths differ."""
    sampling = {"do_sample": True, "temperature": 0.9, "top_p": 0.8, "seed": number} if number % 2 else {}
    return GenerationSettings(max_new_tokens=20 + 9 * number, stop_threshold=1, **sampling | changes)


def state(generator: SentenceGenerator, number: int, **changes):
    text = generator.read(number, Generation(PROMPTS[number]))
    text.settings = settings(number, **changes)
    text.sampler = Sampler(text.settings, generator.device)
    return text


@pytest.mark.parametrize("kind", ["full", "int8"])
@pytest.mark.parametrize("every", [0, 1, 7])
def test_a_text_that_joins_later_gets_what_it_gets_alone(generator, every, kind):
    alone = [
        generator.generate([prompt], settings(number, cache=kind))[0].token_ids
        for number, prompt in enumerate(PROMPTS)
    ]
    batch = TextBatch(generator, settings(cache=kind))
    waiting = [state(generator, number) for number in range(len(PROMPTS))]
    texts, step = list(waiting), 0
    while waiting or batch.busy:
        while waiting and step >= every * (len(texts) - len(waiting)):
            batch.join([waiting.pop(0)])
        batch.step()
        step += 1
    assert [text.result.token_ids for text in texts] == alone
    assert batch.cache_bytes == 0, "nothing is left of texts that have ended"


def test_dropping_a_text_leaves_the_others_as_they_are(generator):
    alone = [generator.generate([PROMPTS[n]], settings(n))[0].token_ids for n in (0, 3)]
    batch = TextBatch(generator, settings())
    texts = [state(generator, n) for n in (0, 1, 2, 3)]
    batch.join(texts)
    batch.drop(texts[1])
    for _ in range(5):
        batch.step()
    before = batch.cache_bytes
    batch.drop(texts[2])
    batch.drop(texts[2])  # once is enough
    while batch.busy:
        batch.step()
        assert batch.cache_bytes <= 2 * before
    assert [texts[n].result.token_ids for n in (0, 3)] == alone
    assert [texts[n].result.finish_reason for n in (1, 2)] == ["dropped", "dropped"]


def test_a_prefix_is_shared_by_a_text_that_joins(generator):
    (alone,) = generator.generate([PROMPTS[4]], settings(4))
    prefix = generator.read_prefix(PROMPTS[3])
    batch = TextBatch(generator, settings())
    batch.join([state(generator, 0)])
    for _ in range(3):
        batch.step()
    text = state(generator, 4)
    common = prefix.common([text.sentences])
    assert 0 < len(common.sentences) <= len(text.sentences)
    batch.join([text], common)
    while batch.busy:
        batch.step()
    assert text.result.token_ids == alone.token_ids
