"""The regex segmenter: lossless, deterministic, linear; what the presets and options mean."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sentcompress.segmenters.regex import RegexSegmenter

PRESETS = ("sentence", "clause", "paper")
MARKS = (
    ".,!?;:\"'()[]{}<>*_~`-=#—–…“”‘’«»。，！？；：、「」။།;\u037e၊ \t\n\r\x00\x0b\x1c\x85\u2028\u3000\ud800"
)
WORDS = (
    "Mr.",
    "U.S.",
    " He",
    "e.g.",
    "```",
    "\n- ",
    "\n\n",
    "1.",
    "...",
    ". . .",
    ":-)",
    "[12]",
    "http://a.b/",
    "z. B. ",
    "EE. UU.",
    " am 3. ",
    "είναι;",
)
NASTY = st.lists(st.sampled_from([*MARKS, *"aAIé中とを1😀✅🏽\u200d", *WORDS]), max_size=60).map("".join)
ANY_TEXT = st.text(st.characters(), max_size=200)  # lone surrogates too


def segmenter(preset: str = "sentence", **options: object) -> RegexSegmenter:
    return RegexSegmenter(RegexSegmenter.Options(preset=preset, **options))


def check(text: str, pieces: list[str]) -> None:
    assert "".join(pieces) == text
    assert all(pieces)
    if text and not text.isspace():
        assert not any(piece.isspace() for piece in pieces)


@pytest.mark.parametrize("preset", PRESETS)
@given(text=ANY_TEXT | NASTY, least=st.none() | st.integers(0, 40))
def test_nothing_is_lost_and_the_same_text_is_cut_the_same(preset: str, text: str, least: int | None) -> None:
    pieces = segmenter(preset, min_chars=least).split(text)
    check(text, pieces)
    assert segmenter(preset, min_chars=least).split(text) == pieces


@pytest.mark.parametrize("preset", PRESETS)
@given(text=NASTY)
def test_white_space_stands_where_the_convention_wants_it(preset: str, text: str) -> None:
    for piece in segmenter(preset).split(text)[1:]:
        space = piece[: len(piece) - len(piece.lstrip())]
        assert "\n" not in space
        assert "\r" not in space


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "unit",
    [
        *'." ()\n😀。“—]-=',
        *[
            "a.",
            "A.B.C.",
            "a. ",
            "A. ",
            "\na",
            '."',
            "[1]",
            "![12]",
            ". 😀",
            "(a. ",
            "x\n- ",
            "\t\n",
            "你好。”他说",
            "\n```\n",
            "z. B. ",
            "αα; ",
            "am 3. Ö",
            "EE. ",
            "။",
        ],
    ],
)
def test_a_hostile_text_takes_linear_time(preset: str, unit: str) -> None:
    size = 1_000_000 if unit in (*'." (', "a.", "A.B.C.") else 200_000
    text = (unit * size)[:size] + "x"
    start = time.process_time()
    check(text, segmenter(preset).split(text))
    # A second or two on an idle machine; a quadratic rule would take many minutes.
    assert time.process_time() - start < 20


def test_no_text_gives_no_piece() -> None:
    assert all(segmenter(preset).split("") == [] for preset in PRESETS)


def test_short_pieces_join_a_neighbour() -> None:
    text = "Yes. No. I do not think so."
    assert segmenter().split(text) == ["Yes.", " No.", " I do not think so."]
    assert segmenter(min_chars=8).split(text) == ["Yes. No.", " I do not think so."]
    assert segmenter("clause").split("Well, he left, and she stayed.") == [
        "Well, he left,",
        " and she stayed.",
    ]
    assert segmenter("clause", min_chars=0).split("Well, he left.") == ["Well,", " he left."]


def test_a_short_last_piece_joins_the_one_before() -> None:
    assert segmenter(min_chars=8).split("I do not think so. No.") == ["I do not think so. No."]


def test_the_paper_preset_joins_only_when_asked() -> None:
    assert segmenter("paper").split("So, yes.") == ["So,", " yes."]
    assert segmenter("paper", min_chars=4).split("So, yes.") == ["So, yes."]


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValidationError):
        RegexSegmenter.Options(preset="word")
    with pytest.raises(ValidationError):
        RegexSegmenter.Options(boundary="clause")
