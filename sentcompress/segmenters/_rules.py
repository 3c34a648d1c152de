"""Where sentences and clauses end: one pass over candidate marks, each judged by a bounded look around it.

Everything here is linear in the length of the text: quantifiers are possessive, look-arounds have a limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import regex

from sentcompress.segmenters._cuts import CLAUSE, LINE_ENDS, SENTENCE, SPACE, WIDE, settle, skip_spaces
from sentcompress.segmenters._lines import line_cut
from sentcompress.segmenters._words import (
    AFTER_COMMA,
    BEFORE_CAPITAL,
    BEFORE_NUMBER,
    DATES,
    HEADINGS,
    MAY_END,
    NAMES_WITH_MARK,
    NEVER_LAST,
    SHORT_LAST,
    STARTERS,
)

_DOTS = ".…‥．"
_MARKS = _DOTS + "!?؟۔।॥։።‼⁇⁈⁉"
_HARD = "。！？｡"  # cut without a space after them
_CLAUSE_MARKS = ",;:،؛"
_HARD_CLAUSE = "，；：、"
_CLOSERS = "\"'”’»›)]}」』】》〉）］*_~`"
_OPENERS = "\"'“‘„«‹([{「『【《〈（［*_~`¿¡"
_AROUND = 200  # how far we look for the other bracket

_E = r"(?:(?![✅❌✔✖☑➡👉📌⭐🔹🔸🔴🟢🚩])\p{Emoji_Presentation}|[\ufe0f\u200d♀♂❤\U0001f3fb-\U0001f3ff])"
# What still belongs to a sentence after its marks: a German or French closing quote, footnotes, emoji.
_TAIL = (
    rf"(?:“(?=[{SPACE}]|\Z)|[ \u00a0\u202f]»)?+(?:\[\d{{1,3}}\]|[¹²³⁰⁴-⁹]){{0,4}}+"
    rf"(?:(?:\x20?+{_E}++)++(?!\x20*+\p{{Ll}}))?+"
)
_DASH = r"(?<=[\w”\"'’)])(?:—{1,2}+|--)(?=[\w“\"'‘(])|(?<=\S\x20)(?:[—–]|-{1,3}+)(?=\x20)"


def _pattern(clauses: bool) -> regex.Pattern[str]:
    hard = _HARD + (_HARD_CLAUSE if clauses else "")
    soft = _MARKS + _CLOSERS + (_CLAUSE_MARKS if clauses else "")
    hard, soft = regex.escape(hard), regex.escape(soft)
    run = (
        rf"(?<![{soft}{hard}])(?:[{soft}]*+[{hard}][{soft}{hard}]*+{_TAIL}"
        rf"|[{soft}]++{_TAIL}(?=[{SPACE}{WIDE}]|\Z))"
    )
    parts = [
        rf"(?P<line>[{LINE_ENDS}][{SPACE}]*+)",
        rf"(?P<smile>(?<=[{SPACE}])[:;]-?[)(DP](?=[{SPACE}])|(?<!{_E}){_E}++(?=[{SPACE}]))",
        rf"(?P<run>{run})",
    ]
    return regex.compile("|".join(parts + ([rf"(?P<dash>{_DASH})"] if clauses else [])))


_SENTENCES, _CLAUSES = _pattern(clauses=False), _pattern(clauses=True)

_ALL_MARKS = _MARKS + _HARD + _CLAUSE_MARKS + _HARD_CLAUSE
_HARD_SET, _DOT_SET = frozenset(_HARD), frozenset(_DOTS)
_NOT_NEXT = frozenset(_ALL_MARKS + "”’»›)]}」』】》〉）］")
_LAST_MARK = regex.compile(rf"(?r)[{regex.escape(_ALL_MARKS)}]")
_WORD_BEFORE = regex.compile(r"(?rV1)[[\p{L}\p{M}\p{N}.]--[\p{Han}\p{Hiragana}\p{Katakana}]]{0,24}")
_WORD = regex.compile(r"\p{L}[\p{L}\p{M}'’]{0,20}+")
_LETTERS = regex.compile(r"(?:\p{L}\.)*\p{L}")
_NUMBERING = regex.compile(r"\d{1,3}(?:\.\d{1,3})*|\p{L}|[ivx]{1,5}|[IVX]{1,5}")
_ROMAN_OR_NUMBER = regex.compile(r"\d{1,3}|[IVXLC]{1,6}")
# '"What?" John asked.' is one sentence, and so are its Chinese and Japanese forms.
_SPEAKER = regex.compile(
    r"(?!(?:He|She|They|We|You|It)\b)\p{Lu}[\p{L}'’]{0,20}+\.?(?:\x20\p{Lu}[\p{L}'’]{0,20}+)?\x20"
    r"(?:said|asked|replied|answered|cried|shouted|whispered|exclaimed|wondered|added|called|yelled)\b"
    r"|\p{Han}{1,6}?[说說道问問喊叫][。，：]|(?:と|って|、|，|という|[のをがはにでもへ](?=\p{Han}))"
)


def cuts(text: str, clauses: bool) -> Iterator[tuple[int, int]]:
    """Yield ``(position, strength)`` of every place the text should be cut at, settled and in order."""
    last = 0
    fenced = text.startswith("```")
    for match in (_CLAUSES if clauses else _SENTENCES).finditer(text):
        kind, end = match.lastgroup, match.end()
        if kind == "line":
            fence = text.startswith("```", end)
            strength = line_cut(text, match.start(), end, fenced or fence)
            fenced ^= fence
            end = match.start()
        elif fenced:
            continue
        elif kind == "dash":
            strength = 0 if _between_digits(text, match.start(), end) else CLAUSE
        else:
            strength = _strength(text, match, last)
        if strength:
            last = settle(text, end)
            yield last, strength


def _strength(text: str, match: regex.Match[str], last: int) -> int:
    """Judge a run of marks, or an emoji, with the cut before it at ``last``."""
    start, end = match.span()
    after = skip_spaces(text, end)
    if after == len(text):
        return 0
    if match.lastgroup == "smile":
        return SENTENCE if _opens_sentence(text, after) else 0
    if text[after] in _NOT_NEXT:
        return 0
    mark = end
    if text[end - 1] not in _ALL_MARKS:
        # What follows the last mark is closers and the tail (footnotes, emoji).
        found = _LAST_MARK.search(text, start, end)
        if not found:
            return 0
        mark = found.end()
    core = text[start:mark]
    if core[-1] in _CLAUSE_MARKS or core[-1] in _HARD_CLAUSE:
        return CLAUSE if _divides(text, mark, after) else 0
    return SENTENCE if _ends(text, start, core, end, after, last) else 0


def _ends(text: str, start: int, core: str, end: int, after: int, last: int) -> bool:
    """Whether a run of marks ends a sentence; ``after`` is where the text goes on."""
    mark = start + len(core)
    closed = end > mark
    if not _HARD_SET.isdisjoint(core[-3:]):
        return not (closed and _SPEAKER.match(text, after))
    first = _first_letter(text, after)
    marks = core.lstrip(_CLOSERS)
    if marks[-1] in _DOTS and _DOT_SET.issuperset(marks[-3:]):
        if marks == "." or marks == "．":
            if not _full_stop(text, mark - 1, first, after, last):
                return False
        elif not _ends_ellipsis(text, first, after, end):
            return False
    elif first.islower():
        if closed or text[max(0, mark - 12) : mark].rstrip("!").rpartition(" ")[2].lower() in NAMES_WITH_MARK:
            return False
    elif closed and _SPEAKER.match(text, after):
        return False
    return closed or not _in_brackets(text, start, end, last)


def _ends_ellipsis(text: str, first: str, after: int, end: int) -> bool:
    """'He waited... Nobody came.' but 'Well... I think so.' and '我……我不知道。'"""
    return (
        after > end
        and first.isupper()
        and _word(text, after) not in ("I", "I'm", "I’m", "I'd", "I'll", "I've")
    )


def _full_stop(text: str, dot: int, first: str, after: int, last: int) -> bool:
    """Whether the single full stop at ``dot`` ends a sentence and is no part of an abbreviation."""
    found = _WORD_BEFORE.match(text, 0, dot)
    word = found.group() if found else ""
    if not word:
        if text[max(0, dot - 2) : dot] == ". ":
            return _ends_ellipsis(text, first, after, dot + 1)
        return not first.islower()
    kind = _kind(word)
    if kind == _NEVER:
        return False
    begin = dot - len(word)
    lead = text[max(last, begin - 12) : begin].strip()
    if kind & _NUMBER and (not lead or text[begin - 2 : begin] == ": " or text[begin - 1] in LINE_ENDS):
        return False
    if kind & _REFERENCE:
        number = first.isdigit() or text[after] in "(#"
        return not number and (word.lower() == "no" or _opens_sentence(text, after))
    if kind & _CAPITAL:
        return first.isupper()
    if kind & _STARTER:
        if _opens_sentence(text, after):
            return True
        # One small letter alone is rather a variable than an initial ("z. B." is not).
        return len(word) == 1 and word.islower() and first.isupper() and len(_word(text, after)) > 1
    if first.islower():
        return word.isalpha() and word.islower() and (len(word) > 3 or word in SHORT_LAST)
    return not (lead.lower() in HEADINGS and _ROMAN_OR_NUMBER.fullmatch(word))


_NEVER, _NUMBER, _REFERENCE, _CAPITAL, _STARTER = 1, 2, 4, 8, 16


@lru_cache(maxsize=4096)
def _kind(word: str) -> int:
    """What a full stop after ``word`` may be: flags, for a word may be an initial and number a list."""
    low = word.lower()
    if low in NEVER_LAST:
        return _NEVER
    kind = _NUMBER if _NUMBERING.fullmatch(word) else 0
    if low in BEFORE_NUMBER:
        return kind | _REFERENCE
    if low in BEFORE_CAPITAL:
        return kind | _CAPITAL
    return kind | (_STARTER if low in DATES or low in MAY_END or _LETTERS.fullmatch(word) else 0)


def _divides(text: str, mark: int, after: int) -> bool:
    """Whether the clause mark before ``mark`` stands between clauses."""
    digits = text[mark - 2 : mark - 1].isdigit() and text[after].isdigit()
    return not digits and _word(text, after) not in AFTER_COMMA


def _between_digits(text: str, start: int, end: int) -> bool:
    return (
        text[max(0, start - 2) : start].strip()[-1:].isdigit() and text[end : end + 2].strip()[:1].isdigit()
    )


def _in_brackets(text: str, start: int, end: int, last: int) -> bool:
    """Whether the mark is inside brackets that opened within the sentence and close on the same line."""
    low = max(last, start - _AROUND)
    opened = text.rfind("(", low, start)
    if opened < 0 or text.find(")", opened, end) >= 0 or not text[max(last, opened - 8) : opened].strip():
        return False
    closed = text.find(")", end, end + _AROUND)
    return closed >= 0 and text.find("\n", end, closed) < 0


def _first_letter(text: str, after: int) -> str:
    """The first character of what follows that is no opening quote or bracket."""
    for place in range(after, min(after + 3, len(text))):
        if text[place] not in _OPENERS:
            return text[place]
    return text[after]


def _word(text: str, after: int) -> str:
    """The word that follows, without an opening quote or bracket before it."""
    while after < len(text) - 1 and text[after] in _OPENERS:
        after += 1
    found = _WORD.match(text, after)
    return found.group() if found else ""


def _opens_sentence(text: str, after: int) -> bool:
    word = _word(text, after)
    # "J. A. Smith": an initial, not the article.
    return word in STARTERS and not (len(word) == 1 and text.startswith(".", text.find(word, after) + 1))
