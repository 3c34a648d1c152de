import os

import pyarrow
import pyarrow.parquet
import pytest

from sentcompress.errors import DataError
from sentcompress.registry import get_registry


def write(path, texts, column="text", type=None):
    table = pyarrow.table({"id": range(len(texts)), column: pyarrow.array(texts, type)})
    pyarrow.parquet.write_table(table, path, row_group_size=2)


def dataset(*paths, **options):
    return get_registry().create("dataset", "parquet-rows", {"paths": [str(p) for p in paths], **options})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "b.parquet", ["B one. It is short.", "B two. It is short."])
    write(tmp_path / "deep" / "c.parquet", ["C one. It is short."])
    write(tmp_path / "a.parquet", ["A one. It is short.", "A two. ünïcödé 文。", "A three. It is short."])
    return tmp_path


def test_it_fulfils_the_contract_of_a_dataset(check_plugin, folder):
    check_plugin("dataset", "parquet-rows", options={"paths": [str(folder)]})


def test_a_row_is_a_document(folder):
    read = list(dataset(folder).documents())
    assert [d.text[:5] for d in read] == ["A one", "A two", "A thr", "B one", "B two", "C one"]
    assert read[1].text == "A two. ünïcödé 文。"
    assert read[1].source == f"{folder}/a.parquet:2"
    assert len(list(dataset(folder, max_documents=2).documents())) == 2
    globbed = dataset(folder / "deep" / "*.parquet", folder / "b.parquet")
    assert [d.text[:5] for d in globbed.documents()] == ["C one", "B one", "B two"]


@pytest.mark.parametrize(
    "kind", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())], ids=str
)
def test_text_however_it_is_stored(tmp_path, kind):
    write(tmp_path / "a.parquet", ["One.", "Two.", "One."], type=kind)
    assert [d.text for d in dataset(tmp_path).documents()] == ["One.", "Two.", "One."]


def test_the_fingerprint_changes_with_the_files(folder):
    before = dataset(folder).fingerprint()
    assert dataset(folder).fingerprint() == before
    assert dataset(folder, column="other").fingerprint() != before
    os.utime(folder / "a.parquet", ns=(1, 1))
    assert dataset(folder).fingerprint() != before


def test_rows_without_text(tmp_path, capsys):
    write(tmp_path / "a.parquet", ["One.", None, "Three."])
    with pytest.raises(DataError, match=r"a\.parquet:2: no text in column 'text'"):
        list(dataset(tmp_path).documents())
    kept = list(dataset(tmp_path, on_bad_row="skip").documents())
    assert [d.source[-1] for d in kept] == ["1", "3"]
    assert "1 row(s) without text skipped" in capsys.readouterr().err
    write(tmp_path / "a.parquet", [None, None])
    with pytest.raises(DataError, match="in any of the 2 rows"):
        list(dataset(tmp_path, on_bad_row="skip").documents())


def test_what_is_wrong_is_named(tmp_path):
    write(tmp_path / "a.parquet", ["One."], column="texts")
    with pytest.raises(DataError, match=r"no column 'text'; there is 'id', 'texts'\. Did you mean 'texts'\?"):
        list(dataset(tmp_path).documents())
    with pytest.raises(DataError, match="column 'id' is int64, not text"):
        list(dataset(tmp_path, column="id").documents())
    (tmp_path / "a.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
        list(dataset(tmp_path).documents())
    with pytest.raises(DataError, match="nowhere: no Parquet file there"):
        list(dataset(tmp_path / "nowhere").documents())
