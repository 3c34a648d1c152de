"""Every line end of Unicode cuts as a line feed does, and "\\r\\n" is one of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sentcompress.contracts import Segmenter
from sentcompress.segmenters.nltk import PunktSegmenter
from sentcompress.segmenters.regex import RegexSegmenter
from sentcompress.testing.texts import tiny_tokenizer
from sentcompress.text.segmentation import sentences_to_ids

LINE_ENDS = ["\r", "\r\n", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"]
SEGMENTERS: dict[str, Callable[[], Segmenter]] = {
    **{
        preset: lambda preset=preset: RegexSegmenter(RegexSegmenter.Options(preset=preset))
        for preset in ("sentence", "clause", "paper")
    },
    "nltk": PunktSegmenter,
}
TEXTS = (
    "Short one\nTwo here\nthree lines\nFour now\nfive\nSix it is\nseven",
    "He went to the market early in the morning because\nof the fish. He left.\nNext (a thing. Then\nb) is.",
    "One paragraph. It goes on.\n\nAnother one.\n \n  Third.\n  - item one\n  - item two\n",
    "Title\n=====\n\n```\ncode. here\n\nf(2)\n```\nEnd.\n",
    "def f(x):\n    return x\n\n1. One\n2. Two\n",
)


@pytest.mark.parametrize("name", SEGMENTERS)
@pytest.mark.parametrize("end", LINE_ENDS, ids=ascii)
def test_all_line_ends_cut_alike(name: str, end: str) -> None:
    segmenter = SEGMENTERS[name]()
    for text in TEXTS:
        pieces = segmenter.split(text.replace("\n", end))
        assert "".join(pieces) == text.replace("\n", end)
        assert [piece.replace(end, "\n") for piece in pieces] == segmenter.split(text)


@pytest.mark.parametrize("end", LINE_ENDS, ids=ascii)
def test_short_lines_are_pieces(end: str) -> None:
    lines = [word + end for word in ("one", "two", "three", "four", "five", "six", "seven")]
    assert RegexSegmenter().split("".join(lines)) == lines


@pytest.mark.parametrize("name", SEGMENTERS)
@given(text=st.text("ab. \r\n?\u2028", max_size=40))
def test_no_cut_inside_crlf(name: str, text: str) -> None:
    pieces = SEGMENTERS[name]().split(text)
    assert "".join(pieces) == text
    for before, after in pairwise(pieces):
        assert not (before.endswith("\r") and after.startswith("\n"))


@pytest.mark.parametrize("end", LINE_ENDS, ids=ascii)
def test_a_piece_that_is_too_long_is_cut_behind_line_ends(end: str) -> None:
    segmenter = RegexSegmenter(RegexSegmenter.Options(preset="paper", max_tokens=16, min_chars=1000))
    text = f"abcdefgh{end}" * 12
    sentences = [sentence for sentence, _ in sentences_to_ids(text, segmenter, tiny_tokenizer())]
    assert "".join(sentences) == text
    assert len(sentences) > 3
    assert all(sentence.endswith(end) for sentence in sentences)


def test_punkt_learns_the_same_from_all_line_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = (
        "Dr. Brown met Mr. Smith.\nHe paid approx. 20 dollars.\n\nMr. Jones came later. He saw Dr. Lee.\n"
        * 20
    )
    states = []
    for end in ("\n", *LINE_ENDS):
        segmenter = PunktSegmenter()
        monkeypatch.setattr(segmenter, "_trained", lambda: None)  # whatever is installed here
        segmenter.prepare(None, [corpus.replace("\n", end)])
        states.append(segmenter.state())
    assert all(state == states[0] for state in states)
