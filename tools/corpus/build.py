"""Builds a text corpus from the Debian packages that a manifest names by version and SHA-256.

    python tools/corpus/build.py tools/corpus/english.yaml out/english

``apt-get download`` gets each package into the cache, from the archives that apt knows; root is not needed. On another
system, ``--mirror URL`` gets them from a Debian mirror. Nothing is installed or unpacked to disk. The result is
``documents.jsonl``, with one text and its origin a line, and the copyright file of each package.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO

import yaml
from prose import LARGEST_TEXT, READERS, prose, sword_texts

from sentcompress.errors import DataError, SentCompressError

LEAST_CHARACTERS = 1000
"""Documents with less prose are left out."""
UNPACKERS = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
SWORD = (".bzz", ".czz")
"""Files that hold several documents, see :func:`prose.sword_texts`."""
LEFT_OUT = re.compile(
    r"(^|/)(_modules|_sources|search)/|(^|/)(changelog|changes|copying|fdl|genindex|gfdl|gpl|licen[cs]e|py-modindex)",
    re.IGNORECASE,
)
"""Licences, lists of changes, indexes, sources of programs, and what a page was made from."""
SENTENCE_END = re.compile(r"[.!?][\"'’”)\]]*(?:\s|$)")
SNAPSHOT = "https://snapshot.debian.org/package/"
"""Where Debian keeps all versions of its packages."""


@dataclass(frozen=True)
class Package:
    """An entry of the manifest."""

    name: str
    version: str
    sha256: str
    licence: str
    path: str
    """Below the address of a mirror."""
    files: str = "*"
    """A pattern of the files that are read."""

    def file(self, cache: Path) -> Path:
        return cache / PurePosixPath(self.path).name


def read_manifest(path: Path) -> tuple[list[Package], str | None]:
    """The packages, and the SHA-256 of what they should become, if the manifest has one."""
    try:
        manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
        return [Package(**entry) for entry in manifest["packages"]], manifest.get("sha256")
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not a manifest: {error}", fix="see tools/corpus/english.yaml") from None


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(packages: list[Package], cache: Path, mirror: str | None) -> list[Path]:
    """The files of the packages, from the cache or downloaded.

    Raises:
        DataError: one cannot be had, or is not the one that the manifest names.
    """
    cache.mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if not package.file(cache).exists()]
    if mirror:
        for package in missing:
            _download(f"{mirror.rstrip('/')}/{package.path}", package.file(cache))
    elif missing:
        _apt_download(missing, cache)
    for package in packages:
        file = package.file(cache)
        if not file.exists() or sha256_of(file) != package.sha256:
            raise DataError(
                f"{file}: {'SHA-256 differs from the manifest' if file.exists() else 'could not be downloaded'}",
                fix=f"get version {package.version} of {package.name} from {SNAPSHOT}{package.name}/ and save it there",
            )
    return [package.file(cache) for package in packages]


def _apt_download(packages: list[Package], cache: Path) -> None:
    """Let apt download what it can; it names a file by its own rule, with the colon of a version as %3a."""
    wanted = [f"{package.name}={package.version}" for package in packages]
    try:
        done = subprocess.run(["apt-get", "download", "-qq", *wanted], cwd=cache, check=False)
    except FileNotFoundError:
        raise DataError("this system has no apt-get", fix="name a Debian mirror: --mirror URL") from None
    for package in packages:
        version, file = package.version.replace(":", "%3a"), package.file(cache)
        got = file.with_name(f"{package.name}_{version}_{file.name.split('_')[-1]}")
        if got.exists():
            got.replace(file)
    if done.returncode:
        raise DataError(
            "apt-get download failed, see above",
            fix="run apt-get update; if apt does not know the versions of Debian 12, name a mirror: --mirror URL",
        )


def _download(address: str, file: Path) -> None:
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            part = file.with_suffix(".part")
            part.write_bytes(answer.read())
            part.replace(file)
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        raise DataError(f"{address}: {error}", fix="name another mirror with --mirror") from None


def files_of(deb: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a package's ordinary files. They are read in memory: no name leads to a file on disk."""
    try:
        with deb.open("rb") as file, tarfile.open(fileobj=_data_of(file), mode="r:*") as archive:
            for member in archive:
                if member.isreg() and member.size <= LARGEST_TEXT:
                    yield member.name.removeprefix("./"), archive.extractfile(member).read()  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError, ValueError, lzma.LZMAError) as error:
        raise DataError(f"{deb}: damaged, or not a Debian package: {error}", fix="delete it") from None


