"""Where sentences and clauses end: one pass over candidate marks, each judged by a bounded look around it.

Everything here is linear in the length of the text: quantifiers are possessive, look-arounds have a limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import regex

from sentcompress.segmenters._cuts import (
    ANY_LINE_END,
    CLAUSE,
    LINE_ENDS,
    SENTENCE,
    SPACE,
    WIDE,
    marks_of_all_scripts,
    settle,
    skip_spaces,
)
from sentcompress.segmenters._lines import line_cut
from sentcompress.segmenters._words import (
    AFTER_COMMA,
    BEFORE_CAPITAL,
    BEFORE_NUMBER,
    DATES,
    ENGLISH_TOO,
    HEADINGS,
    LEGAL,
    MAY_END,
    NAMES_WITH_MARK,
    NEVER_LAST,
    ORDINAL_AFTER,
    ORDINAL_BEFORE,
    OTHER_STARTERS,
    PARTLY,
    SHORT_LAST,
    STARTERS,
    TIME_ZONES,
    TIMES,
    WHOLE_SYLLABLES,
)

_ALL_STARTERS = STARTERS | OTHER_STARTERS
_DOTS = ".…‥．"
_MARKS = _DOTS + "!?۔‼‽⁇⁈⁉\u037e"
_CLAUSE_MARKS = ",;:،؛"
_HARD, _HARD_CLAUSE = marks_of_all_scripts(besides=_MARKS + _CLAUSE_MARKS)  # cut without a space after them
_CLOSERS = "\"'”’»›)]}」』】》〉）］〕〗〙〛｣﹂﹄༽*_~`"
_OPENERS = "\"'“‘„«‹([{「『【《〈（［*_~`¿¡"
_AROUND = 200  # how far we look for the other bracket

_E = r"(?:(?![✅❌✔✖☑➡👉📌⭐🔹🔸🔴🟢🚩])\p{Emoji_Presentation}|[\ufe0f\u200d♀♂❤\U0001f3fb-\U0001f3ff])"
# What still belongs to a sentence after its marks: a German or French closing quote, footnotes, emoji.
_TAIL = (
    rf"(?:[“«‹](?=[{SPACE}]|\Z)|[ \u00a0\u202f]»)?+"
    r"(?:\[(?:\d{1,3}|[a-z]|note\x20\d{1,2}|citation\x20needed)\]|[¹²³⁰⁴-⁹]){0,4}+"
    rf"(?:(?:\x20?+{_E}++)++(?!\x20*+\p{{Ll}}))?+"
)
_DASH = r"(?<=[\w”\"'’)])(?:—{1,2}+|--)(?=[\w“\"'‘(])|(?<=\S\x20)(?:[—–]|-{1,3}+)(?=\x20)"


# Nearly all characters are passed over by this; sets of hundreds of marks are slow.
_NO_LETTER = (
    r"(?=[^a-zA-Z\x200-9à-öø-ÿά-ώа-яё\u05d0-\u05ea\u0621-\u064a\u0904-\u0939\u3041-\u3093"
    r"\u4e00-\u9fff\uac00-\ud7a3])"
)


def _pattern(clauses: bool) -> regex.Pattern[str]:
    hard = _HARD + (_HARD_CLAUSE if clauses else "")
    soft = _MARKS + _CLOSERS + (_CLAUSE_MARKS if clauses else ";")  # a Greek ";" ends a question
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
    return regex.compile(
        _NO_LETTER + "(?:" + "|".join(parts + ([rf"(?P<dash>{_DASH})"] if clauses else [])) + ")"
    )


_SENTENCES, _CLAUSES = _pattern(clauses=False), _pattern(clauses=True)

HARD_END = regex.compile(rf"{_NO_LETTER}[{regex.escape(_HARD)}]++[{regex.escape(_HARD + _CLOSERS)}]*+")
"""A run of marks that end a sentence in every language that has them."""

_ALL_MARKS = frozenset(_MARKS + _HARD + _CLAUSE_MARKS + _HARD_CLAUSE)
_HARD_SET, _DOT_SET, _CLAUSE_SET = frozenset(_HARD), frozenset(_DOTS), frozenset(_CLAUSE_MARKS + _HARD_CLAUSE)
_NOT_NEXT = _ALL_MARKS.union("”’»›)]}」』】》〉）］〕〗〙〛｣﹂﹄༽")
_LAST_MARK = regex.compile(rf"(?r)[{regex.escape(''.join(sorted(_ALL_MARKS)))}]")
_WORD_BEFORE = regex.compile(r"(?rV1)[[\p{L}\p{M}\p{N}.]--[\p{Han}\p{Hiragana}\p{Katakana}]]{0,24}")
_LETTER, _GREEK, _GREEK_WORD = (
    regex.compile(p) for p in (r"\p{L}", r"\p{Greek}", r"\p{Greek}\p{M}*\p{Greek}")
)
_FOR_SCRIPT = 60
_WORD = regex.compile(r"\p{L}[\p{L}\p{M}'’]{0,20}+")
_LETTERS = regex.compile(r"(?:\p{L}\.)*\p{L}")
_NUMBERING = regex.compile(r"\d{1,3}(?:\.\d{1,3})*|\p{L}|[ivx]{1,5}|[IVX]{1,5}")
_SHORTENED = regex.compile(
    r"\p{L}{2,}(?:str|gt)|(?!Hmm|Shh|Pss?t|Brr|Nth)[B-DF-HJ-NP-TV-XZ][b-df-hj-np-tv-xz]{1,4}"
)
"""Street names ("Goethestr.") and words without a vowel ("Sgt."): abbreviations without being listed."""
_INDIC_INITIAL = regex.compile(r"[\p{Deva}\p{Beng}\p{Guru}]\p{M}*+")
_NUMBER_NEXT = regex.compile(r"No\.\x20?\d")
_HOUR = regex.compile(r"(?<!\d)\d{1,2}(?:[:.]\d\d)?$")
_SPACES_INSIDE = frozenset(" \u00a0\u202f")
_PARTS_BEFORE = regex.compile(r"(?r)(?<![\p{L}\p{M}\p{N}.])(?:\p{L}{1,3}\.[ \u00a0\u202f]){1,3}")
_DOUBLED = regex.compile(r"(\p{Lu})\1\.(\p{Lu})\2")  # Spanish plurals: "EE. UU."
_BEFORE_DOUBLED = regex.compile(r"(\p{Lu})\1\.")
_DOUBLED_CAPITALS = frozenset(2 * letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_CITED = regex.compile(r"\p{Lu}\.|\p{Lu}[\p{L}'’]{1,6}+\.(?=\x20\S)|[§¶\d]|(?:Code|Law|Rule|Act|Proc)s?\b")
_LABEL = (  # what a lower-case and a capitalized "art." refer to, besides numbers: "art. II", "Art. I", "App. A"
    regex.compile(r"[IVXLCDM]{2,6}+\b|[IVX][,;)]"),
    regex.compile(r"(?:[IVXLCDM]{1,6}|\p{Lu})(?!['’\p{L}\p{N}])"),
)
_ROMAN = regex.compile(r"[IVXLC]+")
_YEAR = regex.compile(r"\x20[12]\d{3}\b")
_TURKISH = regex.compile(r"[ğışİŞĞ]")
_NEAR = 24
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
            strength = _strength(text, match, last, clauses)
        if strength:
            last = settle(text, end)
            yield last, strength


def _strength(text: str, match: regex.Match[str], last: int, clauses: bool) -> int:
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
    if core[-1] in _CLAUSE_SET and not (core[-1] == ";" and _is_greek(text, start, last)):
        return CLAUSE if clauses and _divides(text, mark, after) else 0
    return SENTENCE if _ends(text, start, core, end, after, last) else 0


def _ends(text: str, start: int, core: str, end: int, after: int, last: int) -> bool:
    """Whether a run of marks ends a sentence; ``after`` is where the text goes on."""
    mark = start + len(core)
    closed = end > mark
    if not _HARD_SET.isdisjoint(core[-3:]):
        return not (closed and _SPEAKER.match(text, after))
    first = _first_letter(text, after)
    marks = core.lstrip(_CLOSERS)
    marks = marks.lstrip(";") or marks
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
    begin = dot - len(word)
    kind = _spaced_kind(text, begin, word) or _kind(word)
    if text[begin - 1 : begin] in ('"', "״") and text[begin - 2 : begin - 1].isalpha():
        kind = 0  # the last letter of a Hebrew acronym
    if kind & _NEVER:
        return False
    lead = text[max(last, begin - 12) : begin].strip()
    if kind & _NUMBER:
        if not lead or text[begin - 2 : begin] == ": " or text[begin - 1] in LINE_ENDS:
            return False
        if first.isupper() and _is_ordinal(text, begin, word, after, last):
            return False
    if word in _DOUBLED_CAPITALS and _BEFORE_DOUBLED.match(text, after):
        return False
    if kind & _PARTLY and (first.isdigit() or first.islower() or first == "§"):
        return False
    if kind & _LEGAL and _CITED.match(text, after):
        return False
    if kind & _REFERENCE:
        no = word.lower() == "no"
        label = _LABEL[word[0].isupper() and not no]
        number = first.isdigit() or text[after] in "(#§" or label.match(text, after)
        return not number and (no or _opens_sentence(text, after))
    if kind & _CAPITAL:
        return first.isupper()
    if kind & _TIME and first.isupper() and _HOUR.search(lead):
        follows = _word(text, after)
        return follows not in TIME_ZONES and (len(follows) < 2 or not follows.isupper())
    if kind & _STARTER:
        initial = len(word) == 1 and word.isupper()
        if _opens_sentence(text, after, names=initial):
            return True
        # One small letter alone is rather a variable than an initial; "z. B." and "v. Chr." are not.
        if len(word) > 1 or kind & _SPACED or not ("a" <= word <= "z" and first.isupper()):
            return False
        follows = _word(text, after)
        return (
            len(follows) > 1 and not text.startswith(follows + ".", after) and not _ROMAN.fullmatch(follows)
        )
    if first.islower():
        short = word in SHORT_LAST and not lead[-1:].isdigit()  # "7 in. tall"
        return word.isalpha() and word.islower() and (len(word) > 3 or short)
    return not (lead.lower() in HEADINGS and _ROMAN_OR_NUMBER.fullmatch(word))


_NEVER, _NUMBER, _REFERENCE, _CAPITAL, _STARTER, _PARTLY, _LEGAL, _TIME, _SPACED = (1 << n for n in range(9))
_LISTS = (
    (_NEVER, NEVER_LAST),
    (_REFERENCE, BEFORE_NUMBER),
    (_CAPITAL, BEFORE_CAPITAL),
    (_TIME | _STARTER, TIMES),
    (_STARTER, MAY_END | DATES),
)


@lru_cache(maxsize=4096)
def _kind(word: str) -> int:
    """What a full stop after ``word`` may be: flags, for a word may be an initial and number a list."""
    kind = _NUMBER if _NUMBERING.fullmatch(word) else 0
    kind |= _PARTLY if word in PARTLY else 0
    kind |= _LEGAL if word in LEGAL else 0
    for flag, words in _LISTS:
        if word in words:
            return flag if flag == _NEVER else kind | flag
    if _INDIC_INITIAL.fullmatch(word):
        return kind if word in WHOLE_SYLLABLES else _NEVER
    return kind | (_STARTER if _LETTERS.fullmatch(word) or _SHORTENED.fullmatch(word) else 0)


def _spaced_kind(text: str, begin: int, word: str) -> int:
    """The kind of an abbreviation written with spaces ("z. B.", "т. е.", "Dr. rer. nat."); 0 if it is none."""
    if text[begin - 1 : begin] not in _SPACES_INSIDE:
        return 0
    if word in ("es", "ex", "ej") and text.endswith(("ad ", "per ", "por ", "par ", "de "), 0, begin):
        return _NEVER
    found = _PARTS_BEFORE.match(text, 0, begin) if text[begin - 2 : begin - 1] == "." else None
    parts = regex.sub(r"\s", "", found.group()) if found else ""
    while parts:
        whole = parts + word
        if _DOUBLED.fullmatch(whole):
            return _STARTER
        for flag, words in _LISTS:
            if whole in words:
                return flag | _SPACED
        if whole.islower() and _LETTERS.fullmatch(whole):
            return _STARTER | _SPACED
        parts = parts.partition(".")[2]
    return 0


def _is_ordinal(text: str, begin: int, word: str, after: int, last: int) -> bool:
    """Whether the full stop after a number makes it an ordinal, as in German: "am 3. Oktober"."""
    follows = _word(text, after)
    if word.isdigit():
        dated = follows in ENGLISH_TOO and _YEAR.match(text, after + len(follows))
        if dated or follows in ORDINAL_AFTER:
            return True
    if (
        word.islower()
        or (word.isalpha() and not _ROMAN_OR_NUMBER.fullmatch(word))
        or follows in _ALL_STARTERS
    ):
        return False
    before = text[max(last, begin - 16) : begin].split()
    if before and before[-1].lower() in ORDINAL_BEFORE:
        return before[-2:-1] != ["I"]  # "I am 12."
    return bool(_TURKISH.search(text, max(last, begin - _NEAR), after + _NEAR))


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
    return closed >= 0 and not ANY_LINE_END.search(text, end, closed)


def _is_greek(text: str, start: int, last: int) -> bool:
    """Whether the sentence before ``start`` is Greek, where ``;`` is the question mark."""
    before = text[max(last, start - _FOR_SCRIPT) : start]
    return 2 * len(_GREEK.findall(before)) > len(_LETTER.findall(before)) and bool(_GREEK_WORD.search(before))


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


def _opens_sentence(text: str, after: int, names: bool = False) -> bool:
    """Whether the next word is one that opens sentences; ``names``: and no part of a name, in any language."""
    word = _word(text, after)
    # "J. A. Smith" has an initial, "Pub. L. No. 5" a number.
    if word not in (STARTERS if names else _ALL_STARTERS):
        return False
    if len(word) == 1:
        return not text.startswith(".", text.find(word, after) + 1)
    return not (word == "No" and _NUMBER_NEXT.match(text, after))
