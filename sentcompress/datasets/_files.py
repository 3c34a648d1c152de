"""What the datasets that read files share: finding them, reading them as UTF-8, and their fingerprint."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sentcompress.errors import DataError


def find_files(paths: Sequence[str], suffixes: tuple[str, ...]) -> list[Path]:
    """Files named by paths, folders (searched recursively for ``suffixes``) and globs (``**`` recurses).

    Returns:
        each file once, in the order of ``paths``, sorted within a folder or glob.

    Raises:
        DataError: a path matches nothing.
    """
    found: dict[Path, None] = {}
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            matches = sorted(p for p in path.rglob("*") if p.is_file() and p.name.lower().endswith(suffixes))
            if not matches:
                raise DataError(
                    f"{name}: no {' or '.join('*' + s for s in suffixes)} file in this folder",
                    fix="name the files, or a glob such as 'folder/**/*.ext'",
                )
        elif path.exists():
            matches = [path]
        else:
            matches = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
            if not matches:
                what = "no file matches" if glob.has_magic(name) else "no such file or folder"
                raise DataError(
                    f"{name}: {what} (looked in {Path.cwd()})",
                    fix="correct the path; relative paths start at the current folder",
                )
        found.update(dict.fromkeys(matches))
    return list(found)


def read_utf8(path: Path, shown: str | None = None) -> str:
    """The text of a UTF-8 file, a byte order mark removed.

    Raises:
        DataError: it cannot be read, or is not UTF-8 (naming the byte).
    """
    shown = shown or str(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{shown}: cannot be read: {error.strerror}", fix="check the permissions") from None
    return decode_utf8(data, shown)


def decode_utf8(data: bytes, where: str) -> str:
    """Decode strictly; the message of the DataError names ``where`` and the first bad byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{where}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} (line {line})",
            fix="convert it, for instance: iconv -f WINDOWS-1252 -t UTF-8 old.txt > new.txt",
        ) from None


def files_fingerprint(base: str, files: Iterable[Path], root: Path | None = None) -> str:
    """A digest of ``base`` (the options' fingerprint) with names, sizes and change times of the files.

    Args:
        root: names are taken relative to it, so that a reinstalled package in another folder stays the same.
    """
    rows: list[Any] = [base]
    for path in files:
        status = os.stat(path)
        name = path.relative_to(root).as_posix() if root else str(path.resolve())
        rows.append([name, status.st_size, status.st_mtime_ns])
    return hashlib.blake2b(json.dumps(rows).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