def _data_of(deb: IO[bytes]) -> IO[bytes]:
    """The archive of a package's files: the member ``data.tar.*`` of an ``ar`` archive."""
    if deb.read(8) != b"!<arch>\n":
        raise ValueError("no ar archive")
    while header := deb.read(60):
        name, size = header[:16], int(header[48:58])
        if name.startswith(b"data.tar"):
            return io.BytesIO(deb.read(size))
        deb.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError("no data.tar in it")


Documents = list[tuple[str, list[str]]]


def documents_of(deb: Path, package: Package) -> tuple[Documents, bytes | None]:
    """The paragraphs of each file that has prose, sorted by name, and the copyright file of the package."""
    documents, copyright_file = [], None
    for name, content in files_of(deb):
        if name == f"usr/share/doc/{package.name}/copyright":
            copyright_file = content
            continue
        path = PurePosixPath(name)
        unpack = UNPACKERS.get(path.suffix)
        reader = READERS.get((path.with_suffix("") if unpack else path).suffix.lower())
        if reader is None or LEFT_OUT.search(name) or not fnmatchcase(name, package.files):
            continue
        texts = sword_texts(content) if path.suffix in SWORD else [unpack(content) if unpack else content]
        for number, text in enumerate(texts, start=1):
            if paragraphs := prose(reader(_decoded(text))):
                documents.append((f"{name}#{number}" if path.suffix in SWORD else name, paragraphs))
    return sorted(documents), copyright_file


def _decoded(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("latin-1")


class Unseen:
    """Keeps of each paragraph the first copy. Copies may differ in case, digits, marks and white space."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def __call__(self, paragraphs: list[str]) -> list[str]:
        return [paragraph for paragraph in paragraphs if self._is_new(paragraph)]

    def _is_new(self, paragraph: str) -> bool:
        letters = re.sub(r"[\W\d_]+", "", paragraph).lower()
        key = hashlib.blake2b(letters.encode("utf-8", "replace"), digest_size=8).digest()
        if key in self._seen:
            return False
        self._seen.add(key)
        return True


def build(manifest: Path, out: Path, cache: Path, mirror: str | None) -> None:
    """Write the corpus and print what each package brings.

    Raises:
        DataError: a package is missing or another one, or the corpus is not the one that the manifest names.
    """
    packages, expected = read_manifest(manifest)
    debs = fetch(packages, cache, mirror)
    (out / "copyright").mkdir(parents=True, exist_ok=True)
    part, result = out / "documents.part", out / "documents.jsonl"
    unseen, total = Unseen(), Counter()
    print(f"{'package':<32} {'documents':>9} {'MB':>8} {'sentences':>10}  licence")
    with part.open("w", encoding="utf-8") as file, ProcessPoolExecutor() as pool:
        results = pool.map(documents_of, debs, packages)
        for package, (documents, copyright_file) in zip(packages, results, strict=True):
            if copyright_file is not None:
                (out / "copyright" / package.name).write_bytes(copyright_file)
            counts = Counter(documents=0, bytes=0, sentences=0)
            for name, paragraphs in documents:
                text = "\n\n".join(unseen(paragraphs))
                if len(text) < LEAST_CHARACTERS:
                    continue
                line = {"text": text, "package": package.name, "file": name, "licence": package.licence}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                counts.update(
                    documents=1, bytes=len(text.encode()), sentences=len(SENTENCE_END.findall(text))
                )
            print(_row(package.name, counts, package.licence), flush=True)
            total += counts
    part.replace(result)
    digest = sha256_of(result)
    print(_row("all", total, ""), f"{result}: SHA-256 {digest}", sep="\n")
    if expected not in (None, digest):
        raise DataError(
            f"{result}: the manifest says SHA-256 {expected}",
            fix="install lxml as pinned in constraints.txt, and build again",
        )


def _row(name: str, counts: Counter[str], licence: str) -> str:
    size = f"{counts['bytes'] / 1e6:.2f}"
    return f"{name:<32} {counts['documents']:>9} {size:>8} {counts['sentences']:>10}  {licence}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", type=Path)
    parser.add_argument("out", type=Path)
    home = os.environ.get("SENTCOMPRESS_CACHE", "~/.cache/sentcompress")
    default = Path(home).expanduser() / "packages"
    parser.add_argument("--cache", type=Path, default=default, help=f"where packages are kept ({default})")
    parser.add_argument("--mirror", metavar="URL", help="a Debian mirror, for systems without apt-get")
    arguments = parser.parse_args()
    try:
        build(arguments.manifest, arguments.out, arguments.cache, arguments.mirror)
    except SentCompressError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
