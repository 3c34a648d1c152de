"""How a cache folder is built: in a temporary folder beside it, by one process at a time. No torch."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import blake2b
from pathlib import Path
from uuid import uuid4

from sentcompress.errors import InputError, SentCompressError, StorageError
from sentcompress.files import open_lock_file, try_lock, wait_for_lock

ATTEMPTS = 3
"""Another process may damage or replace a cache folder between its publication and its opening."""
_STALE_SECONDS = 24 * 3600.0


@contextmanager
def build_folder(final: Path, say: Callable[[str], None]) -> Iterator[Path | None]:
    """An empty folder to fill and publish as ``final``; it is gone when the block ends, whatever happens in it.

    Where another process is building the same, wait until it is done or dead, and yield None: look again. The lock that
    tells is the system's, which lets it go when its process dies. On a file system that has no locks nobody waits, and
    several may build the same at once.

    Args:
        say: told once that there is a wait.

    Raises:
        StorageError: the cache cannot be written.
        InputError: its path is none that can be.
    """
    temporary: Path | None = None
    with _storage_refusals(final.parent), _lock(final, say) as state:
        if state == _WAITED:
            yield None
            return
        # Only a folder that is built under a lock says where: without its lock, it is known there to be a dead one's.
        place = f"{_here()}-" if state == _LOCKED else ""
        temporary = final.with_name(f".{final.name}.{place}{uuid4().hex[:8]}.tmp")
        try:
            temporary.mkdir(parents=True)
            _remove_leftovers(temporary, final)
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _storage_refusals(folder: Path) -> Iterator[None]:
    """Turn what the operating system refuses in the block into an error that names the folder of the cache."""
    try:
        yield
    except OSError as error:
        raise _refused(folder, error) from error


def _refused(folder: Path, error: OSError) -> SentCompressError:
    message = f"cannot write the token cache {folder}: {error.strerror or error}"
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return InputError(message, fix="set SENTCOMPRESS_CACHE to the path of a folder")
    return StorageError(message, fix="free some space there, or set SENTCOMPRESS_CACHE to a folder with room")


def damaged_again(folder: Path) -> StorageError:
    """What to say after so many ``ATTEMPTS``."""
    return StorageError(
        f"the token cache {folder} is damaged again as soon as it is built",
        fix="check that disk, or set SENTCOMPRESS_CACHE to a folder on another one",
    )


_LOCKED, _WAITED, _NO_LOCKS = "locked", "waited", "no locks"


@contextmanager
def _lock(final: Path, say: Callable[[str], None]) -> Iterator[str]:
    """Hold the lock of a cache folder; or wait until nobody holds it, without taking it."""
    descriptor = open_lock_file(_lock_file(final))
    try:
        if descriptor is None:
            yield _NO_LOCKS
        elif (free := try_lock(descriptor)) is not False:
            yield _LOCKED if free else _NO_LOCKS
        else:
            say(f"another process is tokenizing this corpus; waiting for it (it holds {_lock_file(final)})")
            wait_for_lock(descriptor)
            yield _WAITED
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock_file(final: Path) -> Path:
    # Never deleted: whoever had it open would hold a lock that the next one, with a new file, knows nothing of.
    return final.parent.parent / "locks" / f"{final.parent.name}-{final.name}"


@cache
def _here() -> str:
    """This start of this machine, in a name: on some network file systems others do not see the locks held here."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    text = socket.gethostname() + (boot.read_text(encoding="ascii") if boot.exists() else "")
    return blake2b(text.encode(), digest_size=4).hexdigest()


def _remove_leftovers(own: Path, final: Path) -> None:
    """Delete what builds that were killed left behind: at once where their lock shows it, else after a day.

    Both times are the file system's, so a clock that is changed meanwhile makes nothing look old.
    """
    now = own.stat().st_mtime
    for path in own.parent.glob(".*.tmp"):
        if path == own:
            continue
        with (
            suppress(FileNotFoundError),
            _held_if_dead(path, own, final) as dead,
        ):  # another process was faster
            if dead or now - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
    for path in own.parent.glob(".*.old"):  # a damaged folder, whoever was about to delete it
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _held_if_dead(path: Path, own: Path, final: Path) -> Iterator[bool]:
    """Whether a temporary folder's process is known to be dead; its lock is held meanwhile, so that none begins."""
    _, key, made, _ = path.name.split(".") if path.name.count(".") == 3 else ("", "", "", "")
    if not made.startswith(f"{_here()}-"):
        yield False
    elif key == final.name:
        yield own.name.startswith(f".{key}.{_here()}-")  # the lock is held here already
    else:
        descriptor = open_lock_file(_lock_file(final.with_name(key)))
        try:
            yield descriptor is not None and try_lock(descriptor) is True
        finally:
            if descriptor is not None:
                os.close(descriptor)
