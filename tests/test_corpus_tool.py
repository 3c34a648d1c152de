"""tools/corpus: packages that differ are refused, archives stay in memory, and the prose of a file is what is kept."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
import yaml

from sentcompress.registry import get_registry

TOOL = Path(__file__).resolve().parents[1] / "tools" / "corpus"
SENTENCE = "The {} of the house was open, and it was not long before she went in to see who had been there."
LONG = [
    SENTENCE.format(word)
    for word in (
        "door",
        "gate",
        "window",
        "cellar",
        "roof",
        "kitchen",
        "stable",
        "hall",
        "garden",
        "attic",
        "chimney",
    )
]


def page(paragraphs: list[str], around: str = "") -> bytes:
    return f"<html><body>{around}{''.join(f'<p>{p}</p>' for p in paragraphs)}</body></html>".encode()


def write_deb(path: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> None:
    """A package as dpkg-deb writes it, but with any names in it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data.getvalue()}
    with path.open("wb") as deb:
        deb.write(b"!<arch>\n")
        for name, content in members.items():
            deb.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode())
            deb.write(content + b"\n" * (len(content) % 2))


class Workplace:
    """A mirror of one's own, and the tool run on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.entries = folder, []
        (folder / "mirror" / "pool").mkdir(parents=True)

    def package(self, name: str, files: dict[str, bytes], **options: dict[str, str]) -> Path:
        deb = self.folder / "mirror" / "pool" / f"{name}_1_all.deb"
        write_deb(deb, files, **options)
        digest = hashlib.sha256(deb.read_bytes()).hexdigest()
        path = f"pool/{deb.name}"
        self.entries.append({"name": name, "version": "1", "sha256": digest, "licence": "MIT", "path": path})
        return deb

    def build(self, out: str = "out", **more: str) -> subprocess.CompletedProcess[str]:
        manifest = self.folder / "manifest.yaml"
        manifest.write_text(yaml.safe_dump({"packages": self.entries, **more}))
        command = [sys.executable, str(TOOL / "build.py"), str(manifest), str(self.folder / out)]
        command += ["--cache", str(self.folder / "cache"), "--mirror", (self.folder / "mirror").as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def documents(self, out: str = "out") -> list[dict[str, str]]:
        lines = (self.folder / out / "documents.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def test_a_package_becomes_documents_that_the_dataset_reads(workplace: Workplace):
    files = {
        "./usr/share/doc/tales/b.html.gz": gzip.compress(page(LONG)),
        "./usr/share/doc/tales/a.txt": "\n\n".join(line.replace("house", "mill") for line in LONG).encode(),
        "./usr/share/doc/tales/copyright": b"MIT",
        "./usr/share/doc/tales/changelog.txt": "\n\n".join(
            line.replace("house", "barn") for line in LONG
        ).encode(),
        "./usr/share/doc/tales/short.html": page(
            ["There was a house at the end of the road, and it was empty."]
        ),
    }
    workplace.package("tales", files)
    done = workplace.build()
    assert done.returncode == 0, done.stderr
    first, second = workplace.documents()
    assert first["file"].endswith("a.txt")
    assert second == {
        "text": "\n\n".join(LONG),
        "package": "tales",
        "file": "usr/share/doc/tales/b.html.gz",
        "licence": "MIT",
    }
    assert (workplace.folder / "out" / "copyright" / "tales").read_bytes() == b"MIT"
    options = {"paths": [str(workplace.folder / "out")], "heldout_documents": 1}
    dataset = get_registry().create("dataset", "jsonl", options)
    assert [document.text for document in dataset.documents()] == [first["text"], second["text"]]


def test_a_sword_module_has_a_document_for_each_part(workplace: Workplace):
    books = ["", ""]
    for place, noun in enumerate(("mill", "barn")):
        for line in LONG:
            words = line.replace("house", noun).replace("The ", '<w lemma="x">The</w> ', 1)
            books[place] += f'<div sID="1" type="x-p"/>{words}<note>{LONG[0]}</note><div eID="1" type="x-p"/>'
    module = b"\0\0\0".join(zlib.compress(book.encode()) for book in books)
    workplace.package("bible", {"./ot.bzz": module, "./read-me.html": page(LONG)})
    workplace.entries[0]["files"] = "*.bzz"
    done = workplace.build()
    assert done.returncode == 0, done.stderr
    assert [document["file"] for document in workplace.documents()] == ["ot.bzz#1", "ot.bzz#2"]
    assert workplace.documents()[0]["text"] == "\n\n".join(line.replace("house", "mill") for line in LONG)


def test_a_package_that_differs_is_refused(workplace: Workplace):
    workplace.package("tales", {"a.html": page(LONG)})
    workplace.entries[0]["sha256"] = "0" * 64
    done = workplace.build()
    assert done.returncode == 1
    assert "SHA-256 differs" in done.stderr
    assert "snapshot.debian.org/package/tales/" in done.stderr
    assert not (workplace.folder / "out").exists()


def test_what_is_no_package_is_refused(workplace: Workplace):
    deb = workplace.package("tales", {"a.html": page(LONG)})
    deb.write_bytes(b"<html>Not found</html>")
    workplace.entries[0]["sha256"] = hashlib.sha256(deb.read_bytes()).hexdigest()
    done = workplace.build()
    assert done.returncode == 1
    assert "not a Debian package" in done.stderr


def test_names_in_an_archive_lead_nowhere(workplace: Workplace):
    secret = workplace.folder / "secret.html"
    secret.write_bytes(page([line.replace("house", "bank") for line in LONG]))
    outside = {
        "../../escaped.html": page(LONG),
        "/escaped.html": page([line.replace("house", "inn") for line in LONG]),
    }
    workplace.package("tales", outside, links={"link.html": str(secret)})
    before = sorted(path for path in workplace.folder.rglob("*escaped*"))
    done = workplace.build()
    assert done.returncode == 0, done.stderr
    assert sorted(path for path in workplace.folder.rglob("*escaped*")) == before
    texts = [document["text"] for document in workplace.documents()]
    assert len(texts) == 2
    assert not any("bank" in text for text in texts)


def test_a_paragraph_is_kept_once(workplace: Workplace):
    workplace.package("tales", {"a.html": page(LONG), "copy.html": page(LONG)})
    marked = [line.replace("door", "<b>Door</b>") for line in LONG]
    new = [line.replace("house", "mill") for line in LONG]
    workplace.package("tales-2", {"a.html": page(marked + new)})
    assert workplace.build().returncode == 0
    assert [document["text"].count("house") for document in workplace.documents()] == [len(LONG), 0]


def test_two_builds_are_the_same_and_another_result_is_reported(workplace: Workplace):
    for name in ("tales", "poems"):
        files = {
            f"{letter}.html": page([f"{line} {name}." for line in LONG[place:]])
            for place, letter in enumerate("ba")
        }
        workplace.package(name, files)
    assert workplace.build("one").returncode == workplace.build("two").returncode == 0
    one, two = ((workplace.folder / out / "documents.jsonl").read_bytes() for out in ("one", "two"))
    assert one == two
    assert workplace.build("one", sha256=hashlib.sha256(one).hexdigest()).returncode == 0
    done = workplace.build("one", sha256="0" * 64)
    assert done.returncode == 1
    assert "constraints.txt" in done.stderr


@pytest.fixture(scope="module")
def prose_module():
    sys.path.insert(0, str(TOOL))
    try:
        import prose

        yield prose
    finally:
        sys.path.remove(str(TOOL))


def test_html_keeps_paragraphs_and_drops_what_is_around_them(prose_module):
    html = f"""<html><head><title>{LONG[0]}</title><script>{LONG[1]}</script></head><body class="nav">
        <div class="sphinxsidebar"><p>{LONG[2]}</p></div><nav><p>{LONG[3]}</p></nav><h1>{LONG[4]}</h1>
        <p>It was a <code>cold</code> and <a href="x">very&nbsp;quiet</a> night, and<br>no one was in the street.
        <pre>if (x) {{ return the_value_of_it; }}</pre>
        <ul><li>{LONG[5]}<ul><li>{LONG[6]}</li></ul></ul>
        <table><tr><td>{LONG[7]}</td><td><p>{LONG[8]}</p></td></tr></table></body></html>"""
    assert prose_module.prose(prose_module.html_paragraphs(html)) == [
        "It was a cold and very quiet night, and no one was in the street.",
        LONG[5],
        LONG[6],
        LONG[8],
    ]


def test_the_other_formats(prose_module):
    docbook = f"""<?xml version="1.0" encoding="UTF-8"?><!DOCTYPE book [<!ENTITY x SYSTEM "file:///etc/passwd">]>
        <book xmlns="http://docbook.org/ns/docbook"><title>{LONG[0]}</title><para>{LONG[1]} &x;</para>
        <programlisting>{LONG[2]}</programlisting></book>"""
    assert prose_module.prose(prose_module.xml_paragraphs(docbook)) == [LONG[1]]
    text = f"A title\n\n{LONG[0].replace(' and', chr(10) + 'and')}\n\n    {LONG[1]}\n\n```\n{LONG[2]}\n```\n"
    assert prose_module.prose(prose_module.text_paragraphs(text)) == [LONG[0]]
    marked = LONG[0].replace("door", "C<< B<door> >>X<index>")
    pod = f"=head1 NAME\n\n{marked} See L<the end|perlop/end>.\n\n  {LONG[1]}\n"
    assert prose_module.prose(prose_module.pod_paragraphs(pod)) == [f"{LONG[0]} See the end."]


@pytest.mark.parametrize(
    "paragraph",
    [
        "Installation and configuration of the program on a new machine",
        "See also: alpha, beta, gamma, delta, epsilon, zeta, eta, theta, iota.",
        "int main(int argc, char **argv) { return run(argv[1], &the_options, 0x1f); } // the end of it.",
        "Das Haus stand offen, und es dauerte nicht lange, bis sie hineinging und nachsah, wer dort war.",
        "It was so.",
    ],
)
def test_what_is_no_prose(prose_module, paragraph: str):
    assert not prose_module.is_prose(paragraph)
    assert prose_module.is_prose(LONG[0])


def test_the_manifest_of_the_english_corpus_is_complete():
    manifest = yaml.safe_load((TOOL / "english.yaml").read_text(encoding="utf-8"))
    names = [entry["name"] for entry in manifest["packages"]]
    assert names == sorted(set(names))
    assert len(manifest["sha256"]) == 64
    for entry in manifest["packages"]:
        assert set(entry) - {"files"} == {"name", "version", "sha256", "licence", "path"}
        assert len(entry["sha256"]) == 64
        assert entry["path"].startswith("pool/main/"), "only what Debian holds to be free"
