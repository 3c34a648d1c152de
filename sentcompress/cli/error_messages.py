"""Turns any exception into a message on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Iterator

from sentcompress.errors import InputError, OutOfMemoryError, RunError, SentCompressError, StorageError
from sentcompress.files import printable

DEBUG_VARIABLE = "SENTCOMPRESS_DEBUG"

_LESS_MEMORY = (
    "lower train_vae.sentences_per_batch, graft.passages_per_batch or graft.max_sentences "
    "(raise gradient_accumulation to keep the batch), set graft.gradient_checkpointing=true, "
    "or for bench lower bench.batch_sizes"
)
_PATH_FIXES = {
    errno.ENAMETOOLONG: "give a shorter path; a name in it has 255 bytes at most",
    errno.ELOOP: "a link there leads to itself: give the path of the file or folder itself",
    errno.EACCES: "check the permissions of it and of the folders above it",
}
"""What a path is at fault for that a user gave, whoever opened it."""
_OUT_OF_MEMORY_TEXTS = ("out of memory", "not enough memory", "can't allocate memory")


def debugging() -> bool:
    """Whether ``--debug`` or its variable asks for tracebacks."""
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
    """The error a user can act on: our own as it is, others by what they or their causes say."""
    for link in _chain(error):
        if isinstance(link, SentCompressError):
            return link
        if _is_out_of_memory(link):
            return OutOfMemoryError(f"out of memory: {_first_line(link)}", fix=_LESS_MEMORY)
        if _is_disk_full(link):
            where = f": {link.filename}" if isinstance(link, OSError) and link.filename else ""
            return StorageError(
                f"no space left on the disk{where}",
                fix="free some space or choose another --out; then run the same command again with --resume",
            )
        if _is_lost_process(link):
            return RunError(
                "another process of this run has ended, and this one cannot go on without it",
                fix="its own message says why; then run the same command again with --resume",
            )
        if isinstance(link, OSError) and link.filename is not None and link.errno in _PATH_FIXES:
            return InputError(f"{os.fsdecode(link.filename)}: {link.strerror}", fix=_PATH_FIXES[link.errno])
        if _is_no_home(link):
            return InputError(
                "a path begins with ~, and no home folder of that user is known", fix="write the path in full"
            )
    return RunError(
        f"{type(error).__name__}: {_first_line(error)}", fix="run again with --debug for the traceback"
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _is_out_of_memory(error: BaseException) -> bool:
    # By name, since importing torch to ask isinstance would cost seconds.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(known in text for known in _OUT_OF_MEMORY_TEXTS)


def _is_disk_full(error: BaseException) -> bool:
    # safetensors and torch wrap the operating system's error in their own, and keep its words.
    full = (errno.ENOSPC, errno.EDQUOT)
    return (isinstance(error, OSError) and error.errno in full) or "No space left on device" in str(error)


def _is_lost_process(error: BaseException) -> bool:
    # Gloo's and NCCL's words: neither raises an error of its own.
    lost = ("Connection closed by peer", "Connection reset by peer", "NCCL communicator was aborted")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in lost)


def _is_no_home(error: BaseException) -> bool:
    # pathlib has no class for it, and does not name the path.
    return isinstance(error, RuntimeError) and str(error).startswith("Could not determine home directory")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "(no message)")
