"""Turns any exception into a message on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Iterator

from sentcompress.errors import (
    InputError,
    OutOfMemoryError,
    RunError,
    SentCompressError,
    StorageError,
    is_out_of_memory,
)
from sentcompress.files import printable

DEBUG_VARIABLE = "SENTCOMPRESS_DEBUG"

_LESS_MEMORY = (
    "lower train_vae.sentences_per_batch, graft.passages_per_batch or graft.max_sentences "
    "(raise gradient_accumulation to keep the batch), set graft.gradient_checkpointing=true, "
    "or, for bench, lower bench.batch_sizes"
)
_PATH_FIXES = {
    errno.ENAMETOOLONG: "use a shorter path; file names may have at most 255 bytes",
    errno.ELOOP: "a link there points to itself; give the path of the real file or folder",
    errno.EACCES: "check the permissions of the file and of the folders above it",
}
"""What is wrong with a path from the user, and its fix."""


def debugging() -> bool:
    """Whether ``--debug`` or its environment variable is set."""
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def report(error: BaseException) -> int:
    """Print what went wrong and what to do about it; return the exit code.

    SENTCOMPRESS_DEBUG (set by ``--debug``) adds the traceback.
    """
    if debugging():
        print(printable("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    explained = explain(error)
    print(f"error: {printable(str(explained))}", file=sys.stderr)
    return explained.exit_code


def explain(error: BaseException) -> SentCompressError:
    """Turn any error into one that the user can act on, from its type, its text and its causes."""
    for link in causes(error):
        if isinstance(link, SentCompressError):
            return link
        if is_out_of_memory(link):
            return OutOfMemoryError(f"out of memory: {first_line(str(link))}", fix=_LESS_MEMORY)
        if _is_disk_full(link):
            where = f": {link.filename}" if isinstance(link, OSError) and link.filename else ""
            return StorageError(
                f"no space left on the disk{where}",
                fix="free some space or choose another --out; then run the same command again with --resume",
            )
        if _is_lost_process(link):
            return RunError(
                "another process of this run has ended, so this one cannot continue",
                fix="see its message for the reason, then run the same command again with --resume",
            )
        if isinstance(link, OSError) and link.filename is not None and link.errno in _PATH_FIXES:
            return InputError(f"{os.fsdecode(link.filename)}: {link.strerror}", fix=_PATH_FIXES[link.errno])
        if _is_no_home(link):
            return InputError(
                "a path starts with ~, but the home folder of that user is unknown", fix="write the full path"
            )
    return RunError(
        f"{type(error).__name__}: {first_line(str(error))}", fix="run again with --debug for the traceback"
    )


def causes(error: BaseException, *, hidden: bool = False) -> Iterator[BaseException]:
    """An error and its causes.

    Args:
        hidden: also those hidden by ``from None``.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ and not hidden else link.__context__)


def _is_disk_full(error: BaseException) -> bool:
    # safetensors and torch raise their own errors, with the operating system's message.
    full = (errno.ENOSPC, errno.EDQUOT)
    return (isinstance(error, OSError) and error.errno in full) or "No space left on device" in str(error)


def _is_lost_process(error: BaseException) -> bool:
    # Gloo and NCCL have no error class of their own.
    lost = ("Connection closed by peer", "Connection reset by peer", "NCCL communicator was aborted")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in lost)


def _is_no_home(error: BaseException) -> bool:
    # pathlib has no class for this error and does not name the path.
    return isinstance(error, RuntimeError) and str(error).startswith("Could not determine home directory")


def first_line(text: str) -> str:
    """The first line of a message that is not blank."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "(no message)")
