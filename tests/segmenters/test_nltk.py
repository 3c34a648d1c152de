"""Punkt: learned offline, saved as JSON, lossless."""

from __future__ import annotations

import json
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sentcompress.errors import PluginError
from sentcompress.segmenters.nltk import PunktSegmenter

pytest.importorskip("nltk", reason="nltk is in the optional extra 'data'")

CORPUS = [
    "Dr. Brown met Mr. Smith in May. He paid approx. 20 dollars. They talked for approx. two hours. "
    "Mr. Jones came later. He saw Dr. Lee. It rained approx. all day. Then Mr. Lee left. Dr. Jones stayed."
] * 20


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> PunktSegmenter:
    made = PunktSegmenter()
    monkeypatch.setattr(made, "_trained", lambda: None)  # whatever is installed here
    made.prepare(None, CORPUS)
    return made


def test_abbreviations_are_learned_from_the_corpus(learned: PunktSegmenter) -> None:
    assert {"dr", "mr"} <= set(learned.state()["abbreviations"])
    assert learned.split("We met Mr. Smith. He left.") == ["We met Mr. Smith.", " He left."]


def test_the_state_survives_json(learned: PunktSegmenter) -> None:
    state = learned.state()
    again = PunktSegmenter()
    again.load_state(json.loads(json.dumps(state)))
    again.prepare(None, None)
    assert again.state() == state
    assert again.split(CORPUS[0]) == learned.split(CORPUS[0])


def test_only_the_first_characters_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    made = PunktSegmenter(PunktSegmenter.Options(learn_chars=len(CORPUS[0])))
    monkeypatch.setattr(made, "_trained", lambda: None)
    read: list[str] = []
    made.prepare(None, (read.append(text) or text for text in CORPUS))  # type: ignore[func-returns-value]
    assert len(read) <= 2


def test_an_unprepared_segmenter_cuts_with_plain_rules() -> None:
    made = PunktSegmenter()
    assert made.state() == {}
    assert made.split("One is here. Two is there.\n\nThree") == [
        "One is here.",
        " Two is there.\n\n",
        "Three",
    ]
    assert made.split("") == []


@given(text=st.text(st.characters(), max_size=100) | st.text(".!?\"') \n\r\ud800aA。", max_size=60))
def test_nothing_is_lost(text: str) -> None:
    pieces = PunktSegmenter().split(text)
    assert "".join(pieces) == text
    assert all(pieces)
    assert not text.strip() or not any(piece.isspace() for piece in pieces)


@pytest.mark.parametrize("unit", [".", "a.", " ", "A. ", '"', "\n", "a.\n", "?)"])
def test_a_hostile_text_finishes(unit: str) -> None:
    text = (unit * 100_000)[:100_000]
    start = time.process_time()
    assert "".join(PunktSegmenter().split(text)) == text
    assert time.process_time() - start < 60


def test_without_nltk_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk.tokenize", None)
    with pytest.raises(PluginError, match=r"sentcompress\[data\]"):
        PunktSegmenter()
