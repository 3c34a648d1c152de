"""check_segmenter passes what is right and catches each way to be wrong, in one sentence."""

from __future__ import annotations

import random
import re
import time
from typing import Any

import pytest

from sentcompress.contracts import Segmenter
from sentcompress.registry import get_registry
from sentcompress.segmenters.regex import RegexSegmenter
from sentcompress.testing import CheckFailed, check_plugin, check_segmenter
from sentcompress.testing.texts import NASTY, generated, hostile, ordinary


class Lines(Segmenter):
    def split(self, text: str) -> list[str]:
        return text.splitlines(keepends=True)


class Strips(Segmenter):
    def split(self, text: str) -> list[str]:
        return [piece.strip() for piece in Lines().split(text)]


class Normalizes(Segmenter):
    def split(self, text: str) -> list[str]:
        return [text.replace("\u0301", "")] if text else []


class Doubles(Segmenter):
    def split(self, text: str) -> list[str]:
        return [text, text] if len(text) > 100 else [text] if text else []


class Empty(Segmenter):
    def split(self, text: str) -> list[str]:
        return re.split(r"(?<=\.)", text)


class Yields(Segmenter):
    def split(self, text: str) -> Any:
        yield text


class Bytes(Segmenter):
    def split(self, text: str) -> Any:
        return [text.encode("utf-8", "surrogatepass")]


class Raises(Segmenter):
    def split(self, text: str) -> list[str]:
        text.encode("utf-8")
        return Lines().split(text)


class Unfinished(Segmenter):
    pass


class Cannot(Lines):
    def prepare(self, tokenizer: Any, documents: Any = None) -> None:
        raise KeyError("model")


class Random(Segmenter):
    def split(self, text: str) -> list[str]:
        cut = random.randrange(1, len(text)) if len(text) > 1 else len(text)
        return [piece for piece in (text[:cut], text[cut:]) if piece]


class Tuples(Lines):
    def state(self) -> dict[str, Any]:
        return {"pairs": [("a", "b")]}


class Sets(Lines):
    def state(self) -> dict[str, Any]:
        return {"words": {"a"}}


class NoDict(Lines):
    def state(self) -> Any:
        return ["a"]


class Forgets(Lines):
    """Learns to cut at spaces; its state comes back empty."""

    learned: bool = False

    def prepare(self, tokenizer: Any, documents: Any = None) -> None:
        self.learned = self.learned or documents is not None

    def state(self) -> dict[str, Any]:
        return {"learned": True} if self.learned else {}


class Half(Forgets):
    """Takes back what it reports, but not what it cuts by."""

    cuts: bool = False

    def prepare(self, tokenizer: Any, documents: Any = None) -> None:
        self.learned = self.cuts = documents is not None

    def load_state(self, state: dict[str, Any]) -> None:
        self.learned = state["learned"]

    def split(self, text: str) -> list[str]:
        return re.findall(r"\S*\s*", text)[:-1] if self.cuts else Lines().split(text)


class KeepsState(Half):
    def prepare(self, tokenizer: Any, documents: Any = None) -> None:
        super().prepare(tokenizer, documents)
        self.learned = True


class Slow(Lines):
    def split(self, text: str) -> list[str]:
        until = time.process_time() + len(text) / 2e6
        while time.process_time() < until:
            pass
        return super().split(text)


class SlowAtSpaces(Lines):
    """Like a regular expression that searches for the end of white space from every position again."""

    def split(self, text: str) -> list[str]:
        re.findall(r"\s+$", text)
        return super().split(text)


class Hangs(Lines):
    def split(self, text: str) -> list[str]:
        while text.startswith("...."):
            pass
        return super().split(text)


class Limit(Lines):
    max_tokens = 1


