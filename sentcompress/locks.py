"""Locks on files, so that two processes never write the same folder. No torch.

Both kinds are locks of the operating system: it releases them when their process ends, however it ends. So the lock of
a dead process is simply free, and no process number or age of a file has to be compared. :func:`hold_lock` guards a
folder during a block; :func:`try_lock` locks a file that is open already, and that child processes may inherit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout, lock_descriptor


@contextmanager
def hold_lock(path: Path) -> Iterator[bool]:
    """Hold the lock on the file ``path`` during the block; the thread that holds it may ask again.

    The operating system releases the lock when the process ends, however it ends. The file itself stays: if it were
    deleted, two processes could hold locks on two files of the same name.

    Yields:
        False if another process holds the lock.

    Raises:
        OSError: the file cannot be opened, or the file system has no locks.
    """
    lock = FileLock(path, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def open_lock_file(path: Path) -> int | None:
    """The descriptor of a file to lock with :func:`try_lock`; None where there can be no such file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:  # it belongs to another user; reading is enough for a lock
            return os.open(path, os.O_RDONLY)
    except OSError:
        return None


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file if nobody else holds its lock.

    A child process that inherits the file holds the lock, too, even after this process has died. The lock is released
    when the last of them closes the file.

    Returns:
        False if another process holds the lock, None if the file system has no locks.
    """
    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError:
        return None


def wait_for_lock(descriptor: int) -> None:
    """Lock an open file as soon as nobody else holds its lock."""
    with suppress(OSError):
        lock_descriptor(descriptor)
