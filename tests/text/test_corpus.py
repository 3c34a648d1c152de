"""The token cache: exact, keyed by everything that changes it, rebuilt when damaged, safe among processes."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sentcompress.contracts import Dataset, DatasetOptions, Document, Options, Segmenter
from sentcompress.datasets.text import TextDataset
from sentcompress.errors import DataError, PluginError, StorageError
from sentcompress.registry import get_registry
from sentcompress.text import token_sampling
from sentcompress.text.cache import VERIFY_LIMIT
from sentcompress.text.corpus import Corpus, build_corpus

TEXTS = ("First. Second one. ", "A b c. D e.\n\nF", "Ünïcode 你好。 \U0001f600 ok. ", "one")


class Given(Dataset):
    """The documents it is made with; counts how often it is read."""

    def __init__(self, texts: Iterable[str], heldout: int = 1) -> None:
        super().__init__(DatasetOptions(heldout_documents=heldout))
        self.texts = list(texts)
        self.read = 0

    def documents(self) -> Iterator[Document]:
        self.read += 1
        return (Document(text, f"text {number}") for number, text in enumerate(self.texts))

    def fingerprint(self) -> str:
        return super().fingerprint() + repr(self.texts)


class Stops(Segmenter):
    """Cuts after full stops."""

    def split(self, text: str) -> list[str]:
        return re.findall(r"[^.]*\.\s*|[^.]+", text)


class Learned(Stops):
    """Remembers what it was given to learn from."""

    known: list[str] | None = None
    prepared = 0

    def prepare(self, tokenizer: Any, documents: Iterable[str] | None = None) -> None:
        super().prepare(tokenizer)
        self.prepared += 1
        if documents is not None:
            self.known = list(documents)

    def state(self) -> dict[str, Any]:
        return {} if self.known is None else {"known": self.known}

    def load_state(self, state: dict[str, Any]) -> None:
        self.known = state.get("known")


@pytest.fixture
def build(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Corpus]:
    """``build(dataset, segmenter)`` in a cache of this test's own."""

    def build(dataset: Dataset, segmenter: Segmenter | None = None, **settings: Any) -> Corpus:
        arguments = {"cache_dir": tmp_path, "progress": False, "tokenizer": tokenizer, **settings}
        return build_corpus(dataset, segmenter or Stops(), **arguments)

    return build


Build = Callable[..., Corpus]


