"""``sentcompress launch``: a command in several processes on this machine, and their end as one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Annotated, Any

import typer

from sentcompress.cli.common import examples
from sentcompress.distributed import LAUNCHED, LIFELINE
from sentcompress.errors import InputError, RunError, TerminatedError
from sentcompress.files import printable

COMMANDS = (["run"], ["train-vae"], ["graft"], ["baseline"], ["bench", "quality"], ["bench", "speed"])
"""What runs in several processes."""
GRACE_SECONDS = 10.0
"""What the others have to end by themselves once one has failed; then they are killed."""
ASKED = (TerminatedError.exit_code, 130)
"""Codes of a process that was asked to end: the others are saving, and no time is too long for that."""
POLL_SECONDS = 0.1
LINES_SHOWN = 20


@dataclass
class Worker:
    """A process; ``said`` is its stderr, of all but rank 0, whose goes to the terminal."""

    rank: int
    process: subprocess.Popen[bytes]
    said: IO[bytes] | None


def launch(
    context: typer.Context,
    processes: Annotated[int, typer.Option("--processes", "-n", min=1, help="How many; on GPUs, one each.")],
) -> None:
    """Run training, bench quality or bench speed in several processes of this machine: launch -n 4 graft RECIPE ...

    Ctrl-C and SIGTERM reach all of them, and what they end with is what one process would end with. When one dies, the
    others are ended; when this one does, or its terminal is closed, they save and end. On several machines, start the
    command itself with torchrun or srun.
    """
    command = list(context.args)
    if not any(command[: len(known)] == known for known in COMMANDS):
        given = f"'{' '.join(command[:2])}'" if command else "nothing"
        raise InputError(
            f"launch: {given} is no command that runs in several processes",
            fix=f"name one of {', '.join(map(' '.join, COMMANDS))}, such as: launch -n {processes} graft strong",
        )
    port = free_port()
    lifeline, held = (
        os.pipe()
    )  # nobody else holds our end: it is closed when this process ends, however it ends
    with ExitStack() as ends:
        ends.callback(os.close, held)
        ends.callback(os.close, lifeline)
        workers = []
        for rank in range(processes):
            said = ends.enter_context(tempfile.TemporaryFile()) if rank else None
            workers.append(Worker(rank, start(rank, processes, port, command, said, lifeline), said))
            ends.callback(workers[-1].process.kill)
        with signals_passed_on(workers):
            failed = wait(workers)
        if failed is None:
            return
        code = failed.process.returncode
        # Rank 0 has spoken for itself, unless it was killed; of bad input it says the same as the others.
        if code < 0 or (failed.rank and code not in (*ASKED, InputError.exit_code)):
            print(last_words(failed), file=sys.stderr)
        raise typer.Exit(code if code > 0 else RunError.exit_code)


def free_port() -> int:
    """For the processes to find each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    rank: int, processes: int, port: int, command: list[str], said: IO[bytes] | None, lifeline: int
) -> subprocess.Popen[bytes]:
    """Start one process, told of the others as torchrun tells it."""
    return subprocess.Popen(
        [sys.executable, "-m", "sentcompress", *command],
        env={
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            LAUNCHED: str(processes),
            LIFELINE: str(lifeline),
        },
        pass_fds=(lifeline,),
        stdout=subprocess.DEVNULL if rank else None,
        stderr=said,
        start_new_session=True,  # Ctrl-C comes to us, and from us once to each
    )


@contextmanager
def signals_passed_on(workers: list[Worker]) -> Iterator[None]:
    """Ctrl-C and SIGTERM go to every process and end only them; a terminal that is closed asks as SIGTERM does."""

    def send(number: int, _: Any) -> None:
        for worker in workers:
            if worker.process.poll() is None:
                worker.process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, send) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait(workers: list[Worker]) -> Worker | None:
    """Until all have ended; the first that failed, if one did, after which the others get little time."""
    failed, deadline = None, float("inf")
    while any(worker.process.poll() is None for worker in workers):
        ended = [worker for worker in workers if worker.process.poll()]
        if ended and failed is None:
            failed = ended[0]
            if failed.process.returncode not in ASKED:
                deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            for worker in workers:
                worker.process.kill()
        time.sleep(POLL_SECONDS)
    return failed or next((worker for worker in workers if worker.process.returncode), None)


def last_words(worker: Worker) -> str:
    """How a process ended, and the end of what it said."""
    code = worker.process.returncode
    how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
    lines: list[str] = []
    if worker.said is not None:
        worker.said.seek(0)
        lines = worker.said.read().decode(errors="replace").splitlines()[-LINES_SHOWN:]
        lines = [printable(line) for line in lines]
    return "\n".join([f"error: process {worker.rank} {how}; the others were ended", *lines])


def add_to(app: typer.Typer) -> None:
    app.command(
        context_settings={
            "allow_extra_args": True,
            "ignore_unknown_options": True,
            "allow_interspersed_args": False,
        },
        epilog=examples(
            "sentcompress launch -n 2 run quickstart --out out/quickstart",
            "sentcompress launch -n 2 bench quality out/quickstart",
            "sentcompress launch -n 2 bench speed out/quickstart",
            "sentcompress launch -n 8 graft my-recipe.yaml --out out/mine --resume",
        ),
    )(launch)
