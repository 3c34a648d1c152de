"""What a process knows of those that were started with it, and how it takes being asked to end. No torch."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from sentcompress.errors import InputError, TerminatedError

LAUNCHED = "SENTCOMPRESS_LAUNCHED"
"""How many processes ``launch`` has started."""
LIFELINE = "SENTCOMPRESS_LIFELINE"
"""Number of a pipe's end that is open as long as the launcher lives."""
_START_AGAIN = (
    "start it with sentcompress launch or torchrun, which set these; for one process, unset WORLD_SIZE"
)


def check_environment() -> None:
    """Refuse what a launcher never says, before a library waits for processes that cannot come.

    Raises:
        InputError: a variable is missing, no number, or does not go with the others.
    """
    if "WORLD_SIZE" not in os.environ:
        return
    found = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        text = os.environ.get(name, "")
        if text and not (text.isascii() and text.isdecimal()):
            raise InputError(f"the environment variable {name} is '{text}', no number", fix=_START_AGAIN)
        found[name] = int(text) if text else None
    world, rank = found["WORLD_SIZE"], found["RANK"]
    if not world:
        raise InputError("the environment variable WORLD_SIZE is 0 or empty", fix=_START_AGAIN)
    if rank is not None and rank >= world:
        raise InputError(f"RANK is {rank} and WORLD_SIZE {world}: ranks begin at 0", fix=_START_AGAIN)
    if world > 1:
        missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
        if missing:
            raise InputError(f"WORLD_SIZE is {world}, but {missing[0]} is not set", fix=_START_AGAIN)


@contextmanager
def ending_when_asked() -> Iterator[None]:
    """SIGTERM ends this process with code 75 and a word, wherever it is; training has its own way of ending."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where Python has no signal handlers
        return
    process = os.getpid()

    def end(number: int, _: FrameType | None) -> NoReturn:
        if os.getpid() != process:  # a worker forked from it: as if there were no handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        print("error: asked to end (SIGTERM)\n  fix: the same command starts it again", file=sys.stderr)
        raise SystemExit(TerminatedError.exit_code)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with_the_launcher() -> None:
    """In a process that ``launch`` started: ask it to end once the launcher is gone, however it went."""
    lifeline = os.environ.pop(LIFELINE, "")
    if not lifeline.isdecimal():
        return

    def watch(handle: int) -> None:
        os.read(handle, 1)  # nothing is ever written: it returns when the other end is closed
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, args=(int(lifeline),), daemon=True, name="lifeline").start()
