"""The fixed segmenter with a real byte-level BPE, trained here."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sentcompress.errors import InputError, RunError
from sentcompress.segmenters.fixed import FixedSegmenter

TEXT = "The old man went to the market. He bought fish, bread and 12 eggs; then he left. 你好。 Ünïcödé 😀!\n"


def _tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator([TEXT] * 20, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=inner)


TOKENIZER = _tokenizer()


def segmenter(tokens: int = 4) -> FixedSegmenter:
    made = FixedSegmenter(FixedSegmenter.Options(tokens=tokens))
    made.prepare(TOKENIZER)
    return made


@given(
    text=st.text(st.characters(), max_size=60) | st.text("😀👍🏽\ud800 a\n", max_size=30),
    tokens=st.integers(1, 9),
)
def test_nothing_is_lost(text: str, tokens: int) -> None:
    pieces = segmenter(tokens).split(text)
    assert "".join(pieces) == text
    assert all(pieces)


def test_pieces_have_the_tokens_asked_for() -> None:
    pieces = segmenter(4).split("The old man went to the market. He bought fish, bread and eggs.")
    sizes = [len(TOKENIZER(piece, add_special_tokens=False)["input_ids"]) for piece in pieces]
    assert set(sizes[:-1]) == {4}
    assert 1 <= sizes[-1] <= 4
    assert all(piece.startswith(" ") for piece in pieces[1:] if piece.lstrip()[0].isupper())


def test_a_character_of_several_tokens_stays_whole() -> None:
    assert segmenter(1).split("🦄🦄") == ["🦄", "🦄"]


def test_split_before_prepare_is_a_clear_error() -> None:
    with pytest.raises(RunError, match=r"prepare\(tokenizer\)"):
        FixedSegmenter().split("text")


def test_a_slow_tokenizer_is_refused() -> None:
    slow: Any = object()
    with pytest.raises(InputError, match="fast tokenizer"):
        FixedSegmenter().prepare(slow)


def test_more_tokens_than_the_limit_are_refused() -> None:
    with pytest.raises(ValidationError, match="must not exceed max_tokens"):
        FixedSegmenter.Options(tokens=65)