QUICK = {"characters": 2000, "seconds": 5.0}
JOINED = r"must return non-empty strings that joined are the text$"
WRONG: dict[type, tuple[str, dict[str, Any]]] = {
    Strips: (
        r"is not lossless: the text from character 0 on is missing: ' ' \(the text: ' '\); .*" + JOINED,
        {},
    ),
    Normalizes: (r"is not lossless: at character 1 the text has '\\u0301\. .*', the sentence '\. ", {}),
    Doubles: (r"is not lossless: at character \d+ the text has ''", {}),
    Empty: (r"returned an empty sentence \(number 0\) for ''.*" + JOINED, {}),
    Yields: (r"must return a list of strings, not generator", {}),
    Bytes: (r"must return a list of strings, but item 0 is bytes", {}),
    Raises: (r"failed: UnicodeEncodeError: .* \(test_check_segmenter.py:\d+\) \(the text: 'lone", {}),
    Unfinished: (r"Unfinished must implement split\(text\)", {}),
    Cannot: (
        r"prepare\(tokenizer, documents\) raised KeyError: 'model' \(test_check_segmenter.py:\d+\)$",
        {},
    ),
    Random: (r"splits the same text differently the second time: sentence 0 of '.*' is first '.*', then", {}),
    Tuples: (
        r"has 'pairs': \[\('a', 'b'\)\] in state\(\), which JSON changes; .*lists instead of tuples",
        {},
    ),
    Sets: (r"has a state\(\) that JSON cannot hold \(Object of type set is not JSON serializable\)", {}),
    NoDict: (r"returns \['a'\] from state\(\); it must be a dict", {}),
    Forgets: (r"has a different state\(\) after load_state: \{\} instead of \{'learned': True\}", {}),
    KeepsState: (
        r"splits differently after load_state\(state\(\)\) on a new instance: sentence 0 of ' ",
        {},
    ),
    Slow: (
        r"(did not return within|is slow: 0.\d s for 200,000 characters of ordinary text .* than 0.05 s of CPU time$)",
        {"characters": 200_000, "seconds": 0.05},
    ),
    SlowAtSpaces: (
        r"SlowAtSpaces (did not return within|is slow: .* of spaces \(' +.*must take less than 0.2 s)",
        {"characters": 100_000, "seconds": 0.2},
    ),
    Hangs: (r"did not return within 0.6 s for .* that begin with '\.\.\.\.Starts", {"seconds": 0.2}),
    Limit: (r"has max_tokens 1; it must be an integer of at least 2", {}),
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda cls: cls.__name__)
def test_a_wrong_segmenter_is_caught_in_one_sentence(wrong: type[Segmenter]) -> None:
    message, settings = WRONG[wrong]
    with pytest.raises(CheckFailed, match=message) as caught:
        check_segmenter(wrong, **(QUICK | settings))
    said = str(caught.value)
    assert said.startswith(f"segmenter {wrong.__module__}.{wrong.__qualname__}")
    assert "\n" not in said
    assert len(said) < 500


@pytest.mark.parametrize("name", get_registry().names("segmenter"))
def test_every_segmenter_that_is_installed_passes(name: str) -> None:
    check_plugin("segmenter", name, characters=200_000)


def test_a_megabyte_of_each_sort() -> None:
    check_segmenter(RegexSegmenter, {"preset": "clause"})


def test_classes_instances_and_options() -> None:
    check_segmenter(Lines, **QUICK)
    check_segmenter(Lines(Lines.Options(max_tokens=5)), **QUICK)
    check_segmenter(RegexSegmenter, RegexSegmenter.Options(preset="paper"), **QUICK)
    learned = get_registry().create("segmenter", "nltk")
    learned.prepare(None, ["Mr. Smith came. He went."])
    before = learned.state()
    check_segmenter(learned, **QUICK)
    assert learned.state() == before
    with pytest.raises(TypeError, match="options are only for a class; this segmenter already has its own"):
        check_segmenter(Lines(), {"max_tokens": 5})
    with pytest.raises(
        CheckFailed, match=r"refuses the options of this check: options.pres: unknown key. Did"
    ):
        check_segmenter(RegexSegmenter, {"pres": "paper"})
    with pytest.raises(
        CheckFailed, match=r"^segmenter builtins.dict is not a segmenter; it must be a subclass of sent"
    ):
        check_segmenter(dict)


def test_the_texts_are_the_same_in_every_run() -> None:
    assert list(generated(5)) == list(generated(5)) != list(generated(5, seed=1))
    assert len(set(generated())) == 200
    assert len(ordinary(12_345)) == 12_345
    assert ordinary(1000) == ordinary(1000)
    assert len(set(NASTY)) == len(NASTY)
    stretches = hostile(1_000_000)
    assert len(stretches) == 8
    assert 999_000 < sum(map(len, stretches.values())) <= 1_000_000
