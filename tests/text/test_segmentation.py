"""Text to sentences and tokens: nothing lost, nothing too long, nothing special by accident."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sentcompress.contracts import Segmenter, SegmenterOptions
from sentcompress.errors import DataError, PluginError
from sentcompress.text.lossless_tokenizer import lossless
from sentcompress.text.segmentation import checked_split, sentences_to_ids


class Stops(Segmenter):
    """Cuts after full stops."""

    def split(self, text: str) -> list[str]:
        return re.findall(r"[^.]*\.\s*|[^.]+", text)


def stops(max_tokens: int = 64) -> Stops:
    return Stops(SegmenterOptions(max_tokens=max_tokens))


def returning(result: Any) -> Segmenter:
    class Fixed(Segmenter):
        def split(self, text: str) -> list[str]:
            if isinstance(result, Exception):
                raise result
            return result

    return Fixed()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=400), max_tokens=st.integers(4, 20))
def test_any_text_is_kept_and_within_the_limit(
    tokenizer: PreTrainedTokenizerFast, text: str, max_tokens: int
) -> None:
    text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates are replaced before
    sentences = sentences_to_ids(text, stops(max_tokens), tokenizer)
    assert "".join(sentence for sentence, _ in sentences) == text
    for sentence, ids in sentences:
        assert 1 <= len(ids) <= max_tokens
        assert tokenizer.decode(ids) == sentence


def test_long_pieces_are_cut_after_punctuation(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "the people of this nation, the order of this year, the law of this nation, a share of peace"
    pieces = [sentence for sentence, _ in sentences_to_ids(text, stops(8), tokenizer)]
    assert len(pieces) > 1
    assert all(piece.endswith(",") for piece in pieces[:-1])


def test_else_before_white_space_else_between_characters(tokenizer: PreTrainedTokenizerFast) -> None:
    words = [sentence for sentence, _ in sentences_to_ids("zebra " * 20, stops(9), tokenizer)]
    assert all(piece.startswith(" zebra") for piece in words[1:])
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # one emoji of 18 bytes
    emoji = [sentence for sentence, _ in sentences_to_ids(family * 6, stops(40), tokenizer)]
    assert len(emoji) > 1
    assert set("".join(emoji).split(family)) == {""}
    assert all(len(piece) % len(family) == 0 for piece in emoji)


def test_numbers_are_not_cut_at_their_marks(tokenizer: PreTrainedTokenizerFast) -> None:
    text = " ".join(["3,000,000"] * 12)
    pieces = [sentence for sentence, _ in sentences_to_ids(text, stops(20), tokenizer)]
    assert all(piece.strip().endswith("000") for piece in pieces)


def test_a_character_over_the_limit_is_an_error_with_the_fix(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"alone has 4 tokens, more than max_tokens \(2\)") as caught:
        sentences_to_ids("\U0001f600\U0001f600", stops(2), tokenizer)
    assert "max_tokens to 4" in str(caught.value)


def test_special_tokens_in_a_text_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ((_, ids),) = sentences_to_ids("a </s> b <pad>", stops(), tokenizer)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.pad_token_id not in ids
    assert tokenizer.decode(ids) == "a </s> b <pad>"
    # The user's own tokenizer is as it was.
    assert tokenizer.eos_token_id in tokenizer("a </s>")["input_ids"]


def test_truncation_and_padding_of_the_tokenizer_do_not_matter(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "the people of this nation. order. " * 3
    before = sentences_to_ids(text, stops(), tokenizer)
    other = PreTrainedTokenizerFast(tokenizer_object=lossless(tokenizer).backend, pad_token="<pad>")
    other([text, "x"], truncation=True, max_length=2, padding="max_length")
    assert sentences_to_ids(text, stops(), other) == before


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (["One. "], r"the text from character 5 on is missing: 'Two\.'"),
        (["One. ", "two."], r"at character 5 the text has 'Two\.', the sentence 'two\.'"),
        (["One. ", "Tw"], r"from character 7 on is missing: 'o\.'"),
        (["One. ", "Two.", "!"], r"not lossless: at character 9 the text has '', the sentence '!'"),
        (["One. Twö."], r"at character 7 the text has 'o\.', the sentence 'ö\.'"),
        (["One. Two\u0301."], r"at character 8 the text has '\.', the sentence '\\u0301\.'"),
        (["One. ", "", "Two."], r"empty sentence \(number 1\)"),
        ("One. Two.", "must return a list of strings, not str"),
        (("One. ", "Two."), "must return a list of strings, not tuple"),
        (["One. ", b"Two."], "must return a list of strings, but item 1 is bytes"),
        (ValueError("oh"), "failed: ValueError: oh"),
    ],
)
def test_a_segmenter_that_loses_text_is_named(result: Any, message: str) -> None:
    with pytest.raises(PluginError, match=f"Fixed.*{message}") as caught:
        checked_split("One. Two.", returning(result))
    assert caught.value.exit_code == 3


def test_empty_text_has_no_sentences(tokenizer: PreTrainedTokenizerFast) -> None:
    assert sentences_to_ids("", stops(), tokenizer) == []


def test_hostile_text_takes_linear_time(tokenizer: PreTrainedTokenizerFast) -> None:
    began = time.process_time()
    for text in ("x" * 100_000, " " * 100_000, "e\u0301" * 50_000, "," * 100_000):
        sentences = sentences_to_ids(text, stops(), tokenizer)
        assert "".join(sentence for sentence, _ in sentences) == text
    assert time.process_time() - began < 20


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(DataError, match="not a fast tokenizer"):
        lossless(object())
