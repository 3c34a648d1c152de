"""What the datasets that read files share: finding them, what may be read, and their fingerprint."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from sentcompress.datasets._packed import without_packing
from sentcompress.errors import DataError

SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson", ".jsonlines"),
    "parquet": (".parquet", ".arrow", ".feather", ".ipc"),
    "text": (".txt", ".md"),
    "csv": (".csv", ".tsv"),
}
"""What each dataset searches a folder for, compressed or not; ``--data`` takes the first one that is there."""


def not_blank(value: str) -> str:
    """Refuse an empty path: it would mean the current folder."""
    if not value.strip():
        raise PydanticCustomError("path", "must not be empty; . is the current folder")
    return value


PathName = Annotated[str, AfterValidator(not_blank)]
Paths = Annotated[list[PathName], Field(min_length=1)]

LARGEST_DOCUMENT = 1 << 25
"""Bytes a document of text may have, and a line of JSON, decompressed: a file of a few kB may stand for one of many GB.
Cut and tokenized, it takes 1 GB of memory at most; parsed, a line of nothing but brackets takes 24 times its bytes."""

_KINDS_SHOWN = 6
_OPTION = "data.options.paths (or --data)"
_SPECIAL = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def find_files(paths: Sequence[str], suffixes: tuple[str, ...], *, say: bool = False) -> list[Path]:
    """Files named by paths, folders (searched recursively for ``suffixes``) and globs (``**`` recurses).

    Hidden files and the leftovers of programs are left out of folders and globs, see :func:`is_leftover`.

    Args:
        say: print to stderr what was named more than once, and what of a folder is left out.

    Returns:
        each file once, in the order of ``paths``, sorted within a folder or glob. A link to one of them is not another.

    Raises:
        DataError: a path matches nothing, cannot be used, or leads to something that is no file, such as a pipe.
    """
    found: list[Path] = []
    for name in paths:
        matches = files_of(name, suffixes)
        if not matches and path_of(name).is_dir():
            others = left_out(path_of(name), suffixes)
            raise DataError(
                f"{name}: no {' or '.join('*' + s for s in suffixes)} file in this folder"
                + (f"; it has {others}" if others else ""),
                fix="name the files, or a glob such as 'folder/**/*.ext'",
            )
        if not matches:
            what = "no file matches" if glob.has_magic(name) else "no such file or folder"
            raise DataError(
                f"{name}: {what} (looked in {Path.cwd()})",
                fix=f"correct {_OPTION}; relative paths start at the current folder",
            )
        if say:
            say_left_out(name, suffixes)
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
        matches = sorted(match for match in _globbed(path) if not is_unasked(match, path))
    elif stat.S_ISDIR(mode):
        matches = sorted(_searched(path, suffixes))
    else:
        matches = [path]
    return [match for match in matches if _is_file(match)]


def say_left_out(name: str, suffixes: tuple[str, ...]) -> None:
    """Print to stderr how many files of a folder are read, and how many of each other kind are not."""
    folder = path_of(name)
    if folder.is_dir() and (others := left_out(folder, suffixes)):
        read, listed = sum(1 for _ in _searched(folder, suffixes)), ", ".join("*" + s for s in suffixes)
        _say_once(
            f"{name}: {read} file(s) are read ({listed}); left out: {others}. "
            "To read others too, name them by a glob, or combine datasets with 'mix'."
        )


def left_out(folder: Path, suffixes: tuple[str, ...]) -> str:
    """How many files of a folder a search does not read, by suffix: ``3 *.csv, 1 without a suffix``; or nothing."""
    read = set(_searched(folder, suffixes))
    kinds = Counter(_kind(path.name) for path in _files_below(folder) if path not in read)
    counts = [f"{count} {kind}" for kind, count in sorted(kinds.items(), key=lambda k: (-k[1], k[0]))]
    more = len(counts) - _KINDS_SHOWN
    return ", ".join(counts[:_KINDS_SHOWN]) + (f" and {more} other kind(s)" if more > 0 else "")


def _kind(name: str) -> str:
    plain = without_packing(name)
    suffix = Path(plain).suffix
    return f"*{suffix}{name.lower()[len(plain) :]}" if suffix else "without a suffix"


@cache
def _say_once(message: str) -> None:
    """Print to stderr, the same message only once; of the processes of a run, only the first one prints."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


_OF_PROGRAMS = (
    "lost+found",
    "$RECYCLE.BIN",
    "System Volume Information",
    "@eaDir",
    "_delta_log",
    "_temporary",
)


def is_leftover(name: str, *, folder: bool = False) -> bool:
    """Whether a name marks something hidden, or left by a program: nobody means it to be read as a document.

    As ``datasets`` does, what begins with a dot, and folders that begin with two underscores (``.ipynb_checkpoints``,
    ``._book.txt``, ``__MACOSX``). Also copies and locks of editors (``book.txt~``, ``#book.txt#``, ``~$book.txt``), and
    folders of file systems and of table formats.
    """
    if folder:
        return name.startswith((".", "__")) or name in _OF_PROGRAMS
    return name.startswith((".", "~$")) or name.endswith("~") or (name[:1] == name[-1:] == "#")


def is_unasked(match: Path, pattern: Path) -> bool:
    """Whether what a glob matched is a leftover, or in a folder of leftovers, that the pattern does not spell out.

    The rule of ``datasets``: the path has more such parts than the pattern.
    """

    def count(path: Path) -> int:
        folders = sum(is_leftover(part, folder=True) for part in path.parts[:-1] if part != "..")
        return folders + is_leftover(path.name)

    return count(match) > count(pattern)


def _searched(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """The files below a folder that have one of the suffixes. A compressed copy beside its original is left out."""
    for path in _files_below(folder):
        plain = without_packing(path.name)
        if plain.endswith(suffixes) and (len(plain) == len(path.name) or not path.with_suffix("").exists()):
            yield path


def path_of(name: str) -> Path:
    """The path, ``~`` replaced by the home folder. Raises DataError when there is no such user, or it is blank."""
    if not name.strip():
        raise DataError(
            f"an empty path in {_OPTION}",
            fix="name a file, a folder or a glob; . is the current folder",
        )
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


def _files_below(folder: Path) -> Iterable[Path]:
    """Everything below a folder but folders and leftovers; links to folders are not followed."""
    for place, folders, names in os.walk(folder, onerror=_raise_unusable):
        folders[:] = [name for name in folders if not is_leftover(name, folder=True)]
        yield from (Path(place, name) for name in names if not is_leftover(name))


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
