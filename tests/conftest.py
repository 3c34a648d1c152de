"""Fixtures of the whole suite: a real tokenizer, text files, a token cache of the suite's own."""

from __future__ import annotations

import os

# Before torch is imported, and for the processes that tests start: the models are tiny, and as many threads as cores in
# each of several workers only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = """the people of this nation have seen in every year a greater share of peace and order than
Congress could promise when it first met here under a law that few men had read with care"""
WORDS = TEXT.split()
MARKS = (". ", ". ", ". ", "? ", "! ", "; ", ".\n\n")


def _make_text(sentences: int, seed: int) -> str:
    """English-looking sentences of 1 to 60 words, most of them short."""
    rng = random.Random(seed)
    written = []
    for _ in range(sentences):
        words = rng.choices(WORDS, k=min(60, 1 + int(rng.expovariate(1 / 12))))
        written.append(" ".join(words).capitalize() + rng.choice(MARKS))
    return "".join(written)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every test session has a token cache of its own, and the user's is left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SENTCOMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def make_text() -> Callable[[int, int], str]:
    """``make_text(sentences, seed)``: English-looking text."""
    return _make_text


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 1,000 tokens with OPT's special tokens; it encodes any text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [_make_text(200, seed) for seed in range(3)]
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def text_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 text files of 1 to 120 sentences."""
    folder = tmp_path_factory.mktemp("texts")
    for number, sentences in enumerate((1, 2, 3, 5, 9, 17, 24, 40, 64, 65, 90, 120)):
        (folder / f"{number:02d}.txt").write_text(_make_text(sentences, 100 + number), encoding="utf-8")
    return folder
