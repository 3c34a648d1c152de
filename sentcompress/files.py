"""Files and folders that are written completely or not at all, and checks that they still are. No torch."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sentcompress.errors import InputError, StorageError

_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_RUST_ERROR = re.compile(r"\(os error (\d{1,4})\)")


def printable(text: str) -> str:
    """Escape what a terminal would act on: control characters, surrogates, changes of text direction.

    Names and contents of files may contain escape sequences; they are shown as Python writes them.
    """
    return "".join(
        repr(c)[1:-1]
        if c in _DIRECTIONS or (c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cs"))
        else c
        for c in text
    )


def checked_text(value: Any, what: str) -> str:
    """The value, if it is text that can be tokenized and written to a file.

    Args:
        what: names it in messages, such as ``the prompt``.

    Raises:
        InputError: it is not a string, or holds a lone surrogate: half a UTF-16 pair, or a byte that was not UTF-8.
    """
    if not isinstance(value, str):
        raise InputError(f"{what} must be text (str), not {type(value).__name__}", fix="give a str")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what}: character {error.start + 1} ({value[error.start]!r}) is a lone surrogate, not text; bytes that "
            "are not UTF-8 become such characters",
            fix="give the text as UTF-8, or replace them: "
            "text.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')",
        ) from None
    return value


def expand_home(path: str) -> str:
    """The path with ``~`` or ``~user`` at its beginning replaced by that home folder, as a shell does.

    A shell leaves it alone in ``--out=~/x`` and in quotes; recipes know no shell.

    Raises:
        InputError: the path is empty, which would mean the current folder, or the home folder is unknown.
    """
    if not path.strip():
        raise InputError(f"{path!r}: an empty path", fix="name a file or a folder; . is the current folder")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.lexists(path):
        raise InputError(
            f"{path}: no home folder of that user is known",
            fix="write the full path, or ./~ for a file of that name",
        )
    return expanded


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the operating system while writing into a StorageError that names ``folder``."""
    try:
        yield
    except OSError as error:
        raise _refused(folder, error) from error
    except Exception as error:
        # safetensors writes in Rust and raises its own error class with the operating system's message.
        if said := _RUST_ERROR.search(str(error)):
            raise _refused(folder, OSError(int(said[1]), os.strerror(int(said[1])))) from error
        raise


def _refused(folder: Path, error: OSError) -> StorageError:
    if error.errno not in _FULL:
        return StorageError(
            f"{folder}: cannot be written: {error.strerror or error}",
            fix="check that the folder exists, that you may write there, and that the disk is healthy",
        )
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    return StorageError(
        f"{folder}: the disk is full ({free / 2**20:.0f} MiB free); everything saved before is intact",
        fix="free some space or keep fewer checkpoints, then continue with --resume",
    )


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a small text file so that a reader finds the old or the new content, never a mixture.

    Args:
        durable: wait until the file is on the disk; otherwise a power failure may lose it.

    Raises:
        StorageError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path.parent):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
            if durable:
                fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """The temporary sibling that will become ``path``."""
    return path.with_name(f".{path.name.lstrip('.')}.tmp")


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path`` that is deleted when the block ends, whatever happens in it."""
    temporary = temporary_path(path)
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed here
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling to fill; it becomes ``path`` when the block ends, and is deleted if the block fails.

    Raises:
        StorageError: the folder cannot be written.
    """
    with storage_errors(path.parent), temporary_folder(path) as temporary:
        yield temporary
        fsync_tree(temporary)
        gone = set_aside(path)
        os.rename(temporary, path)
        shutil.rmtree(gone, ignore_errors=True)
        fsync(path.parent)


def set_aside(path: Path) -> Path:
    """Rename a folder, if it exists, before it is deleted, and return its new name.

    If the process is killed while deleting, no damaged folder is left under the old name.
    """
    gone = path.with_name(f".{path.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)  # left by a process that was killed here
    if path.exists():
        os.rename(path, gone)
    return gone


def move_files(source: Path, target: Path, last: str) -> None:
    """Move everything from ``source`` to ``target``, the file ``last`` at the end, since it marks completeness."""
    with storage_errors(target):
        fsync_tree(source)
        for path in sorted(source.iterdir(), key=lambda path: path.name == last):
            if path.is_dir():
                shutil.rmtree(target / path.name, ignore_errors=True)
            if path.name == last:
                fsync(target)
            os.replace(path, target / path.name)
        fsync(target)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below to the disk, and give the files the folder's permissions to read and write.

    safetensors creates files that only their owner may read, whatever the umask.
    """
    mode = folder.stat().st_mode & 0o666
    for root, _, names in os.walk(folder):
        for name in names:
            (Path(root) / name).chmod(mode)
            fsync(Path(root) / name)
        fsync(Path(root))


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    # Windows flushes only what it may write.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """The BLAKE2b hash of a file, 32 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def folder_digest(folder: Path, pattern: str = "*.safetensors") -> str:
    """A digest of the names and contents of matching files, to record what a later stage was built on."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob(pattern)):
        digest.update(f"{path.name}:{file_digest(path)}\n".encode())
    return digest.hexdigest()


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The size and digest of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "blake2b": file_digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def damage(folder: Path, expected: dict[str, dict[str, Any]]) -> str | None:
    """How a folder differs from its manifest, or None if it is undamaged."""
    for name, entry in expected.items():
        if not isinstance(entry, dict) or not {"bytes", "blake2b"} <= entry.keys():
            return f"the manifest does not describe {name}"
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if file_digest(path) != entry["blake2b"]:
            return f"the content of {name} has changed since it was saved"
    return None


def finite(value: Any) -> Any:
    """A value for JSON: NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """The value in a JSON file, or None if the file is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
