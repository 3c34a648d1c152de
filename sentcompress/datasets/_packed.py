"""Reads plain and compressed files a piece at a time. The first bytes show the compression; names may be wrong."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sentcompress.errors import DataError

CHUNK = 1 << 20
_ZSTD_CHUNK = 1 << 12  # a frame of nothing but repetition grows 30,000 times
_START = 512
"""Bytes that tell what a file is; a tar archive says so at byte 257."""

PACKINGS = {
    ".gz": "gzip",
    ".bz2": "bzip2",
    ".xz": "xz",
    ".lzma": "lzma",
    ".zst": "zstd",
    ".lz4": "lz4",
    ".zip": "zip",
}
_PACKED = (
    (b"\x1f\x8b\x08", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"]\0\0", "lzma"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"PK\x03\x04", "zip"),
)
_STREAMS: dict[str, Any] = {
    "gzip": gzip.open,
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "lzma": lzma.LZMAFile,
}
_NEVER_TEXT = (
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\xff\xff\xff\xff", "an Arrow file"),
    (b"%PDF-", "a PDF file"),
    (b"{\\rtf", "an RTF file"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a file of Microsoft Office"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\x1f\x9d", "a file packed by compress (.Z)"),
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04\x95", "a Python pickle"),
    (b"\x80\x05\x95", "a Python pickle"),
)


def without_packing(name: str) -> str:
    """The name in lower case, without the suffix of a compression: ``A.TXT.GZ`` is ``a.txt``."""
    name = name.lower()
    return next((name.removesuffix(suffix) for suffix in PACKINGS if name.endswith(suffix)), name)


def read_pieces(path: Path, shown: str | None = None) -> Iterator[bytes]:
    """The content of a plain or compressed file of UTF-8 text, in pieces that are not empty.

    Args:
        shown: its name in messages.

    Raises:
        DataError: it cannot be read to its end, or is not UTF-8 text (judged by its first bytes).
    """
    shown = shown or str(path)
    first = True
    try:
        with path.open("rb") as file:
            for piece in _unpacked(file, path, shown):
                if first:
                    _refuse_what_is_not_text(piece[:_START], shown)
                    first = False
                yield piece
    except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError) as error:
        raise _damaged(shown, error) from None
    except OSError as error:
        if error.errno is None:  # what the libraries of compressions raise
            raise _damaged(shown, error) from None
        raise DataError(f"{shown}: cannot be read: {error.strerror}", fix="check the permissions") from None


def start_of(path: Path, size: int = _START) -> bytes:
    """The first bytes of a file as they are, or none if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError:
        return b""


def _damaged(shown: str, reason: object) -> DataError:
    return DataError(f"{shown}: damaged or cut short: {reason}", fix="download or write it again")


def _unpacked(file: IO[bytes], path: Path, shown: str) -> Iterator[bytes]:
    start = file.read(_START)
    file.seek(0)
    packing = _packing(start)
    named = PACKINGS.get(path.suffix.lower())
    if start and named and not packing:
        raise DataError(
            f"{shown}: damaged, or not {named}: its first bytes are those of another format",
            fix=f"download or write it again; if it was never compressed, rename it without {path.suffix}",
        )
    if packing == "zstd":
        yield from _zstd_pieces(file, shown)
        return
    stream: Any = file
    if packing in _STREAMS:
        stream = _STREAMS[packing](file)
    elif packing == "lz4":
        stream = _needed("pyarrow", shown).CompressedInputStream(file, "lz4")
    elif packing == "zip":
        stream = _only_member(zipfile.ZipFile(file), shown)
    while piece := stream.read(CHUNK):
        yield piece


def _packing(start: bytes) -> str | None:
    if (
        start[1:4] == b"\x2a\x4d\x18" and start[0] & 0xF0 == 0x50
    ):  # a skippable frame, which pzstd writes first
        return "zstd"
    found = next((name for magic, name in _PACKED if start.startswith(magic)), None)
    # Text may begin with these three letters; in a packed file a level and a constant follow.
    if found == "bzip2" and start[4:10] not in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return None
    return found


def _needed(package: str, shown: str) -> Any:
    try:
        return __import__(package)
    except ImportError:
        raise DataError(
            f"{shown}: reading it needs the package {package}", fix="pip install 'sentcompress[data]'"
        ) from None


def _zstd_pieces(file: IO[bytes], shown: str) -> Iterator[bytes]:
    """Decompressed pieces of a file of one or more zstd frames."""
    zstandard = _needed("zstandard", shown)
    # Web-scale corpora are often packed with --long=31.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = decompressor.decompressobj()
    fresh = True
    try:
        while data := file.read(_ZSTD_CHUNK):
            while data:
                if piece := frame.decompress(data):
                    yield piece
                fresh, data = frame.eof, frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = decompressor.decompressobj()
    except zstandard.ZstdError as error:
        raise _damaged(shown, error) from None
    if not fresh:
        raise DataError(f"{shown}: damaged or cut short", fix="download or write it again")


def _only_member(archive: zipfile.ZipFile, shown: str) -> IO[bytes]:
    """The file in a zip archive. Raises DataError if there are several: they may be anything, as in a docx file."""
    members = [m for m in archive.infolist() if not m.is_dir() and not m.filename.startswith("__MACOSX/")]
    if len(members) != 1:
        raise DataError(
            f"{shown}: a zip archive of {len(members)} files, but only archives of a single file are read",
            fix="unpack it into a folder and use that; docx, odt and epub files must be converted to text",
        )
    return archive.open(members[0])


def _refuse_what_is_not_text(start: bytes, shown: str) -> None:
    """Raise DataError for known formats that are not text, and for text in UTF-16 or UTF-32."""
    if packing := _packing(start):
        raise DataError(
            f"{shown}: compressed twice; {packing} is inside", fix="unpack it once, and name what comes out"
        )
    what = next((name for magic, name in _NEVER_TEXT if start.startswith(magic)), None)
    if what is None and start[257:262] == b"ustar":
        what = "a tar archive"
    if what in ("a Parquet file", "an Arrow file"):
        raise DataError(f"{shown}: {what}, not text", fix="read it with --data, or with data.name=parquet")
    if what is not None:
        verb = "unpack it into a folder" if "archive" in what or "packed" in what else "convert it to text"
        raise DataError(f"{shown}: {what}, not text", fix=f"{verb}, and use that")
    _refuse_other_encodings(start, shown)


def _refuse_other_encodings(start: bytes, shown: str) -> None:
    """Raise DataError for a file that begins as UTF-16 or UTF-32 does: with a mark, or with NULs between letters."""
    zeros = tuple(byte == 0 for byte in start[:4])
    if start.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        name = "UTF-32"
    elif start.startswith((b"\xff\xfe", b"\xfe\xff")):
        name = "UTF-16"
    elif zeros in _NULS:
        name = _NULS[zeros]
    else:
        return
    raise DataError(
        f"{shown}: the file is {name}, and UTF-8 is needed",
        fix=f"convert it: iconv -f {name} -t UTF-8 old > new",
    )


_NULS = {
    (False, True, False, True): "UTF-16LE",
    (True, False, True, False): "UTF-16BE",
    (False, True, True, True): "UTF-32LE",
    (True, True, True, False): "UTF-32BE",
}
"""Which of the first four bytes are NUL, where the text begins with letters of ASCII and has no mark."""
