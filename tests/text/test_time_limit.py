"""A segmenter that never returns is ended, here and in worker processes, and other alarms are left alone."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import regex
from transformers import PreTrainedTokenizerFast

from sentcompress.contracts import Dataset, DatasetOptions, Document, Segmenter
from sentcompress.errors import InputError, PluginError
from sentcompress.text.corpus import build_corpus
from sentcompress.text.segmentation import checked_split
from sentcompress.text.time_limit import VARIABLE, Overtime, TimeLimit, split_seconds


@pytest.fixture(autouse=True)
def _no_other_alarm() -> Iterator[None]:
    """pytest-timeout has one of its own; it must be as it was after each test here."""
    before = signal.getsignal(signal.SIGALRM)
    yield
    assert signal.getsignal(signal.SIGALRM) == before


def forever(text: str) -> list[str]:
    while text:
        pass
    return []


def forever_with_a_handler(text: str) -> list[str]:
    while text:
        with suppress(Exception):
            time.sleep(0.01)
    return []


def swallows_once(text: str) -> list[str]:
    with suppress(BaseException):
        forever(text)
    return forever(text)


HANGS: dict[str, Callable[[str], list[str]]] = {
    "loop": forever,
    "except Exception": forever_with_a_handler,
    "except BaseException": swallows_once,
    "re": lambda _: re.findall(r"(x+x+)+y", "x" * 60),
    "regex": lambda _: regex.findall(r"(?:x|x|xx)+y", "x" * 2000),
    "waiting": lambda _: threading.Event().wait() and [],
}


def splitting(split: Callable[[str], list[str]]) -> Segmenter:
    class Given(Segmenter):
        def split(self, text: str) -> list[str]:
            return split(text)

    return Given()


@pytest.mark.parametrize("hang", HANGS)
def test_what_never_returns_is_ended_and_named(hang: str) -> None:
    began = time.monotonic()
    with pytest.raises(
        PluginError, match=r"segmenter .*Given did not return within 0.2 s for 8 char.* 'One two"
    ) as e:
        checked_split("One two.", splitting(HANGS[hang]), 0.2)
    assert time.monotonic() - began < 5
    assert f"{VARIABLE}=600" in str(e.value)
    assert e.value.exit_code == 3


class Two(Dataset):
    def __init__(self, texts: list[str]) -> None:
        super().__init__(DatasetOptions(heldout_documents=1))
        self.texts = texts

    def documents(self) -> Iterator[Document]:
        return (Document(text, f"book {number}") for number, text in enumerate(self.texts))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_corpus_names_the_document(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    code = (
        "from sentcompress import Segmenter\n"
        "class Hangs(Segmenter):\n"
        "    def split(self, text):\n"
        "        while 'never' in text: pass\n"
        "        return [text]\n"
    )
    (tmp_path / "segmenter_that_hangs.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    from segmenter_that_hangs import Hangs

    monkeypatch.setenv(VARIABLE, "0.1")
    texts = ["one " * 70_000, "two " * 70_000, "never"]  # a batch each
    with pytest.raises(PluginError, match=r"book 2: segmenter segmenter_that_hangs.Hangs did not return"):
        build_corpus(
            Two(texts), Hangs(), tokenizer, cache_dir=tmp_path / "c", workers=workers, progress=False
        )


def test_time_grows_with_the_text_and_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_seconds(0) == 60
    assert split_seconds(1_000_000) == 1060
    monkeypatch.setenv(VARIABLE, "2.5")
    assert split_seconds(1000) == 3.5
    monkeypatch.setenv(VARIABLE, "0")
    assert split_seconds(1000) == 0
    for wrong in ("soon", "-1", "nan", "inf"):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(InputError, match=f"{VARIABLE}={wrong}: must be a number of seconds"):
            split_seconds(1)


def test_the_alarm_of_the_caller_comes_in_time() -> None:
    rung: list[float] = []

    def ring(*_: object) -> None:
        rung.append(time.monotonic())

    before = signal.signal(signal.SIGALRM, ring)
    timer = signal.setitimer(signal.ITIMER_REAL, 0.6)
    began = time.monotonic()
    try:
        with TimeLimit(0.5):
            time.sleep(0.3)
        assert not rung
        with pytest.raises(Overtime), TimeLimit(0.1):
            time.sleep(2)
        while not rung and time.monotonic() < began + 5:
            time.sleep(0.01)
        assert 0.55 < rung[0] - began < 3
        # One that is due earlier is left alone altogether.
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with TimeLimit(0.2):
            time.sleep(0.4)
        assert len(rung) == 2
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def test_other_threads_have_no_limit() -> None:
    done: list[list[str]] = []
    segmenter = splitting(lambda text: time.sleep(0.2) or [text])
    thread = threading.Thread(target=lambda: done.append(checked_split("a", segmenter, 0.05)))
    thread.start()
    thread.join()
    assert done == [["a"]]
