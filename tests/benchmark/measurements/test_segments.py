"""The hand-labelled cases: sound in themselves, and the scores we promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from sentcompress.benchmark.measurements.segments import (
    LABELS,
    load_cases,
    regex_presets,
    render_markdown,
    score_segmenters,
)
from sentcompress.contracts import Segmenter
from sentcompress.segmenters.regex import RegexSegmenter


class Whole(Segmenter):
    """Never cuts."""

    def split(self, text: str) -> list[str]:
        return [text] if text else []


def test_labels_lose_nothing() -> None:
    for case in load_cases():
        for label in LABELS:
            if label in case:
                assert "".join(case[label]) == case["text"], case["id"]
                assert all(case[label]), case["id"]


def test_labels_keep_the_white_space_convention() -> None:
    for case in load_cases():
        for label in LABELS:
            for piece in case.get(label, [])[1:]:
                assert "\n" not in piece[: len(piece) - len(piece.lstrip())], case["id"]


def test_there_are_enough_cases() -> None:
    cases = load_cases()
    assert len({case["id"] for case in cases}) == len(cases) >= 160
    assert sum("paper" in case for case in cases) >= 40
    assert len({case["group"] for case in cases}) == 17


@pytest.mark.parametrize(("preset", "least"), [("sentence", 0.95), ("clause", 0.95), ("paper", 1.0)])
def test_presets_reach_their_score(preset: str, least: float) -> None:
    row = score_segmenters({preset: RegexSegmenter(RegexSegmenter.Options(preset=preset))})[0]
    assert row["label"] == preset
    assert row["share"] >= least


def test_a_segmenter_that_never_cuts_scores_its_silence() -> None:
    row = score_segmenters({"whole": Whole()})[0]
    wanted = [len(case["sentence"]) == 1 for case in load_cases()]
    assert row["right"] == sum(wanted)
    assert (row["precision"], row["recall"], row["f1"]) == (1.0, 0.0, 0.0)
    assert sum(group["cases"] for group in row["groups"].values()) == row["cases"] == len(wanted)


def test_the_table_has_a_line_for_every_segmenter_and_group() -> None:
    rows = score_segmenters(
        {"whole": Whole(), "paper": RegexSegmenter(RegexSegmenter.Options(preset="paper"))}
    )
    table = render_markdown(rows)
    assert "| paper | paper | " in table
    assert all(f"| {group} | " in table for group in rows[0]["groups"])


def test_the_table_in_the_docs_is_fresh() -> None:
    page = Path(__file__).parents[3] / "docs" / "segmenters.md"
    assert render_markdown(score_segmenters(regex_presets())) in page.read_text(encoding="utf-8")


def test_cases_the_rules_were_not_fitted_to() -> None:
    segmenter = RegexSegmenter()
    late = [case for case in load_cases() if case["id"].startswith("late-")]
    assert sum(segmenter.split(case["text"]) == case["sentence"] for case in late) >= 36
