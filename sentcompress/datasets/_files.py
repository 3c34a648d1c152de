"""What the datasets that read files share: finding them, what may be read, and their fingerprint."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sentcompress.errors import DataError

LARGEST_DOCUMENT = 1 << 25
"""Bytes a document of text may have, and a line of JSON, decompressed: a file of a few kB may stand for one of many GB.
Cut and tokenized, it takes 1 GB of memory at most; parsed, a line of nothing but brackets takes 24 times its bytes."""

_OPTION = "data.options.paths (or --data)"
_SPECIAL = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def find_files(paths: Sequence[str], suffixes: tuple[str, ...], *, say: bool = False) -> list[Path]:
    """Files named by paths, folders (searched recursively for ``suffixes``) and globs (``**`` recurses).

    Args:
        say: print to stderr what was named more than once.

    Returns:
        each file once, in the order of ``paths``, sorted within a folder or glob. A link to one of them is not another.

    Raises:
        DataError: a path matches nothing, cannot be used, or leads to something that is no file, such as a pipe.
    """
    found: list[Path] = []
    for name in paths:
        matches = files_of(name, suffixes)
        if not matches and path_of(name).is_dir():
            raise DataError(
                f"{name}: no {' or '.join('*' + s for s in suffixes)} file in this folder",
                fix="name the files, or a glob such as 'folder/**/*.ext'",
            )
        if not matches:
            what = "no file matches" if glob.has_magic(name) else "no such file or folder"
            raise DataError(
                f"{name}: {what} (looked in {Path.cwd()})",
                fix=f"correct {_OPTION}; relative paths start at the current folder",
            )
        found += matches
    return once_each(found, say=say)


def files_of(name: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of one path, folder or glob, sorted; empty where nothing is there.

    Raises:
        DataError: it cannot be used, or leads to something that is no file.
    """
    path = path_of(name)
    mode = _mode(path)
    if mode is None:
        matches = sorted(_globbed(path))
    elif stat.S_ISDIR(mode):
        matches = sorted(p for p in _below(path) if p.name.lower().endswith(suffixes))
    else:
        matches = [path]
    return [match for match in matches if _is_file(match)]


def path_of(name: str) -> Path:
    """The path, ``~`` replaced by the home folder. Raises DataError when there is no such user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise DataError(
            f"{name}: no home folder of that user is known",
            fix=f"write the path in full in {_OPTION}",
        ) from None


def once_each(files: Iterable[Path], *, say: bool) -> list[Path]:
    """The files without those that are one read before: by the same name, another way of writing it, or a link."""
    first: dict[str, Path] = {}
    again: list[tuple[Path, Path]] = []
    for path in files:
        kept = first.setdefault(os.path.realpath(path), path)
        if kept is not path:
            again.append((path, kept))
    if again and say:
        path, kept = again[0]
        print(
            f"{len(again)} path(s) lead to a file that is read already, and are left out; the first: {path} is {kept}",
            file=sys.stderr,
        )
    return list(first.values())


def _below(folder: Path) -> Iterable[Path]:
    """Everything below a folder but folders; links to folders are not followed, so none leads in a circle."""
    for place, _, names in os.walk(folder, onerror=_raise_unusable):
        yield from (Path(place, name) for name in names)


def _globbed(pattern: Path) -> Iterator[Path]:
    """As ``glob.glob``, but ``**`` enters no folder twice: with two links in a circle that would be 2^40 times."""
    if "**" not in pattern.parts:
        yield from map(Path, glob.glob(str(pattern)))
        return
    at = pattern.parts.index("**")
    rest = pattern.parts[at + 1 :] or ("*",)
    seen: set[str] = set()
    for top in sorted(_globbed(Path(*pattern.parts[:at]))):
        below = [top]
        while below:
            folder = below.pop()
            real = os.path.realpath(folder)
            if real in seen or not folder.is_dir():
                continue
            seen.add(real)
            yield from _globbed(Path(glob.escape(str(folder)), *rest))
            below += (Path(name) for name in glob.glob(os.path.join(glob.escape(str(folder)), "*", "")))


def _is_file(path: Path) -> bool:
    """False for a folder. Raises DataError for what is neither: a pipe would keep its reader waiting for ever."""
    mode = _mode(path)
    if mode is not None and (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return stat.S_ISREG(mode)
    if mode is None:
        if path.name.startswith("."):  # editors lock a file by a hidden link that leads nowhere
            return False
        raise DataError(
            f"{path}: a link to a file that is not there",
            fix="bring the file back, or delete the link",
        )
    what = next((word for is_one, word in _SPECIAL if is_one(mode)), "something else")
    raise DataError(
        f"{path}: {what}, not a file",
        fix=f"write its text to a file, and name that in {_OPTION}",
    )


def _mode(path: Path) -> int | None:
    """Kind and permissions of what a path leads to; None where nothing is there."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise DataError(f"{str(path)!r}: a path without NUL is needed", fix=f"correct {_OPTION}") from None
    except OSError as error:
        _raise_unusable(error)


def _raise_unusable(error: OSError) -> NoReturn:
    if error.errno == errno.ELOOP:
        fix = f"the link leads to itself; name the file itself in {_OPTION}"
    elif error.errno == errno.ENAMETOOLONG:
        fix = f"give the path of a file in {_OPTION}; a name has 255 bytes at most"
    else:
        fix = "check the permissions of it and of the folders above it"
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}", fix=fix) from None


def refuse_other_encodings(start: bytes, where: str) -> None:
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
        f"{where}: the file is {name}, and UTF-8 is needed",
        fix=f"convert it: iconv -f {name} -t UTF-8 old > new",
    )


_NULS = {
    (False, True, False, True): "UTF-16LE",
    (True, False, True, False): "UTF-16BE",
    (False, True, True, True): "UTF-32LE",
    (True, True, True, False): "UTF-32BE",
}
"""Which of the first four bytes are NUL, where the text begins with letters of ASCII and has no mark."""


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
