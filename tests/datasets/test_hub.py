"""The hub dataset: a real one from a local folder, and what is said when the hub is out of reach."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sentcompress.datasets.hub import HubDataset
from sentcompress.errors import DataError

ROWS = '{"story": "Once."}\n{"story": "Twice."}\n{"story": null}\n'


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "train.jsonl").write_text(ROWS, encoding="utf-8")
    return folder


def hub(path: object, **options: object) -> HubDataset:
    return HubDataset(HubDataset.Options(path=str(path), **options))


def test_rows_of_a_local_folder(repository: Path) -> None:
    documents = list(hub(repository, field="story", max_documents=2).documents())
    assert [document.text for document in documents] == ["Once.", "Twice."]
    assert documents[1].source.endswith("[train] row 2")
    assert [d.text for d in hub(repository, field="story").documents()][2] == ""


def test_missing_column_names_those_there(repository: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'text'; there are 'story'"):
        list(hub(repository).documents())


def test_missing_split(repository: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        list(hub(repository, split="nope", field="story").documents())


def test_files_that_another_dataset_reads(repository: Path) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl: a file") as caught:
        list(hub(repository / "train.jsonl").documents())
    assert "--data" in str(caught.value.fix)
    (repository / "train.jsonl").rename(repository / "UPPER.JSONL")
    with pytest.raises(DataError, match="cannot be read") as caught:
        list(hub(repository, field="story").documents())
    assert "--data" in str(caught.value.fix)


def test_code_in_a_repository_is_never_run(repository: Path) -> None:
    (repository / "train.jsonl").unlink()
    (repository / "repository.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    with pytest.raises(DataError):
        list(hub(repository).documents())


@pytest.mark.parametrize("streaming", [True, False])
def test_offline_says_what_to_do(tmp_path: Path, streaming: bool) -> None:
    script = (
        "from sentcompress.datasets.hub import HubDataset\n"
        "from sentcompress.errors import OfflineError\n"
        f"dataset = HubDataset(HubDataset.Options(path='someone/something', streaming={streaming}))\n"
        "try:\n    list(dataset.documents())\n"
        "except OfflineError as error:\n    print(error)\n"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    # A process of its own: the libraries read the variable when they are imported.
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    assert "'someone/something' must come from the hub" in result.stdout, result.stdout + result.stderr
    assert "python-package" in result.stdout
