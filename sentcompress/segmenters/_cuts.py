"""From the places of the cuts to the pieces: the white-space convention, and the joining of short pieces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

import regex

CLAUSE, SENTENCE, LINE, BLANK = 1, 2, 3, 4
"""How strong a cut is; of the two around a short piece the weaker is given up."""

LINE_ENDS = "\n\r\x0b\x0c\x85\u2028\u2029"
"""The characters after which UAX #14 breaks a line in every case (``\r\n`` is one line end); all cut alike."""
SPACE = r"\s\x1c-\x1f"  # what str.isspace calls white space
WIDE = r"\p{Han}\p{Hiragana}\p{Katakana}\u3001-\u303f\uff01-\uff65"

ANY_LINE_END = regex.compile(rf"\r\n|[{LINE_ENDS}]")
LAST_LINE_END = regex.compile(rf"(?r)[{LINE_ENDS}]")

_SPACES = regex.compile(rf"[{SPACE}]*+")
_WIDE_CHARACTER = regex.compile(rf"[{WIDE}]")


def marks_of_all_scripts(besides: str) -> tuple[str, str]:
    """Marks that end sentences, and those that end clauses, but for ``besides``, from Unicode's properties.

    Sentence_Terminal has some marks whose use is that of a comma, and lacks those of Tibetan and Thai and the end of
    a Hebrew verse. Terminal_Punctuation also has marks that stand between words, more of them beyond the first plane.
    """
    characters = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x1F000)]))
    marks = regex.findall(r"\p{Terminal_Punctuation}", characters)
    sentence = {mark for mark in marks if regex.match(r"\p{Sentence_Terminal}", mark)}
    sentence = (sentence | set("།༎༏༐༑༔๚๛׃")) - set("၊꧈᭞᜵․")
    clause = {mark for mark in marks if mark < "\U00010000"} - sentence - set("․፡༈᛫᛬᛭࡞")
    return "".join(sorted(sentence.difference(besides))), "".join(sorted(clause.difference(besides)))


def skip_spaces(text: str, position: int) -> int:
    """Where the white space at ``position`` ends."""
    if not text[position : position + 1].isspace():
        return position
    if not text[position + 1 : position + 2].isspace():
        return position + 1
    match = _SPACES.match(text, position)
    return match.end() if match else position


def settle(text: str, position: int) -> int:
    """Move a cut to where our convention wants it; the length of the text means there is nothing to cut.

    Line ends, and the white space before them, close the piece before. Other white space opens the piece
    after, because byte-level vocabularies hold ``" word"`` as one token.
    """
    end = skip_spaces(text, position)
    if end == len(text) or end == position:
        return end
    if end == position + 1:
        return end if text[position] in LINE_ENDS else position
    last = LAST_LINE_END.search(text, position, end)
    return last.end() if last else position


def weight(piece: str, enough: int) -> int:
    """Characters of a piece without the white space around it; Chinese and Japanese ones count two."""
    size = len(piece) if len(piece) > 8 * enough + 64 else len(piece.strip())
    return size if size >= enough else size + len(_WIDE_CHARACTER.findall(piece))


def pieces(text: str, cuts: Iterable[tuple[int, int]], minimum: Mapping[int, int]) -> list[str]:
    """Cut ``text`` at settled ``(position, strength)`` pairs in order, then join what is too short.

    ``minimum[strength]`` is the least weight a piece may have for a cut of that strength beside it to stay.
    """
    if not text:
        return []
    kept: list[tuple[int, int]] = [(0, BLANK + 1)]
    for position, strength in _distinct(text, cuts):
        start, before = kept[-1]
        weaker = min(before, strength)
        if weight(text[start:position], minimum[weaker]) < minimum[weaker]:
            # A short line ("}") goes with the lines above it, any other short piece with what follows.
            if strength < before or (strength == before and strength != LINE):
                continue
            kept.pop()
        kept.append((position, strength))
    start, before = kept[-1]
    if len(kept) > 1 and weight(text[start:], minimum[before]) < minimum[before]:
        kept.pop()
    places = [position for position, _ in kept] + [len(text)]
    return [text[a:b] for a, b in pairwise(places)]


def _distinct(text: str, cuts: Iterable[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """Yield each place once with its greatest strength, and none that leaves only white space before it."""
    last, held = 0, (0, 0)
    for position, strength in cuts:
        if position == held[0]:
            held = (position, max(strength, held[1]))
            continue
        if held[0] > last:
            yield held
            last = held[0]
        if position < len(text) and not text[last:position].isspace():
            held = (position, strength)
    if held[0] > last:
        yield held
