"""The engine with a tiny untrained model: what it writes is junk, how it writes it must be exact."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from sentcompress.errors import InputError
from sentcompress.generation import (
    Generation,
    GenerationSettings,
    SentenceGenerator,
    backbone_cache,
    conditioned_text,
    reconstruct,
)
from sentcompress.generation.compiled import CompiledStep
from sentcompress.generation.round_trip import differences
from sentcompress.recipe import Recipe, build_recipe
from sentcompress.testing import tiny_sentence_lm
from sentcompress.text.lossless_tokenizer import lossless

PROMPTS = [
    "The Union is strong. The people are free. We meet again this year",
    "One sentence only.",
    "the beginning of",
    "A first sentence. A second one! A third, with a comma? And a fourth. And yet one more.",
]


@pytest.fixture(scope="module", params=["k1", "k2-prefix", "k1-context", "k2-prefix-context"])
def generator(request, tokenizer):
    vae = {"max_sentence_tokens": 16}
    if "context" in request.param:
        vae |= {"decoder_context": 11, "decoder_layers": 2}
    if "k2-prefix" in request.param:
        vae |= {"fusion": {"name": "attention", "options": {}}, "latents": 2, "conditioning": "prefix"}
    model = tiny_sentence_lm(len(tokenizer), vae=vae)
    return SentenceGenerator(model, tokenizer)


def run(generator, prompts, **settings):
    # Untrained, the stop flag says 0.5: never stop unless asked.
    return generator.generate(
        prompts, GenerationSettings(**{"max_new_tokens": 40, "stop_threshold": 1, **settings})
    )


def test_batched_equals_alone_and_order_is_kept(generator):
    together = run(generator, PROMPTS)
    assert [g.prompt for g in together] == PROMPTS
    for prompt, result in zip(PROMPTS, together, strict=True):
        assert run(generator, [prompt])[0].token_ids == result.token_ids


def test_no_prompts_give_no_results(generator):
    assert run(generator, []) == []
    assert run(generator, (prompt for prompt in ())) == []


def test_prompts_may_come_as_any_iterable_of_texts(generator):
    expected = [g.text for g in run(generator, PROMPTS[:2])]
    for prompts in (tuple(PROMPTS[:2]), (p for p in PROMPTS[:2]), np.array(PROMPTS[:2])):
        assert [g.text for g in run(generator, prompts)] == expected


@pytest.mark.parametrize(
    ("prompts", "parts"),
    [
        ("Hello", ["prompts must be a list of texts, not str", "generate(["]),
        (b"Hello", ["prompts must be a list of texts, not bytes"]),
        (None, ["prompts must be a list of texts, not NoneType"]),
        ({"input_ids": [1]}, ["prompts must be a list of texts, not dict"]),
        (np.array("Hello"), ["prompts must be a list of texts, not ndarray"]),
        ([""], ["the prompt is empty"]),
        (["Hello", None], ["prompt 2 must be text (str), not NoneType"]),
        ([b"Hello"], ["prompt 1 must be text (str), not bytes"]),
        ([["Hello"]], ["prompt 1 must be text (str), not list"]),
        (np.array([1, 2]), ["prompt 1 must be text (str), not int64"]),
        (["fine", "a\ud800b"], ["prompt 2: character 2 ('\\ud800') is a lone surrogate"]),
        ([os.fsdecode(b"caf\xe9")], ["prompt 1: character 4", "UTF-8"]),
    ],
)
def test_prompts_that_are_not_texts_are_refused(generator, prompts, parts):
    calls = [lambda: run(generator, prompts), lambda: generator.model.generate(prompts, generator.tokenizer)]
    for call in calls:
        with pytest.raises(InputError) as caught:
            call()
        for part in parts:
            assert part in str(caught.value)


@pytest.mark.parametrize("text", [["Hello"], None, 5, "a\ud800", " "])
def test_a_single_text_is_checked_too(generator, text):
    with pytest.raises(InputError, match="prefix"):
        generator.read_prefix(text)
    with pytest.raises(InputError, match="prompt"):
        next(generator.stream(text))


def test_settings_and_tokenizers_of_a_wrong_kind_are_refused(generator):
    with pytest.raises(InputError, match="settings must be a GenerationSettings, not dict"):
        generator.generate(["Hello"], {"max_new_tokens": 5})
    with pytest.raises(InputError, match=r"max_new_token: unknown key. Did you mean 'max_new_tokens'\?"):
        generator.model.generate(["Hello"], generator.tokenizer, max_new_token=5)
    with pytest.raises(InputError, match="temperature: "):
        generator.model.generate(["Hello"], generator.tokenizer, temperature=float("nan"))
    for tokenizer in (None, "out/graft", ["Hello"], b"x"):
        with pytest.raises(InputError, match=r"the tokenizer is .*, not a tokenizer"):
            generator.model.generate(["Hello"], tokenizer)


def test_cached_equals_uncached(generator):
    cached, plain = run(generator, PROMPTS), run(generator, PROMPTS, use_cache=False)
    assert [g.token_ids for g in cached] == [g.token_ids for g in plain]
    assert any(g.token_ids for g in cached)


def test_a_cache_in_8_bits_changes_little(generator):
    contexts = [[[5, 6, 7], [8, 9], [10]], [[11, 12]]]
    full, small = (generator.prefill(contexts, kind) for kind in ("full", "int8"))
    assert small.cache_bytes < 0.6 * full.cache_bytes  # heads of 8: a scale for each takes its share
    for state in (full, small):
        state.append([1, 0], generator.encode([[7, 7], [9]]))
        state.append([1], generator.encode([[5]]))
    difference = (full.hidden_states - small.hidden_states).abs().max()
    assert 0 < difference < 0.05 * full.hidden_states.abs().max()
    assert all(len(g.token_ids) == 40 for g in run(generator, PROMPTS, cache="int8"))


def test_prompts_are_read_a_few_at_a_time_and_equal_ones_once(generator, monkeypatch):
    expected = [g.token_ids for g in run(generator, PROMPTS)]
    monkeypatch.setattr(conditioned_text, "CONTEXT_BATCH_SIZE", 2)
    texts = []
    read = generator.model.vae.decoder.read
    monkeypatch.setattr(
        generator.model.vae.decoder, "read", lambda *given: texts.append(given[3]) or read(*given)
    )
    found = run(generator, [*PROMPTS, *PROMPTS[::-1]])
    assert [g.token_ids for g in found] == expected + expected[::-1]
    assert bool(texts) == bool(generator.model.vae.decoder.context)
    assert sum(texts) <= len(PROMPTS)
    assert max(texts, default=0) <= 2


def test_steps_of_fixed_shape_write_the_same(generator, monkeypatch):
    """What is compiled, not compiled: all ways of telling the decoder, texts that wait and texts that are dropped."""
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    steps = CompiledStep(generator.model.vae.decoder)
    monkeypatch.setattr(generator, "compiled", lambda: steps)
    # Of 16 tokens a sentence is as long as may be: a text that has written it and waits has no free column left.
    for how in ({}, {"sentence_lengths": (16, 3, 9), "max_new_tokens": 70}, {"max_new_sentences": 3}):
        expected = [g.token_ids for g in run(generator, PROMPTS, **how)]
        assert [g.token_ids for g in run(generator, PROMPTS, compile=True, **how)] == expected


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")
def test_a_compiled_step_writes_the_same(tokenizer):
    vae = {"max_sentence_tokens": 16, "decoder_context": 11}
    generator = SentenceGenerator(tiny_sentence_lm(len(tokenizer), vae=vae), tokenizer)
    expected = [g.token_ids for g in run(generator, PROMPTS)]
    steps = generator.compiled()
    found = run(generator, PROMPTS, compile=True)
    assert [g.token_ids for g in found] == expected
    assert generator.compiled() is steps  # compiled once, not for each text


NO_COMPILER = """
from sentcompress.generation import GenerationSettings, SentenceGenerator
from sentcompress.testing import tiny_sentence_lm
from sentcompress.text.lossless_tokenizer import lossless

