"""The prose of a file: paragraphs of HTML, DocBook, Mallard, OSIS, POD and plain text that are English sentences."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache

from lxml import etree

_DROPPED = (
    "aside button figure footer form head header informaltable math menu nav note pre programlisting screen script "
    "select style svg synopsis textarea"
)
"""Elements that are left out with all they contain."""
_INLINE = (
    "a abbr acronym b big br cite code command divineName em emphasis filename font hi i kbd literal option q quote "
    "reference samp seg small span strong sub sup transChange tt u ulink var w xref"
)
"""Elements inside a sentence."""
_PARAGRAPHS = frozenset(
    ("article", "blockquote", "body", "dd", "div", "li", "main", "osis", "p", "para", "section", "simpara")
)
"""Elements whose own text is a paragraph; all others that are not inside a sentence end one, and have none."""
_NAVIGATION = re.compile(
    r"breadcrumbs?|contents|footer|headerlink|highlight.*|index|menu|nav(bar|footer|header|igation|path|row)?"
    r"|related|sidebar|sphinxsidebar|toc(tree-wrapper)?|wy-(nav-side|side-nav-search)"
)
"""Classes, ids and roles of what is around a text."""
LARGEST_TEXT = 1 << 25
"""Bytes: larger files are left out."""


def html_paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of HTML, however broken."""
    return _paragraphs(text, etree.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True))


def xml_paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of DocBook and Mallard; external entities are not read."""
    text = re.sub(r'^\s*<\?xml[^>]*\?>|\sxmlns="[^"]*"', "", text)
    options = {"remove_comments": True, "remove_pis": True, "resolve_entities": False, "no_network": True}
    return _paragraphs(text, etree.XMLParser(recover=True, **options))


def osis_paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of a part of a SWORD module, see :func:`sword_texts`."""
    return xml_paragraphs(f"<osis>{text}</osis>")


def sword_texts(content: bytes) -> Iterator[bytes]:
    """The parts of a SWORD module, such as the books of a Bible: zlib streams with zeros between them."""
    while content := content.lstrip(b"\0"):
        stream = zlib.decompressobj()
        yield stream.decompress(content, LARGEST_TEXT)
        content = stream.unused_data


def _paragraphs(text: str, parser: etree.HTMLParser | etree.XMLParser) -> Iterator[str]:
    tree = etree.fromstring(text.encode(), parser)
    if tree is None:
        return
    for element in tree.xpath("//*[@class or @id or @role][not(self::body)]"):
        if any(_is_navigation(element.get(key, "")) for key in ("class", "id", "role")):
            element.tag = "nav"
    for element in tree.iter("br"):
        element.tail = f" {element.tail or ''}"
    etree.strip_elements(tree, *_DROPPED.split(), with_tail=False)
    etree.strip_tags(tree, *_INLINE.split())
    owners: list[str] = []
    for event, element in etree.iterwalk(tree, events=("start", "end")):
        if event == "start":
            owners.append(element.tag)
            piece = element.text
        else:
            owners.pop()
            piece = element.tail
        if piece and owners and owners[-1] in _PARAGRAPHS:
            yield " ".join(piece.split())


@cache
def _is_navigation(marks: str) -> bool:
    return any(_NAVIGATION.fullmatch(mark) for mark in marks.lower().split())


def text_paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of plain text, Markdown and POD: without indented and fenced blocks, lines joined."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for block in re.split(r"\n[^\S\n]*\n", text):
        if not block.strip("\n").startswith(("    ", "\t", "=")):
            yield " ".join(block.split())


_POD_MARK = re.compile(r"L<([^<>|]*)\|[^<>]*>|[A-Z]<+\s*([^<>]*?)\s*>+")


def pod_paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of Perl's documentation, without its marks such as ``C<...>``."""
    for paragraph in text_paragraphs(re.sub(r"^ ", "    ", text, flags=re.MULTILINE)):
        paragraph = re.sub(r"[XZ]<[^<>]*>", "", paragraph)
        while (plain := _POD_MARK.sub(r"\1\2", paragraph)) != paragraph:
            paragraph = plain
        yield paragraph


READERS: dict[str, Callable[[str], Iterator[str]]] = {
    ".html": html_paragraphs,
    ".htm": html_paragraphs,
    ".xhtml": html_paragraphs,
    ".docbook": xml_paragraphs,
    ".page": xml_paragraphs,
    ".xml": xml_paragraphs,
    ".md": text_paragraphs,
    ".txt": text_paragraphs,
    ".pod": pod_paragraphs,
    ".bzz": osis_paragraphs,
    ".czz": osis_paragraphs,
}

_FUNCTION_WORDS = (
    "a about after all also an and any are as at be because been but by can could do does for from had has "
    "have he her his how if in into is it its may more most must no not of on one only or other our out she "
    "should so some such than that the their them then there these they this to up use used was we were what "
    "when where which who will with would you your"
)
_COMMON = frozenset(_FUNCTION_WORDS.split())
_WORD = re.compile(r"[A-Za-z]+(?:['’][a-z]+)?")
_ENDS = re.compile(r"[.!?:][\"'’”)\]]*$")


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is English sentences: not a heading, a list of names, code or another language."""
    words = _WORD.findall(paragraph)
    if len(words) < 8 or not _ENDS.search(paragraph):
        return False
    letters = sum(map(len, words)) + paragraph.count(" ")
    common = sum(word.lower() in _COMMON for word in words)
    return letters >= 0.8 * len(paragraph) and common >= 0.2 * len(words)


def prose(paragraphs: Iterable[str]) -> list[str]:
    """The paragraphs that are prose, in order."""
    return [paragraph for paragraph in paragraphs if is_prose(paragraph)]
