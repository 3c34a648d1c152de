"""Whether a line end cuts: always, but inside a wrapped paragraph."""

from __future__ import annotations

import regex

from sentcompress.segmenters._cuts import ANY_LINE_END, BLANK, LAST_LINE_END, LINE, LINE_ENDS

_NARROW, _WIDE = 16, 50
"""A wrapped line is at least this long: where the next goes on in lower case, and where it does not."""
_FAR = 200

_ITEM = regex.compile(r"(?:[-*+•‣▪◦·–—>|]|\d{1,2}[.)]|\(?\p{L}\)|#{1,6})[ \t]")
_UNDERLINE = regex.compile(rf"([=~*^_-])\1{{2,}}+[ \t]*+(?:[{LINE_ENDS}]|\Z)")
_CODE = regex.compile(r"\w\(|\w\[\w|[=<>!]=|[-=]>|\s=\s|::|\+\+|</|[;{}]\s*$|^\s*(?:[$@]|//|>>>|#)")


def line_cut(text: str, start: int, end: int, fenced: bool) -> int:
    """Strength of the cut at the line end(s) in ``text[start:end]``, which is white space; 0 for none."""
    if end == len(text):
        return 0
    indent = end
    if end > start + 1:
        first = ANY_LINE_END.match(text, start)
        indent = first.end() if first else end
        if ANY_LINE_END.search(text, indent, end):
            return BLANK
    if fenced:
        return LINE
    before = LAST_LINE_END.search(text, max(0, start - _FAR), start)
    length = start - before.end() if before else min(start, _FAR)
    if length and text[end] in "=~*^_-" and _UNDERLINE.match(text, end):
        return 0
    if length < _NARROW or _ITEM.match(text, end):
        return LINE
    line = text[start - length : start].rstrip()
    return 0 if _goes_on(line, text[end : end + _FAR], indented=end - indent > 1) else LINE


def _goes_on(before: str, after: str, indented: bool) -> bool:
    """Whether ``after`` continues the prose line ``before``."""
    if not before or before[-1] in ":;{}=\\>" or (indented and not _ITEM.match(before.lstrip())):
        return False
    found = ANY_LINE_END.search(after)
    if _CODE.search(before) or _CODE.search(after[: found.start()] if found else after):
        return False
    if after[0].islower():
        return True
    return len(before) >= _WIDE and (before[-1].isalnum() or before[-1] in ",-–—") and before[-1] < "\u2e80"