generator = SentenceGenerator(tiny_sentence_lm(), None)
list(generator.continue_sentences([[[5, 6]]], GenerationSettings(max_new_tokens=3, stop_threshold=1, compile=True)))
"""


@pytest.mark.slow
def test_what_cannot_be_compiled_is_said(tmp_path):
    """In a process of its own, as torch looks for a compiler once, and for what it has compiled before."""
    env = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", NO_COMPILER], env=env, capture_output=True, text=True)
    assert "InputError: compile: torch could not compile" in said.stderr
    assert "no-such-compiler" in said.stderr
    with pytest.raises(ValueError, match="compile needs the cache"):
        GenerationSettings(compile=True, use_cache=False)


def test_an_offloaded_cache_changes_nothing(generator):
    """Without a GPU all that can be seen is that both go the same ways: where they lie is the same here."""
    for kept, offloaded in (("full", "offloaded"), ("int8", "offloaded-int8")):
        expected, found = (run(generator, PROMPTS, cache=kind) for kind in (kept, offloaded))
        assert [g.token_ids for g in found] == [g.token_ids for g in expected]


def test_a_cache_that_is_more_than_keys_and_values_is_done_without(generator, monkeypatch):
    expected = [g.token_ids for g in run(generator, PROMPTS)]
    monkeypatch.setattr(backbone_cache, "DynamicLayer", type("AnotherKindOfLayer", (), {}))
    assert generator.prefill([[[5, 6]]]).cache_bytes == 0
    assert [g.token_ids for g in run(generator, PROMPTS)] == expected


PREFIX = "The Union is old. Say so. No more of it. "


@pytest.mark.parametrize("how", [{}, {"cache": "int8"}, {"use_cache": False}], ids=str)
def test_a_shared_prefix_is_read_once_and_changes_nothing(generator, monkeypatch, how):
    expected = [g.token_ids for g in run(generator, [PREFIX + prompt for prompt in PROMPTS], **how)]
    prefix = generator.read_prefix(PREFIX)
    read = []
    encode = generator.encode
    monkeypatch.setattr(generator, "encode", lambda sentences: read.extend(sentences) or encode(sentences))
    settings = GenerationSettings(max_new_tokens=40, stop_threshold=1, **how)
    for _ in range(2):  # it can be used again
        results = generator.generate(PROMPTS, settings, prefix=prefix)
        assert [g.token_ids for g in results] == expected
    assert len(prefix.sentences) == 3
    assert not any(ids in prefix.sentences[:2] for ids in read)  # the last one is cut before its space
    streamed = "".join(generator.stream(PROMPTS[2], settings, prefix))
    assert streamed == results[2].text
    fragment = generator.generate(["the beginning"], settings, prefix=prefix)  # nothing whole of its own
    assert fragment[0].token_ids == run(generator, [PREFIX + "the beginning"], **how)[0].token_ids


def test_a_prefix_where_nothing_but_whole_caches_can_be_kept(generator, monkeypatch):
    expected = [g.token_ids for g in run(generator, [PREFIX + prompt for prompt in PROMPTS])]
    monkeypatch.setattr(backbone_cache, "DynamicLayer", type("AnotherKindOfLayer", (), {}))
    prefix = generator.read_prefix(PREFIX)
    assert prefix.cache is None
    settings = GenerationSettings(max_new_tokens=40, stop_threshold=1)
    assert [g.token_ids for g in generator.generate(PROMPTS, settings, prefix=prefix)] == expected


@pytest.mark.parametrize("start", [True, False])
def test_a_prefix_that_ends_in_a_sentence_is_shared_up_to_there(tokenizer, start):
    recipe = build_recipe({"name": "tiny", "graft": {"start_latent": start}}, [], "tests")
    generator = SentenceGenerator(tiny_sentence_lm(len(tokenizer), recipe), tokenizer)
    settings = GenerationSettings(max_new_tokens=20, stop_threshold=1)
    for text in ("The people", "It is so. The people"):
        prompts = [f"{text}{rest}" for rest in (" are", " were free. They", ".")]
        expected = [g.token_ids for g in generator.generate(prompts, settings)]
        prefix = generator.read_prefix(text)
        rest = [prompt.removeprefix(text) for prompt in prompts]
        assert [g.token_ids for g in generator.generate(rest, settings, prefix=prefix)] == expected


def test_a_prefix_may_not_be_empty_or_too_long(generator):
    with pytest.raises(InputError, match="the prefix is empty"):
        generator.read_prefix("  ")
    with pytest.raises(InputError, match="the prefix has 700 sentences"):
        generator.read_prefix("It is so. " * 700)


def test_text_is_lossless_against_the_tokens(generator, tokenizer):
    for result in run(generator, PROMPTS):
        assert "".join(result.sentences) == result.text
        unfinished = generator.read(0, type(result)(result.prompt)).unfinished
        everything = tokenizer.decode(unfinished + result.token_ids, skip_special_tokens=True)
        assert everything == tokenizer.decode(unfinished) + result.text


@pytest.mark.parametrize("prompt", PROMPTS[:2])
def test_the_model_says_where_the_last_sentence_of_a_prompt_ends(generator, prompt):
    text = generator.read(0, Generation(prompt))
    assert len(text.sentences) == prompt.count(".") - prompt.endswith(".")
    last = lossless(generator.tokenizer).decode(text.unfinished)
    assert prompt.endswith(last)
    assert last.strip().startswith(("We", "One"))


def test_spaces_at_the_end_of_a_prompt_do_not_matter(generator):
    """Tokens hold a space and the word behind it: a model has never seen the word without it."""
    for prompt in PROMPTS:
        (expected,) = run(generator, [prompt])
        (found,) = run(generator, [prompt + " "])
        assert found.text == expected.text.removeprefix(" ")
        assert found.token_ids == expected.token_ids
        streamed = generator.stream(prompt + " ", GenerationSettings(max_new_tokens=40, stop_threshold=1))
        assert "".join(streamed) == found.text


def test_limits(generator):
    assert all(len(g.token_ids) == 5 for g in run(generator, PROMPTS, max_new_tokens=5))
    two = run(generator, PROMPTS, max_new_tokens=None, max_new_sentences=2)
    assert {g.finish_reason for g in two} == {"length"}
    short = run(generator, PROMPTS[1:2], max_sentence_tokens=3, max_new_sentences=3)
    assert len(short[0].token_ids) <= 9


def test_forced_lengths_count_exactly(generator):
    result = run(generator, PROMPTS[1:2], sentence_lengths=(3, 7), max_new_sentences=4, max_new_tokens=None)[
        0
    ]
    assert len(result.token_ids) == 1 + 7 + 3 + 7  # the prompt's sentence is longer than 3 already


def test_the_stop_flag_stops(generator):
    bias = generator.model.termination.bias
    try:
        with torch.no_grad():
            bias.copy_(torch.tensor([-50.0, 50.0]))
        for result in run(generator, PROMPTS, stop_threshold=0.5):
            assert len(result.token_ids) < 16  # the prompt's last sentence is finished all the same
            assert result.finish_reason == "stop"
    finally:
        with torch.no_grad():
            bias.zero_()


def test_sampling_is_reproducible_and_differs_by_seed(generator):
    first, again, other = (
        run(generator, PROMPTS, do_sample=True, temperature=1.3, top_k=50, top_p=0.9, seed=seed)
        for seed in (1, 1, 2)
    )
    assert [g.token_ids for g in first] == [g.token_ids for g in again]
    assert [g.token_ids for g in first] != [g.token_ids for g in other]


def test_repetition_penalty_changes_greedy_output(generator):
    plain = run(generator, PROMPTS)
    penalized = run(generator, PROMPTS, repetition_penalty=5.0)
    assert [g.token_ids for g in plain] != [g.token_ids for g in penalized]


def test_streaming_gives_the_same_text(generator):
    pieces = list(generator.stream(PROMPTS[0], GenerationSettings(max_new_tokens=40, stop_threshold=1)))
    seen = []
    result = generator.generate(
        PROMPTS[:1],
        GenerationSettings(max_new_tokens=40, stop_threshold=1),
        on_sentence=lambda _, piece: seen.append(piece),
    )[0]
    assert "".join(pieces) == "".join(seen) == result.text


def test_empty_and_overlong_prompts_are_refused(generator):
    with pytest.raises(InputError, match="empty"):
        run(generator, ["  \n"])
    with pytest.raises(InputError, match="context holds"):
        run(generator, ["This is a whole sentence of its own. " * 200])


def test_the_context_filling_up_ends_generation(tokenizer):
    model = tiny_sentence_lm(len(tokenizer), max_position_embeddings=6, vae={"max_sentence_tokens": 8})
    result = run(SentenceGenerator(model, tokenizer), ["One. Two here it is."], max_new_tokens=None)
    assert result[0].finish_reason == "context"


def test_without_a_start_latent_a_lone_fragment_counts_as_a_sentence(tokenizer):
    recipe = Recipe(name="x", graft={"start_latent": False})
    generator = SentenceGenerator(tiny_sentence_lm(len(tokenizer), recipe=recipe), tokenizer)
    assert run(generator, ["the beginning of"])[0].token_ids


def test_reconstruction_shows_what_survived(generator, tokenizer):
    sentences = [tokenizer(text)["input_ids"][:16] for text in ("The people are free.", "a")]
    results = reconstruct(generator.model.vae, tokenizer, sentences)
    assert [r.reference for r in results] == [tokenizer.decode(ids) for ids in sentences]
    for result in results:
        parts = differences(tokenizer, result)
        assert "".join(p.text for p in parts if p.kind != "added") == result.reference
        assert "".join(p.text for p in parts if p.kind != "lost") == result.hypothesis


def test_uneven_texts_go_on_by_themselves(generator):
    """Texts of a large batch end, wait and begin sentences at different times; each writes what it writes alone."""
    prompts = ["We are. " * (n % 5) + f"It is {n}. And" for n in range(14)]
    lengths = (3, 14, 1, 9, 16, 2, 5)
    together = run(generator, prompts, sentence_lengths=lengths, max_new_tokens=60)
    assert len({len(g.sentences) for g in together}) > 2
    for number in (0, 5, 13):
        # A text's place in the batch says where in the draw it begins.
        turned = lengths[number % len(lengths) :] + lengths[: number % len(lengths)]
        alone = run(generator, [prompts[number]], sentence_lengths=turned, max_new_tokens=60)[0]
        assert alone.token_ids == together[number].token_ids
