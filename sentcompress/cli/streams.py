"""Standard streams that may be closed, full or gone: what a command prints must not decide what becomes of its work."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

from sentcompress.errors import StorageError


def prepare() -> None:
    """Replace what cannot be used of stdin, stdout and stderr, and let stderr fail silently. Call it once, early.

    A closed stream (``>&-``) becomes the null device. Its descriptor is taken as well: otherwise the next file opened
    would get it, and with it what others write to stdout.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        writes = number > 0
        if not _is_open(number):
            null = os.open(os.devnull, os.O_WRONLY if writes else os.O_RDONLY)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, "w" if writes else "r", encoding="utf-8"))  # noqa: SIM115
        elif writes and isinstance(stream, io.TextIOWrapper):
            # Characters that the terminal cannot show must not end a run.
            stream.reconfigure(errors="replace")
            if stream is getattr(sys, f"__{name}__") and stream.fileno() == number:
                setattr(sys, name, _rewrapped(stream, _Lossy if name == "stderr" else _FailsOnce))


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _rewrapped(stream: io.TextIOWrapper, kind: type[io.FileIO]) -> io.TextIOWrapper:
    stream.flush()
    raw = kind(stream.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Lossy(io.FileIO):
    """Drops what cannot be written: a run goes on when nobody can see its progress."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


class _FailsOnce(io.FileIO):
    """Fails once, with an error of its own: else it would read as that of a file which the command writes."""

    failed = False

    def write(self, data: Any) -> int:
        if self.failed:
            return len(data)
        try:
            return super().write(data) or 0
        except OSError as error:
            self.failed = True
            if error.errno == errno.EPIPE:  # the reader has had enough, as in ``| head -1``
                raise
            raise StorageError(
                f"standard output cannot be written: {error.strerror}; what the command has saved is intact",
                fix="free some space there, or send the output elsewhere",
            ) from None
