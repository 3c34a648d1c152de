import pytest
import sentencex

from sentcompress.errors import RecipeError
from sentcompress.registry import get_registry


def split(text, **options):
    return get_registry().create("segmenter", "sentencex", options).split(text)


@pytest.mark.parametrize("language", ["en", "de", "zh"])
def test_it_fulfils_the_contract_of_a_segmenter(check_plugin, language):
    check_plugin("segmenter", "sentencex", options={"language": language})


def test_sentences_are_found():
    text = 'Dr. Smith paid $3.50 in the U.S. (see https://a.b/c?d=1).  "Really?" he said.\n\n  A new one. 文。是。'
    assert split(text) == [
        "Dr. Smith paid $3.50 in the U.S. (see https://a.b/c?d=1).  ",
        '"Really?" he said.\n\n  ',
        "A new one. ",
        "文。",
        "是。",
    ]


def test_the_language_decides():
    text = "Das kostet z.B. Geld. Es ist am 3. Mai fällig."
    assert split(text, language="de") == ["Das kostet z.B. Geld. ", "Es ist am 3. Mai fällig."]
    assert len(split(text, language="en")) > 2
    with pytest.raises(RecipeError, match="language"):
        split(text, language="German!")


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n\n", "\n One. Two.", "a\ud800. B.", "One.\r\n\r\nTwo.\x00", "A\u3000."]
)
def test_odd_texts_come_back_whole(text):
    pieces = split(text)
    assert "".join(pieces) == text
    assert all(pieces)


def test_white_space_is_no_sentence():
    assert split("\n\n  One.  \n\n\nTwo.\n") == ["\n\n  One.  \n\n\n", "Two.\n"]


def test_pieces_that_are_not_in_the_text_cost_nothing(monkeypatch):
    """What another version might do: trim, change or omit text."""
    text = "One is  here. Two is here. Three is."
    altered = ["One is here.", "Two is here.", "Four."]
    monkeypatch.setattr(sentencex, "segment", lambda *_: altered)
    assert split(text) == ["One is  here. ", "Two is here. Three is."]


def test_a_panic_costs_one_paragraph(monkeypatch):
    class PanicException(BaseException):
        """Named like the exception of Rust's panics."""

    def fragile(language, text, segment=sentencex.segment):
        if "!" in text:
            raise PanicException
        return segment(language, text)

    monkeypatch.setattr(sentencex, "segment", fragile)
    assert split("One. Two.\n\nOh! No.\n\nThree.") == ["One. ", "Two.\n\n", "Oh! No.\n\n", "Three."]
    monkeypatch.setattr(sentencex, "segment", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        split("One.")
