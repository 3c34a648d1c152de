"""The processes of a run: the environment a launcher gives them, their shares of the work, and signals to stop.

Importing this module does not import torch.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from sentcompress.errors import InputError, TerminatedError

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")

LAUNCHED = "SENTCOMPRESS_LAUNCHED"
"""Environment variable: the number of processes that ``sentcompress launch`` started."""
LIFELINE = "SENTCOMPRESS_LIFELINE"
"""Environment variable: the file descriptor of a pipe that stays open while the launcher lives."""
_LAUNCH_FIX = (
    "start it with sentcompress launch or torchrun, which set these; for one process, unset WORLD_SIZE"
)


def check_environment() -> None:
    """Refuse inconsistent launcher variables before a library waits for processes that cannot come.

    Raises:
        InputError: a variable is missing, is not a number, or contradicts the others.
    """
    if "WORLD_SIZE" not in os.environ:
        return
    found = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        text = os.environ.get(name, "")
        if text and not (text.isascii() and text.isdecimal()):
            raise InputError(f"the environment variable {name} is '{text}', not a number", fix=_LAUNCH_FIX)
        found[name] = int(text) if text else None
    world, rank = found["WORLD_SIZE"], found["RANK"]
    if not world:
        raise InputError("the environment variable WORLD_SIZE is 0 or empty", fix=_LAUNCH_FIX)
    if rank is not None and rank >= world:
        raise InputError(f"RANK is {rank} but WORLD_SIZE is {world}: ranks start at 0", fix=_LAUNCH_FIX)
    if world > 1:
        missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
        if missing:
            raise InputError(f"WORLD_SIZE is {world}, but {missing[0]} is not set", fix=_LAUNCH_FIX)


def process_count() -> int:
    """Number of processes in the run, known before they connect to each other."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_cpu() -> bool:
    """True where torch finds no accelerator. Accelerate needs this, or CPU processes do not form one group."""
    import torch

    return not torch.accelerator.is_available()


def processes() -> PartialState:
    """Accelerate's state of this process, created on first use."""
    from accelerate import PartialState

    return PartialState(cpu=on_cpu())


def own_share(items: Sequence[T]) -> Sequence[T]:
    """The items this process handles: every n-th of n processes."""
    ranks = processes()
    return items[ranks.process_index :: ranks.num_processes]


def gathered_shares(results: Sequence[T]) -> list[T]:
    """The results of all processes for their :func:`own_share`, in the order of the items, in every process."""
    from accelerate.utils import gather_object

    ranks = processes()
    if ranks.num_processes == 1:
        return list(results)
    shares: list[list[T]] = gather_object([list(results)])
    return [share[i] for i in range(max(map(len, shares))) for share in shares if i < len(share)]


class Interruption:
    """Within the block, the first SIGINT or SIGTERM only sets ``signal``; the caller stops when it is ready.

    A second Ctrl-C acts as usual. A second SIGTERM is ignored: launchers pass on a signal that the cluster has
    already sent to every process. Outside the main thread, where Python has no signal handlers, nothing changes.

    Attributes:
        signal: the signal received, or None.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, self._before.pop(signal.SIGINT))
        self.signal = self.signal or number


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Within the block, SIGTERM ends this process with code 75 and a message. Training overrides this to save."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows signal handlers in the main thread only
        return
    process = os.getpid()

    def end(number: int, _: FrameType | None) -> NoReturn:
        if os.getpid() != process:  # a forked worker: behave as if there were no handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        print("error: stopped by SIGTERM\n  fix: run the same command again", file=sys.stderr)
        raise SystemExit(TerminatedError.exit_code)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_with_the_launcher() -> None:
    """In a process that ``launch`` started: send it SIGTERM when the launcher ends, for whatever reason."""
    lifeline = os.environ.pop(LIFELINE, "")
    if not lifeline.isdecimal():
        return

    def watch(handle: int) -> None:
        os.read(handle, 1)  # nothing is ever written: this returns when the launcher's end is closed
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, args=(int(lifeline),), daemon=True, name="lifeline").start()


def exit_process(code: int | str) -> NoReturn:
    """``sys.exit``, except that one of several processes exits without shutting the interpreter down.

    Otherwise a thread of gloo that still has a tensor to release would wait for the interpreter, and end the process
    with SIGABRT (https://github.com/pytorch/pytorch/issues/190489). ``destroy_process_group`` does not end these
    threads where DistributedDataParallel was used.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        sys.exit(code)
    if isinstance(code, str):
        print(code, file=sys.stderr)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 1)
