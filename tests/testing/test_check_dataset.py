"""check_dataset passes what is right and catches each way to be wrong, in one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from sentcompress.contracts import Dataset, DatasetOptions, Document, Options
from sentcompress.errors import DataError
from sentcompress.registry import get_registry
from sentcompress.testing import CheckFailed, check_dataset, check_plugin


class Right(Dataset):
    """Every wrong one differs in one thing."""

    def documents(self) -> Iterator[Any]:
        return (Document(f"Text {n}.", f"row {n}") for n in range(5))


class Nothing(Right):
    def documents(self) -> Iterator[Any]:
        return iter(())


class Blank(Right):
    def documents(self) -> Iterator[Any]:
        return (Document(" \n", f"row {n}") for n in range(3))


class Strings(Right):
    def documents(self) -> Iterator[Any]:
        return iter(["Text 0."])


class Bytes(Right):
    def documents(self) -> Iterator[Any]:
        yield Document(b"Text", "row 0")  # type: ignore[arg-type]


class Number(Right):
    def documents(self) -> Iterator[Any]:
        yield Document("Text", 0)  # type: ignore[arg-type]


class NoSource(Right):
    def documents(self) -> Iterator[Any]:
        yield Document("Text 0.", "")


class OneSource(Right):
    def documents(self) -> Iterator[Any]:
        return (Document(f"Text {n}.", "corpus.db") for n in range(5))


class Surrogate(Right):
    def documents(self) -> Iterator[Any]:
        yield Document("Text \ud83d cut in half", "row 0")


class Once(Right):
    """Holds an iterator, which is used up by the first reader."""

    def __init__(self, options: Any | None = None) -> None:
        super().__init__(options)
        self.rows = super().documents()

    def documents(self) -> Iterator[Any]:
        return self.rows


_turn = count()


class Shuffled(Right):
    def documents(self) -> Iterator[Any]:
        turn = next(_turn)
        return (Document(f"Text {(n + turn) % 5}.", f"row {n}") for n in range(5))


class EachItsOwn(Right):
    def __init__(self, options: Any | None = None) -> None:
        super().__init__(options)
        self.turn = next(_turn)

    def documents(self) -> Iterator[Any]:
        yield Document(f"Text {self.turn}", "row 0")


class Raises(Right):
    def documents(self) -> Iterator[Any]:
        yield Document("Text 0.", "row 0")
        raise DataError("row 1: no\nsuch column", fix="name another")


class FingerprintBytes(Right):
    def fingerprint(self) -> Any:
        return b"abc"


class FingerprintOfInstance(Right):
    def fingerprint(self) -> str:
        return f"at {id(self)}"


class FingerprintOfReading(Right):
    read = 0

    def documents(self) -> Iterator[Any]:
        self.read += 1
        return super().documents()

    def fingerprint(self) -> str:
        return str(self.read)


class OtherOptions(Right):
    Options = Options


WRONG: dict[type, str] = {
    Nothing: r"yields 0 document\(s\), none of them with text; at least one document must contain text",
    Blank: r"yields 3 document\(s\), none of them with text",
    Strings: r"yields 'Text 0.' as document 0; it must be a sentcompress.Document\(text, source\)",
    Bytes: r"yields document 0 with text b'Text'; text must be a str",
    Number: r"yields document 0 with source 0; source must be a str",
    NoSource: r"yields document 0 \('Text 0.'\) without a source; messages show it",
    OneSource: r"has only 1 source\(s\) for 5 documents, such as 'corpus.db'; a source must identify",
    Surrogate: r"yields an unpaired surrogate, '\\ud83d' at character 5 of row 0; decode strictly",
    Once: r"yields different documents the second time: number 0 is first 'Text 0.' from 'row 0', then missing",
    Shuffled: r"yields different documents the second time: number 0 is first 'Text \d.' from 'row 0', then 'Text",
    EachItsOwn: r"yields different documents from a new instance with the same options: number 0 is first 'Text",
    Raises: r"documents\(\) raised DataError: row 1: no such column fix: name another \(test_check_dataset.py:\d+\)",
    FingerprintBytes: r"has the fingerprint b'abc'; it must be a non-empty str",
    FingerprintOfInstance: r"has a different fingerprint for a new instance: first 'at \d+', then 'at \d+'; it must",
    FingerprintOfReading: r"has a different fingerprint after reading: first '0', then '2'",
    OtherOptions: r"has Options without heldout_documents .*; they must be a subclass of sentcompress.DatasetOpt",
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda cls: cls.__name__)
def test_a_wrong_dataset_is_caught_in_one_sentence(wrong: type[Dataset]) -> None:
    with pytest.raises(CheckFailed, match=WRONG[wrong]) as caught:
        check_dataset(wrong)
    said = str(caught.value)
    assert said.startswith(f"dataset {wrong.__module__}.{wrong.__qualname__}")
    assert "\n" not in said
    assert len(said) < 500


def test_every_dataset_that_is_built_in_passes(text_files: Path, tmp_path: Path) -> None:
    lines = tmp_path / "corpus.jsonl"
    lines.write_text("".join(json.dumps({"text": f"Text {n}."}) + "\n" for n in range(4)))
    texts = [f"Text {n}." for n in range(4)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "corpus.parquet")
    (tmp_path / "corpus.csv").write_text("\n".join(["text", *texts]))
    options: dict[str, dict[str, Any]] = {
        "text": {"paths": [str(text_files)]},
        "jsonl": {"paths": [str(lines)]},
        "parquet": {"paths": [str(tmp_path / "corpus.parquet")]},
        "csv": {"paths": [str(tmp_path / "corpus.csv")]},
        "python-package": {"package": "sentcompress", "pattern": "fusions/*.py"},
        "hub": {"path": str(tmp_path)},
        "mix": {"sources": [{"name": "jsonl", "options": {"paths": [str(lines)]}, "weight": 2}]},
    }
    own = {
        n for n in get_registry().names("dataset") if get_registry().owner("dataset", n).name == "datasets"
    }
    assert own == set(options)
    for name, given in options.items():
        check_plugin("dataset", name, given)


def test_an_endless_dataset_is_read_in_part() -> None:
    class Endless(Right):
        def documents(self) -> Iterator[Any]:
            return (Document(f"Text {n}.", f"row {n}") for n in count())

    check_dataset(Endless, documents=20)
    check_dataset(Right, DatasetOptions(heldout_documents=2))
    with pytest.raises(
        CheckFailed,
        match=r"^dataset 'text' \(sentcompress.datasets.text.TextDataset, package "
        r"'sentcompress' \S+\) refuses the options of this check: options.paths: required",
    ):
        check_plugin("dataset", "text")
