"""The formats that people's files have: every compression, JSON lists, Parquet, Arrow and CSV, and what is no text."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import tarfile
import zipfile
from pathlib import Path

import pyarrow as arrow
import pytest
import zstandard
from pyarrow import parquet

from sentcompress.contracts import Dataset, Document
from sentcompress.datasets import _files, _packed
from sentcompress.errors import DataError
from sentcompress.registry import get_registry

WANJUAN = Path(__file__).parent.parent / "data" / "wanjuan_sample.jsonl"
JSON_LINES = b'{"text": "One. Two."}\n{"text": "Three."}\n'


def dataset(name: str, *paths: object, **options: object) -> Dataset:
    made = get_registry().create("dataset", name, {"paths": [str(path) for path in paths], **options})
    assert isinstance(made, Dataset)
    return made


def documents(name: str, *paths: object, **options: object) -> list[Document]:
    return list(dataset(name, *paths, **options).documents())


def texts(name: str, *paths: object, **options: object) -> list[str]:
    return [document.text for document in documents(name, *paths, **options)]


def zipped(data: bytes, *names: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, data)
    return packed.getvalue()


def lz4(data: bytes) -> bytes:
    packed = arrow.BufferOutputStream()
    with arrow.CompressedOutputStream(packed, "lz4") as stream:
        stream.write(data)
    return packed.getvalue().to_pybytes()


PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    # Two frames, as parallel writers make them, the border inside a line.
    ".zst": lambda data: zstandard.compress(data[:100]) + zstandard.compress(data[100:]),
    ".lz4": lz4,
    ".zip": lambda data: zipped(data, "a/book.dat", "__MACOSX/._book.dat"),
}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("upper", [False, True])
def test_every_compression_gives_the_same_documents(tmp_path: Path, suffix: str, upper: bool) -> None:
    expected = {
        "jsonl": texts("jsonl", WANJUAN, field="content"),
        "text": [WANJUAN.read_text(encoding="utf-8")],
        "csv": ["a\nb", "c"],
    }
    for name, kind, data in (
        ("part.jsonl", "jsonl", WANJUAN.read_bytes()),
        ("part.txt", "text", b"\xef\xbb\xbf" + WANJUAN.read_bytes()),
        ("part.tsv", "csv", b'id\ttext\r\n1\t"a\nb"\r\n2\tc\r\n'),
    ):
        name += suffix
        (tmp_path / (name.upper() if upper else name)).write_bytes(PACK[suffix](data))
        field = {} if kind == "text" else {"field": "content" if kind == "jsonl" else "text"}
        assert texts(kind, tmp_path, **field) == expected[kind]


@pytest.mark.parametrize("suffix", [suffix for suffix in PACK if suffix])
def test_what_is_compressed_is_told_by_its_content(tmp_path: Path, suffix: str) -> None:
    hidden = tmp_path / "a.jsonl"
    hidden.write_bytes(PACK[suffix](JSON_LINES))
    assert texts("jsonl", hidden) == ["One. Two.", "Three."]
    other = tmp_path / ("b.jsonl.gz" if suffix != ".gz" else "b.jsonl.bz2")
    other.write_bytes(PACK[suffix](JSON_LINES))
    assert texts("jsonl", other) == ["One. Two.", "Three."]
    wrong = tmp_path / f"c.jsonl{suffix.upper()}"
    wrong.write_bytes(JSON_LINES)
    with pytest.raises(
        DataError, match=rf"c\.jsonl\{suffix.upper()}: damaged, or not {_packed.PACKINGS[suffix]}"
    ) as caught:
        texts("jsonl", wrong)
    assert "rename it without" in str(caught.value.fix)
    cut = tmp_path / f"d.jsonl{suffix}"
    cut.write_bytes(PACK[suffix](WANJUAN.read_bytes())[:-40])
    with pytest.raises(DataError, match=r"d\.jsonl.*: damaged or cut short"):
        texts("jsonl", cut, field="content")
    cut.write_bytes(b"")
    assert texts("jsonl", cut) == []


def test_text_that_begins_as_bzip2_does_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("BZh is how it begins.", encoding="utf-8")
    assert texts("text", tmp_path) == ["BZh is how it begins."]


def test_a_frame_to_skip_comes_before_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"\x50\x2a\x4d\x18\x04\0\0\0size" + zstandard.compress(JSON_LINES))
    assert texts("jsonl", path) == ["One. Two.", "Three."]


def tarred(data: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("content", "said", "fix"),
    [
        (zipped(b"x", "a.txt", "b.txt"), "a zip archive of 2 files", "unpack"),
        (tarred(b"x"), "a tar archive, not text", "unpack"),
        (b"%PDF-1.7\n%\xe2\xe3", "a PDF file, not text", "convert"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Microsoft Office", "convert"),
        (b"PAR1\x15\x04", "a Parquet file, not text", "data.name=parquet"),
        (b"\x80\x04\x95\x00", "a Python pickle", "convert"),
        (b"SQLite format 3\0", "an SQLite database", "convert"),
        (b"caf\xe9", "not UTF-8", "iconv"),
        (gzip.compress(gzip.compress(b"x")), "compressed twice; gzip is inside", "unpack it once"),
    ],
    ids=[
        "zip",
        "tar",
        "pdf",
        "office",
        "parquet",
        "pickle",
        "sqlite",
        "latin-1",
        "twice",
    ],  # archives hold the time
)
def test_what_is_not_text_is_named(tmp_path: Path, content: bytes, said: str, fix: str) -> None:
    for kind, name in (("text", "a.txt"), ("jsonl", "a.jsonl"), ("csv", "a.csv")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}.*: .*{re.escape(said)}") as caught:
            texts(kind, tmp_path / name)
        assert fix in str(caught.value.fix) or kind == "jsonl"


class TestJson:
    @pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
    @pytest.mark.parametrize("indent", [None, 2])
    @pytest.mark.parametrize("name", ["a.json", "a.jsonl", "A.JSON"])
    def test_a_list_of_objects(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None, name: str
    ) -> None:
        monkeypatch.setattr(_packed, "CHUNK", chunk)
        rows = [{"text": "Ünö.", "n": 12}, {"text": '[{,]} \\ " 😀', "deep": [{"a": [1, 2.5e3]}]}]
        path = tmp_path / name
        path.write_text(
            "\ufeff " * (chunk > 7) + json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8"
        )
        found = documents("jsonl", path)
        assert [document.text for document in found] == [row["text"] for row in rows]
        assert found[1].source == f"{path} (element 2)"

    def test_json_is_read_as_lines_or_one_object_after_the_other(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_bytes(JSON_LINES)
        assert [d.source for d in documents("jsonl", path)] == [f"{path}:1", f"{path}:2"]
        path.write_text('{\n "text": "One."\n}\n{\n "text": "Two."\n}\n')
        assert texts("jsonl", path) == ["One.", "Two."]
        path.write_text("[]")
        assert texts("jsonl", path) == []

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ('[{"text": "x"}, {"texts": 1}]', r"\(element 2\): no field 'text'; .*'texts'"),
            ('[{"text": "x"}, 3]', r"\(element 2\): a JSON object is needed, this is a number"),
            ('[{"text": "x"},\n{"text": "y"}', "the list has no end after element 2"),
            ('[{"text": "x"},\n{"text": "y', r"\(element 2\): broken JSON"),
            ('[{"text": "x"}, oops]', r"\(element 2\): broken JSON"),
            ('{\n"text": [1]}', r"\(element 1\): field 'text' is a list"),
            ('[{"text": "x"}, {"text": ' + "[" * 100_000, "JSON"),
            ('[{"text": "' + "x" * 3000, "over 0 MiB, or broken JSON"),
        ],
    )
    def test_a_bad_element_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, said: str
    ) -> None:
        if "over" in said:
            monkeypatch.setattr(_packed, "CHUNK", 100)
            monkeypatch.setattr(_files, "LARGEST_DOCUMENT", 1000)
        path = tmp_path / "a.json"
        path.write_text(content)
        with pytest.raises(DataError, match=rf"a\.json.*{said}") as caught:
            texts("jsonl", path)
        assert caught.value.fix

    def test_bad_elements_can_be_skipped(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_text('[{"text": "x"}, {"texts": 1}, null, {"text": "y"}]')
        assert texts("jsonl", path, on_bad_line="skip") == ["x", "y"]


ROWS = ["a é", "b", None, "c"]
TYPES = {
    "string": arrow.string(),
    "large_string": arrow.large_string(),
    "string_view": arrow.string_view(),
    "binary": arrow.binary(),
    "large_binary": arrow.large_binary(),
    "binary_view": arrow.binary_view(),
    "dictionary": arrow.dictionary(arrow.int32(), arrow.string()),
    "dictionary of large strings": arrow.dictionary(arrow.int8(), arrow.large_string()),
    "dictionary of views": arrow.dictionary(arrow.uint32(), arrow.string_view()),
    "null": arrow.null(),
}


def table(kind: arrow.DataType, values: list | None = None, name: str = "text") -> arrow.Table:
    values = ROWS if values is None else values
    if arrow.types.is_null(kind):
        column = arrow.nulls(len(values))
    elif arrow.types.is_dictionary(kind):
        words = [value for value in values if value is not None]
        indices = arrow.array([None if v is None else words.index(v) for v in values], kind.index_type)
        column = arrow.DictionaryArray.from_arrays(indices, arrow.array(words, kind.value_type))
    else:
        column = arrow.array(values, kind)
    return arrow.table({"id": range(len(values)), name: column})


def write(path: Path, rows: arrow.Table, **options: object) -> Path:
    """By its suffix: Parquet, an Arrow file as polars and pandas write it, or a stream as datasets does."""
    if path.suffix.lower() == ".parquet":
        parquet.write_table(rows, path, **options)
    elif path.suffix == ".arrow":
        with arrow.ipc.new_stream(path, rows.schema) as stream:
            stream.write(rows)
    else:
        options = {"options": arrow.ipc.IpcWriteOptions(compression="lz4")}
        with arrow.ipc.new_file(path, rows.schema, **options) as file:
            file.write(rows)
    return path


class TestParquet:
    @pytest.mark.parametrize("kind", TYPES)
    @pytest.mark.parametrize("suffix", [".parquet", ".feather", ".arrow"])
    def test_every_kind_of_text(self, tmp_path: Path, kind: str, suffix: str) -> None:
        path = tmp_path / f"a{suffix}"
        try:
            write(path, table(TYPES[kind]))
        except arrow.ArrowException as error:
            pytest.skip(f"this version of pyarrow does not write it: {error}")
        found = documents("parquet", tmp_path)
        assert [document.text for document in found] == [
            "" if kind == "null" or text is None else text for text in ROWS
        ]
        assert found[1].source == f"{path} row 2"

    @pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "brotli", "lz4", "zstd"])
    def test_every_compression_and_partitioned_folders(self, tmp_path: Path, compression: str) -> None:
        for number, folder in enumerate(["lang=de/year=1", "lang=en", "_delta_log", "_temporary/0"]):
            (tmp_path / folder).mkdir(parents=True)
            rows = table(arrow.string(), [f"Document {number}."] * 200)
            write(tmp_path / folder / "part-0.PARQUET", rows, compression=compression, row_group_size=90)
        (tmp_path / "_SUCCESS").touch()
        assert texts("parquet", tmp_path) == ["Document 0."] * 200 + ["Document 1."] * 200
        assert len(texts("parquet", tmp_path, max_documents=70)) == 70

    @pytest.mark.parametrize(
        ("rows", "said"),
        [
            ({"txt": ["x"], "id": [1]}, r"no column 'text'; there are 'txt', 'id'\. Did you mean 'txt'"),
            ({}, "no column 'text'; there are none"),
            ({"text": [["x"]]}, r"column 'text' is list<\w+: string>, not text"),
            ({"text": [{"text": "x"}]}, r"column 'text' is struct<text: string>, not text"),
            ({"text": [1]}, "column 'text' is int64, not text"),
            ({"text": [b"ok", b"caf\xe9"]}, r"row 2: column 'text' is not UTF-8: byte 0xe9 at offset 3"),
        ],
    )
    @pytest.mark.parametrize("suffix", [".parquet", ".ipc"])
    def test_what_cannot_be_used_is_named(self, tmp_path: Path, rows: dict, said: str, suffix: str) -> None:
        path = write(tmp_path / f"a{suffix}", arrow.table(rows))
        with pytest.raises(DataError, match=rf"a\{suffix}.*{said}") as caught:
            texts("parquet", path)
        assert "data.options.field" in str(caught.value.fix)

    def test_two_columns_of_one_name(self, tmp_path: Path) -> None:
        column = arrow.array(["x"])
        path = write(tmp_path / "a.ipc", arrow.Table.from_arrays([column, column], names=["text", "text"]))
        with pytest.raises(DataError, match="the column 'text' twice"):
            texts("parquet", path)

    @pytest.mark.parametrize("suffix", [".parquet", ".ipc", ".arrow"])
    def test_damaged_files_are_named(self, tmp_path: Path, suffix: str) -> None:
        path = write(tmp_path / f"a{suffix}", table(arrow.string()))
        whole = path.read_bytes()
        for content in (b"", b"no such thing", whole[:100], whole[: len(whole) // 2]):
            path.write_bytes(content)
            with pytest.raises(DataError, match=rf"a\{suffix}: (neither|cannot be read)") as caught:
                texts("parquet", path)
            assert caught.value.fix

    def test_no_rows_and_large_documents(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write(tmp_path / "a.parquet", table(arrow.string(), []))
        assert texts("parquet", path) == []
        monkeypatch.setattr("sentcompress.datasets.parquet.LARGEST_DOCUMENT", 10)
        write(path, table(arrow.string(), ["short", "longer than that"]))
        with pytest.raises(DataError, match="row 2: a document of over"):
            texts("parquet", path)


class TestCsv:
    @pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
    def test_the_delimiter_is_the_one_that_finds_the_column(self, tmp_path: Path, delimiter: str) -> None:
        path = tmp_path / "a.csv"
        lines = [["id", "text"], ["1", '"One, two; three|\n""four""\t"'], ["2", "Five"], []]
        path.write_text(
            "\ufeff" + "".join(delimiter.join(line) + "\r\n" for line in lines), encoding="utf-8", newline=""
        )
        found = documents("csv", path)
        assert [document.text for document in found] == ['One, two; three|\n"four"\t', "Five"]
        assert found[1].source == f"{path}:4"
        assert texts("csv", path, delimiter=delimiter) == [document.text for document in found]

    def test_long_texts_pass(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
        assert len(texts("csv", tmp_path)[0]) == 200_000

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"id,content\n1,x\n", r"a\.csv: no column 'text' in the first line; there are 'id', 'content'"),
            (b"id,text\n1,x,y\n", r"a\.csv:2: 3 column\(s\), and the header has 2"),
            (b"id,text\n1,x\n2\n", r"a\.csv:3: 1 column\(s\), and the header has 2"),
            (b'text\n"never closed\n', r"a\.csv:\d+: cannot be read as CSV: unexpected end"),
            (b"text\ncaf\xe9\n", r"a\.csv:2: not UTF-8: byte 0xe9"),
        ],
    )
    def test_what_cannot_be_used_is_named(self, tmp_path: Path, content: bytes, said: str) -> None:
        (tmp_path / "a.csv").write_bytes(content)
        with pytest.raises(DataError, match=said) as caught:
            texts("csv", tmp_path)
        assert caught.value.fix

    def test_an_empty_file_has_no_rows(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").touch()
        assert texts("csv", tmp_path) == []
