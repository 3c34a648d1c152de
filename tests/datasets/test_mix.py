"""Several sources as one: weights, held-out copies, messages."""

import math
from collections import Counter
from pathlib import Path

import pytest

from sentcompress.errors import DataError, RecipeError, SentCompressError
from sentcompress.registry import get_registry
from sentcompress.text.corpus import build_corpus


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for source in ("a", "b"):
        folder = tmp_path / source
        folder.mkdir()
        for number in range(40):
            (folder / f"{number:02}.txt").write_text(f"Text {number} of {source}. It ends here.")
    return tmp_path


def source(folder: Path, weight: float = 1.0):
    return {"name": "text", "options": {"paths": [str(folder)]}, "weight": weight}


def mix(*sources, **options):
    return get_registry().create("dataset", "mix", {"sources": list(sources), **options})


def counts(dataset) -> Counter:
    return Counter(document.text for document in dataset.documents())


def test_weights_say_how_often_a_document_is_read(files):
    found = counts(mix(source(files / "a", 2), source(files / "b", 0.5)))
    assert all(found[f"Text {n} of a. It ends here."] == 2 for n in range(40))
    of_b = [text for text in found if "of b" in text]
    assert 10 <= len(of_b) <= 30
    assert set(of_b) <= set(counts(mix(source(files / "b", 0.75))))  # more of it keeps what there was


def test_a_held_out_text_is_held_out_in_all_its_copies_and_scored_once(files, tmp_path, tokenizer):
    dataset = mix(source(files / "a", 3), heldout_documents=4)
    corpus = build_corpus(
        dataset,
        get_registry().create("segmenter", "regex"),
        tokenizer,
        cache_dir=tmp_path / "cache",
        progress=False,
    )
    held = [corpus.document_text(number) for number in corpus.heldout]
    trained = {corpus.document_text(number) for number in corpus.train}
    assert len(held) == len(set(held)) >= 2
    assert not set(held) & trained
    assert len(corpus.train) == 3 * len(trained) == 3 * (40 - len(held))


def test_files_count_for_the_fingerprint(files):
    before = mix(source(files / "a")).fingerprint()
    assert before == mix(source(files / "a")).fingerprint()
    assert before != mix(source(files / "a", 2)).fingerprint()
    (files / "a" / "more.txt").write_text("More.")
    assert before != mix(source(files / "a")).fingerprint()


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ([{"name": "text", "options": {"pathz": ["x"]}}], r"sources\.0\.options\.pathz: unknown key"),
        ([{"name": "txt"}], "no dataset is called 'txt'"),
        ([{"name": "text", "options": {"paths": ["x"]}, "weight": 0}], r"sources\.0\.weight"),
        *(
            (
                [{"name": "text", "options": {"paths": ["x"]}, "weight": weight}],
                rf"sources\.0\.weight: .*got {said}",
            )
            for weight, said in ((-1, "-1"), (math.nan, "nan"), (math.inf, "inf"), (1001, "1001"))
        ),
        ([], "sources"),
    ],
)
def test_what_is_wrong_with_a_source_is_said_before_anything_is_read(sources, said):
    with pytest.raises(SentCompressError, match=said):
        mix(*sources)


def test_a_source_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(mix(source(tmp_path / "nowhere")).documents())


def test_a_weight_that_is_refused_says_what_weights_mean():
    with pytest.raises(RecipeError, match=r"data\.options\.sources\.0\.weight: must be above 0") as caught:
        mix({"name": "text", "options": {"paths": ["x"]}, "weight": 0})
    assert "2 reads each document twice" in str(caught.value.fix)


def test_a_weight_that_takes_no_document_is_named(files):
    dataset = mix(source(files / "a"), source(files / "b", 1e-300))
    with pytest.raises(
        DataError, match=r"sources\.1\.weight: 1e-300 takes none of the 40 .*'text'"
    ) as caught:
        list(dataset.documents())
    assert "raise that weight" in str(caught.value.fix)
