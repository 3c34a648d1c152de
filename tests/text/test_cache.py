"""Builds of the token cache that are killed, interrupted, or wait for each other: processes that are real."""

from __future__ import annotations

import fcntl
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from sentcompress.datasets.text import TextDataset
from sentcompress.errors import InputError
from sentcompress.segmenters.regex import RegexSegmenter
from sentcompress.text import encoding
from sentcompress.text.cache import build_folder
from sentcompress.text.corpus import Corpus, build_corpus

SEGMENTER = """
import os, re, time
from pathlib import Path
from sentcompress.contracts import Segmenter
HERE = Path(__file__).parent

class Waiting(Segmenter):
    def split(self, text):
        with (HERE / "begun").open("a") as file:
            file.write(f"{os.getpid()}\\n")
        while not (HERE / "go").exists():
            time.sleep(0.02)
        return re.findall(r"[^.]*\\.\\s*|[^.]+", text)
"""
SCRIPT = """
import sys
from transformers import PreTrainedTokenizerFast
from sentcompress.registry import get_registry
from sentcompress.text import encoding
from sentcompress.text.corpus import build_corpus
from waiting_segmenter import Waiting
encoding.BATCH_BYTES = 1 << 10
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1] + "/tokenizer")
dataset = get_registry().create("dataset", "text", {"paths": [sys.argv[1] + "/texts"]})
print(build_corpus(dataset, Waiting(), tokenizer, workers=int(sys.argv[2])).num_sentences)
"""


class Builds:
    """Processes that build one corpus, and wait in the middle of it until ``go``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.running: list[subprocess.Popen[str]] = []

    def start(self, workers: int = 1) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(self.folder), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "SENTCOMPRESS_CACHE": str(self.cache), "PYTHONPATH": path}
        command = [sys.executable, "-c", SCRIPT, str(self.folder), str(workers)]
        pipe = subprocess.PIPE
        self.running.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment))
        return self.running[-1]

    def wait_until_begun(self, processes: int = 1) -> None:
        began = self.folder / "begun"
        deadline = time.monotonic() + 60
        while not began.exists() or len(set(began.read_text().split())) < processes:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def go(self) -> None:
        (self.folder / "go").touch()

    def temporary(self) -> list[Path]:
        return list((self.cache / "corpora").glob(".*"))


@pytest.fixture
def builds(tmp_path: Path, text_files: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[Builds]:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "texts").symlink_to(text_files)
    (tmp_path / "waiting_segmenter.py").write_text(SEGMENTER)
    made = Builds(tmp_path)
    yield made
    made.go()
    for process in made.running:
        process.kill()
        process.wait()


@pytest.fixture
def build_another(
    tmp_path: Path, text_files: Path, tokenizer: PreTrainedTokenizerFast
) -> Callable[[], Corpus]:
    dataset = TextDataset(TextDataset.Options(paths=[str(text_files)]))
    return lambda: build_corpus(
        dataset, RegexSegmenter(), tokenizer, cache_dir=tmp_path / "cache", progress=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("first_is", ["done", "killed"])
def test_the_second_waits_for_the_first(
    builds: Builds, build_another: Callable[[], Corpus], first_is: str
) -> None:
    first = builds.start()
    builds.wait_until_begun()
    second = builds.start()
    said = second.stderr.readline()
    assert "another process is tokenizing this corpus; waiting for it" in said
    assert str(builds.cache / "locks") in said
    build_another()
    assert len(builds.temporary()) == 1  # of the first, which is alive
    if first_is == "killed":
        first.kill()
    builds.go()
    output, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert int(output) > 0
    processes = {int(line) for line in (builds.folder / "begun").read_text().split()}
    assert processes == ({first.pid} if first_is == "done" else {first.pid, second.pid})
    assert builds.temporary() == []
    first.communicate(timeout=60)
    assert first.returncode == (0 if first_is == "done" else -signal.SIGKILL)


@pytest.mark.slow
def test_what_a_killed_build_left_is_removed_by_the_next(
    builds: Builds, build_another: Callable[[], Corpus]
) -> None:
    process = builds.start(workers=2)
    builds.wait_until_begun(2)
    process.kill()
    process.communicate(timeout=30)  # to the end of what its workers may still write: they have ended, too
    assert len(builds.temporary()) == 1
    corpus = build_another()
    assert list(corpus.folder.parent.iterdir()) == [corpus.folder]


@pytest.mark.slow
def test_an_interrupted_build_ends_its_workers_and_leaves_nothing(builds: Builds) -> None:
    process = builds.start(workers=2)
    builds.wait_until_begun(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)  # its workers would wait forever
    assert "KeyboardInterrupt" in errors
    assert builds.temporary() == []


def test_a_damaged_folder_that_was_to_be_deleted_is(
    builds: Builds, build_another: Callable[[], Corpus]
) -> None:
    old = builds.cache / "corpora" / ".key.0123.old"
    old.mkdir(parents=True)
    build_another()
    assert not old.exists()


def test_without_locks_nobody_waits_and_nothing_is_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "corpora" / "key"
    said: list[str] = []
    with build_folder(final, said.append) as dead:
        assert dead is not None
    dead.mkdir()  # named as one that was built under a lock

    def refused(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    with build_folder(final, said.append) as one, build_folder(final, said.append) as two:
        assert one is not None
        assert two is not None
        assert one.is_dir()
        assert two.is_dir()
        assert dead.is_dir()
    assert said == []
    monkeypatch.undo()
    with build_folder(final, said.append):
        assert not dead.exists()


def test_when_a_worker_is_killed_the_rest_is_done_here(
    tokenizer: PreTrainedTokenizerFast,
    make_text: Callable[[int, int], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "fatal_segmenter.py").write_text(
        "import multiprocessing, os, re, signal\nfrom sentcompress.contracts import Segmenter\n"
        "class Fatal(Segmenter):\n"
        "    def split(self, text):\n"
        "        if 'The end' in text and multiprocessing.parent_process() is not None:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return re.findall(r'[^.]*\\.\\s*|[^.]+', text)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    segmenter = importlib.import_module("fatal_segmenter").Fatal()
    monkeypatch.setattr(encoding, "BATCH_BYTES", 1 << 12)
    for number in range(40):
        text = make_text(50, number) + ("The end." if number == 20 else "")
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    dataset = TextDataset(TextDataset.Options(paths=[str(tmp_path / "*.txt")]))
    one, two = (
        build_corpus(dataset, segmenter, tokenizer, cache_dir=tmp_path / str(workers), workers=workers)
        for workers in (1, 2)
    )
    assert "the worker processes died" in capsys.readouterr().err
    for name in ("tokens.bin", "sentence_offsets.npy", "sentence_starts.npy", "document_offsets.npy"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("x" * 300, "File name too long"),
        ("~no-such-user/cache", "no home folder of that user"),
        ("loop", "Too many levels of symbolic links"),
        ("file", "not a folder"),
        ("new/" + "x" * 300, "File name too long"),
    ],
)
def test_a_cache_place_that_cannot_be(
    tmp_path: Path,
    text_files: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    value: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("file").write_text("x")
    dataset = TextDataset(TextDataset.Options(paths=[str(text_files)]))
    monkeypatch.setenv("SENTCOMPRESS_CACHE", value)
    with pytest.raises(InputError, match=said) as caught:
        build_corpus(dataset, RegexSegmenter(), tokenizer, progress=False)
    assert value in caught.value.message
    assert "SENTCOMPRESS_CACHE" in str(caught.value)