def test_everything_that_went_in_comes_out(build: Build, tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = build(Given(TEXTS, heldout=2))
    assert [corpus.document_text(d) for d in range(corpus.num_documents)] == list(TEXTS)
    assert [corpus.source(d) for d in range(4)] == ["text 0", "text 1", "text 2", "text 3"]
    assert sorted([*corpus.train, *corpus.heldout]) == [0, 1, 2, 3]
    assert len(corpus.heldout) == 2
    for document, text in enumerate(TEXTS):
        sentences = corpus.document_sentences(document)
        assert [corpus.sentence_text(i) for i in sentences] == Stops().split(text)
        for i in sentences:
            assert tokenizer.decode(corpus.sentence(i)) == corpus.sentence_text(i)
            assert corpus.sentence_bytes[i] == len(corpus.sentence_text(i).encode())
    assert corpus.sentence(0).dtype == np.int64
    assert int(corpus.sentence_bytes.sum()) == sum(len(text.encode()) for text in TEXTS)
    assert corpus.span_text(1, 2) == "Second one. "


def test_summary_adds_up(build: Build) -> None:
    corpus = build(Given([*TEXTS, "", " \n "]))
    summary = corpus.summary()
    assert summary["documents"] == summary["train_documents"] + summary["heldout_documents"] == 4
    assert summary["sentences"] == sum(summary["histogram"]["counts"]) == 7
    assert summary["tokens"] == len(corpus.tokens)
    assert summary["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert summary["empty_documents"] == 2
    json.dumps(summary)


@pytest.mark.parametrize("longest", [1 << 21, 8])
def test_whole_documents_are_tokenized_uncut(
    build: Build, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, longest: int
) -> None:
    monkeypatch.setattr(token_sampling, "_MAX_CHARACTERS", longest)  # of very long ones: cut before spaces
    corpus = build(Given(TEXTS))
    for _ in range(2):
        found = token_sampling.open_whole(corpus, progress=False)
        for document, text in enumerate(TEXTS):
            tokens = found.tokens[found.offsets[document] : found.offsets[document + 1]]
            assert tokens.tolist() == tokenizer(text)["input_ids"]


class TestCache:
    def test_the_second_time_nothing_is_read(self, build: Build) -> None:
        dataset = Given(TEXTS)
        first, second = build(dataset), build(dataset)
        assert dataset.read == 1
        assert (first.folder, first.key) == (second.folder, second.key)
        assert np.array_equal(first.tokens, second.tokens)

    def test_the_default_place_follows_the_variable(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SENTCOMPRESS_CACHE", str(tmp_path / "here"))
        corpus = build_corpus(Given(TEXTS), Stops(), tokenizer, progress=False)
        assert corpus.folder.parent == tmp_path / "here" / "corpora"

    def test_the_key_covers_whatever_changes_the_content(
        self, build: Build, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        class Renamed(Stops):
            pass

        smaller = Stops(Stops.Options(max_tokens=5))
        other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>")
        other.add_tokens(["Second"])
        knowing = Learned()
        knowing.load_state({"known": ["something"]})
        keys = [
            build(Given(TEXTS)).key,
            build(Given([*TEXTS, "more"])).key,
            build(Given(TEXTS, heldout=2)).key,
            build(Given(TEXTS), smaller).key,
            build(Given(TEXTS), Renamed()).key,
            build(Given(TEXTS), Learned()).key,
            build(Given(TEXTS), knowing).key,
            build(Given(TEXTS), tokenizer=other).key,
        ]
        assert len(set(keys)) == len(keys)

    def test_a_changed_file_is_read_again(self, build: Build, tmp_path: Path) -> None:
        for name in "ab":
            (tmp_path / f"{name}.txt").write_text(f"This is {name}. ", encoding="utf-8")
        dataset = TextDataset(TextDataset.Options(paths=[str(tmp_path / "*.txt")], heldout_documents=1))
        assert build(dataset).document_text(1) == "This is b. "
        (tmp_path / "b.txt").write_text("Changed. ", encoding="utf-8")
        assert build(dataset).document_text(1) == "Changed. "

    @pytest.mark.parametrize(
        "name", ["tokens.bin", "text.bin", "sentence_offsets.npy", "train.npy", "meta.json"]
    )
    @pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
    def test_a_torn_cache_is_built_again(
        self, build: Build, name: str, damage: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        dataset = Given(TEXTS)
        corpus = build(dataset)
        expected = [corpus.sentence(i).tolist() for i in range(corpus.num_sentences)]
        path = corpus.folder / name
        data = bytearray(path.read_bytes())
        del corpus
        if damage == "cut":
            path.write_bytes(data[: len(data) // 2])
        elif damage == "flip":
            data[len(data) // 2] ^= 0xFF
            path.write_bytes(data)
        else:
            path.unlink()
        again = build(dataset, progress=True)
        assert dataset.read == 2
        assert [again.sentence(i).tolist() for i in range(again.num_sentences)] == expected
        assert "building it again" in capsys.readouterr().err.replace("\n", " ")
        assert [p.name for p in again.folder.parent.iterdir()] == [again.key]

    def test_what_killed_builds_left_is_removed_after_a_day(self, build: Build, tmp_path: Path) -> None:
        old, new = tmp_path / "corpora" / ".a.tmp", tmp_path / "corpora" / ".b.tmp"
        for path in (old, new):
            path.mkdir(parents=True)
        os.utime(old, (time.time() - 90_000,) * 2)
        build(Given(TEXTS))
        assert (old.exists(), new.exists()) == (False, True)

    def test_an_interrupted_build_leaves_nothing(self, build: Build, tmp_path: Path) -> None:
        class Interrupting(Given):
            def documents(self) -> Iterator[Document]:
                yield from super().documents()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build(Interrupting(TEXTS))
        assert list((tmp_path / "corpora").iterdir()) == []

    def test_disk_full(self, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left on device") as caught:
            build(Given(TEXTS))
        assert "SENTCOMPRESS_CACHE" in str(caught.value)
        assert list((tmp_path / "corpora").iterdir()) == []

    def test_a_cache_place_that_is_a_file(self, build: Build, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(StorageError, match="cannot write the token cache"):
            build(Given(TEXTS), cache_dir=tmp_path / "file")

    @pytest.mark.slow
    def test_processes_building_at_the_same_time(
        self, tmp_path: Path, text_files: Path, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        script = (
            "import os, sys\nfrom transformers import PreTrainedTokenizerFast\n"
            "from sentcompress.registry import get_registry\n"
            "from sentcompress.text.corpus import build_corpus\n"
            "tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1] + '/tokenizer')\n"
            "registry = get_registry()\n"
            "dataset = registry.create('dataset', 'text', {'paths': [sys.argv[2]]})\n"
            "segmenter = registry.create('segmenter', 'regex')\n"
            "print('ready', flush=True)\ninput()\n"
            "corpus = build_corpus(dataset, segmenter, tokenizer)\n"
            "texts = [corpus.document_text(d) for d in range(corpus.num_documents)]\n"
            "print(corpus.folder, corpus.num_sentences, len(''.join(texts)))\n"
        )
        environment = {**os.environ, "SENTCOMPRESS_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-c", script, str(tmp_path), str(text_files)]

        def race() -> set[str]:
            pipe = subprocess.PIPE
            running = [
                subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
                for _ in range(2)
            ]
            for process in running:
                assert process.stdout.readline() == "ready\n"
            results = [process.communicate(timeout=120) for process in go(running)]
            assert [process.returncode for process in running] == [0, 0], results
            return {output for output, _ in results}

        def go(running: list[subprocess.Popen[str]]) -> list[subprocess.Popen[str]]:
            for process in running:
                process.stdin.write("go\n")
                process.stdin.flush()
            return running

        (first,) = race()
        folder = Path(first.split()[0])
        (folder / "tokens.bin").write_bytes(b"torn")
        assert race() == {first}
        assert list(folder.parent.iterdir()) == [folder]


class TestWorkers:
    def test_worker_processes_give_the_same(
        self, build: Build, make_text: Callable[[int, int], str], tmp_path: Path
    ) -> None:
        texts = [make_text(2500, seed) for seed in range(3)]
        segmenter = get_registry().create("segmenter", "regex")
        one = build(Given(texts), segmenter, workers=1, cache_dir=tmp_path / "one")
        two = build(Given(texts), segmenter, workers=2, cache_dir=tmp_path / "two")
        assert two.meta["workers"] == 2
        for name in ("tokens.bin", "sentence_offsets.npy", "sentence_starts.npy", "document_offsets.npy"):
            assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()

    def test_a_segmenter_that_cannot_travel_is_used_here(
        self,
        build: Build,
        make_text: Callable[[int, int], str],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        class Local(Stops):
            pass

        texts = [make_text(2500, seed) for seed in range(3)]
        corpus = build(Given(texts), Local(), workers=2, progress=True)
        assert corpus.document_text(1) == texts[1]
        assert "cannot be pickled" in capsys.readouterr().err


class TestSegmenters:
    def test_a_learned_segmenter_sees_training_documents_only(self, build: Build) -> None:
        segmenter = Learned()
        corpus = build(Given(TEXTS, heldout=2), segmenter)
        assert segmenter.known == [corpus.document_text(d) for d in corpus.train]

    def test_its_state_comes_back_with_the_cache(self, build: Build) -> None:
        first, second = Learned(), Learned()
        build(Given(TEXTS), first)
        build(Given(TEXTS), second)
        assert second.known == first.known
        assert second.tokenizer is not None
        assert (first.prepared, second.prepared) == (1, 1)

    def test_one_that_came_with_a_model_learns_nothing(self, build: Build) -> None:
        segmenter = Learned()
        segmenter.load_state({"known": ["before"]})
        build(Given(TEXTS), segmenter)
        assert segmenter.known == ["before"]

    def test_lost_text_names_segmenter_document_and_place(self, build: Build) -> None:
        class Lossy(Segmenter):
            def split(self, text: str) -> list[str]:
                return re.findall(r"[^.]*\.", text)

        with pytest.raises(PluginError, match=r"text 1: segmenter .*Lossy is not lossless: .*missing: 'two'"):
            build(Given(["one.", "one.two"]), Lossy())

    def test_a_dataset_of_plain_strings_is_named(self, build: Build) -> None:
        class Plain(Given):
            def documents(self) -> Iterator[Any]:
                return iter(self.texts)

        with pytest.raises(PluginError, match=r"dataset .*Plain must yield Document\(text, source\).* 'one'"):
            build(Plain(["one", "two"]), Stops())

    def test_one_that_cannot_prepare(self, build: Build) -> None:
        class Broken(Stops):
            def prepare(self, *_: Any) -> None:
                raise RuntimeError("no data")

        with pytest.raises(PluginError, match="Broken failed to prepare: RuntimeError: no data"):
            build(Given(TEXTS), Broken())


class TestDocuments:
    def test_lone_surrogates_are_replaced_and_counted(self, build: Build) -> None:
        corpus = build(Given(["a\ud800b\udc00.", "c"]))
        assert corpus.document_text(0) == "a\ufffdb\ufffd."
        assert corpus.summary()["replaced_surrogates"] == 2

    def test_a_dataset_that_fails_is_named(self, build: Build) -> None:
        class Failing(Given):
            def documents(self) -> Iterator[Document]:
                raise OSError("gone")

        with pytest.raises(PluginError, match="Failing failed: OSError: gone"):
            build(Failing(TEXTS))

    @pytest.mark.parametrize("texts", [[], ["only"], ["only", "", "  "]])
    def test_too_few_documents(self, build: Build, texts: list[str]) -> None:
        with pytest.raises(DataError, match="at least 2 are needed"):
            build(Given(texts))

    def test_copies_of_one_text(self, build: Build) -> None:
        with pytest.raises(DataError, match="all have the same text"):
            build(Given(["same"] * 3))

    def test_datasets_without_the_common_options(self, build: Build) -> None:
        class Strange(Dataset):
            Options = Options

            def documents(self) -> Iterator[Document]:
                return (Document(f"Text {n}.", "") for n in range(50))

        corpus = build(Strange())
        assert (len(corpus.train), len(corpus.heldout)) == (30, 20)

    def test_fewer_held_out_than_asked_for_is_said(
        self, build: Build, capsys: pytest.CaptureFixture[str]
    ) -> None:
        corpus = build(Given(TEXTS, heldout=20), progress=True)
        assert len(corpus.heldout) == 2
        assert "4 documents: 2 are held out instead of 20" in capsys.readouterr().err

    def test_max_documents_holds_for_every_dataset(self, build: Build) -> None:
        dataset = Given(TEXTS)
        dataset.options = DatasetOptions(heldout_documents=1, max_documents=3)
        assert build(dataset).num_documents == 3


def test_large_caches_are_checked_by_size_only() -> None:
    """Documented in docs/data.md; reading 4 GiB takes seconds, a terabyte would take an hour."""
    assert VERIFY_LIMIT == 4 << 30
