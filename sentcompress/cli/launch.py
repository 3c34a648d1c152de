"""``sentcompress launch``: runs a command in several processes on this machine and ends them together."""

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

from sentcompress.cli import train
from sentcompress.cli.common import examples
from sentcompress.distributed import LAUNCHED, LIFELINE
from sentcompress.errors import InputError, RunError, TerminatedError
from sentcompress.files import printable

GRACE_SECONDS = 10.0
"""Time for the other processes to exit after one has failed; then they are killed."""
STOPPED_CODES = (TerminatedError.exit_code, 130)
"""Exit codes of a process that was asked to stop. The others are saving then, and get all the time they need."""
POLL_SECONDS = 0.1
MAX_LINES = 20
"""Lines of a failed process's stderr that are shown."""


@dataclass
class Worker:
    """A process. ``stderr`` is the file of its messages; None for rank 0, which writes to the terminal."""

    rank: int
    process: subprocess.Popen[bytes]
    stderr: IO[bytes] | None


def launch(
    context: typer.Context,
    processes: Annotated[
        int,
        typer.Option("--processes", "-n", min=1, max=4096, help="Number of processes; on GPUs, one per GPU."),
    ],
) -> None:
    """Run training, bench quality or bench speed in several processes on this machine: launch -n 4 graft RECIPE ...

    Ctrl-C and SIGTERM reach all of them; exits with the code a single process would return. When one process dies, the
    others are stopped. When launch itself dies, or its terminal is closed, they save and exit. On several machines,
    start the command with torchrun or srun instead.
    """
    command = list(context.args)
    supported = supported_commands()
    if not any(command[: len(words)] == words for words in supported):
        given = f"'{' '.join(command[:2])}'" if command else "nothing"
        raise InputError(
            f"launch: {given} is not a command that runs in several processes",
            fix=f"use one of {', '.join(map(' '.join, supported))}, for example: launch -n {processes} graft strong",
        )
    port = free_port()
    # Only this process holds the second end, so it closes when this process ends, for whatever reason.
    lifeline, held = os.pipe()
    with ExitStack() as ends:
        ends.callback(os.close, held)
        ends.callback(os.close, lifeline)
        workers = []
        for rank in range(processes):
            stderr = ends.enter_context(tempfile.TemporaryFile()) if rank else None
            workers.append(Worker(rank, start(rank, processes, port, command, stderr, lifeline), stderr))
            ends.callback(workers[-1].process.kill)
        with signals_passed_on(workers):
            failed = wait(workers)
        if failed is None:
            return
        code = failed.process.returncode
        # Rank 0 has printed its own error, unless it was killed. Bad input fails with the same message everywhere.
        if code < 0 or (failed.rank and code not in (*STOPPED_CODES, InputError.exit_code)):
            print(failure_message(failed), file=sys.stderr)
        raise typer.Exit(code if code > 0 else RunError.exit_code)


def supported_commands() -> list[list[str]]:
    """Commands that run in several processes: training, and the measurements that all processes share."""
    from sentcompress.benchmark.measurement import measurements

    shared = [["bench", measurement.name] for measurement in measurements() if measurement.distributed]
    return [["run"], *([command.name] for command in train.COMMANDS), *shared]


def free_port() -> int:
    """A port at which the processes can find each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    rank: int, processes: int, port: int, command: list[str], stderr: IO[bytes] | None, lifeline: int
) -> subprocess.Popen[bytes]:
    """Start one process with the environment variables that torchrun sets."""
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
        stderr=stderr,
        start_new_session=True,  # Ctrl-C reaches only this process, which passes it on once
    )


@contextmanager
def signals_passed_on(workers: list[Worker]) -> Iterator[None]:
    """Pass Ctrl-C and SIGTERM on to every process; a closed terminal counts as SIGTERM."""

    def send(number: int, _: Any) -> None:
        for worker in workers:
            if worker.process.poll() is None:
                worker.process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as with nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, send) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait(workers: list[Worker]) -> Worker | None:
    """Wait for all processes; return the first that failed. The others get a few seconds after that."""
    failed, deadline = None, float("inf")
    while any(worker.process.poll() is None for worker in workers):
        ended = [worker for worker in workers if worker.process.poll()]
        if ended and failed is None:
            failed = ended[0]
            if failed.process.returncode not in STOPPED_CODES:
                deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            for worker in workers:
                worker.process.kill()
        time.sleep(POLL_SECONDS)
    return failed or next((worker for worker in workers if worker.process.returncode), None)


def failure_message(worker: Worker) -> str:
    """How a process ended, and its last messages."""
    code = worker.process.returncode
    how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"exited with code {code}"
    lines: list[str] = []
    if worker.stderr is not None:
        worker.stderr.seek(0)
        lines = worker.stderr.read().decode(errors="replace").splitlines()[-MAX_LINES:]
        lines = [printable(line) for line in lines]
    return "\n".join([f"error: process {worker.rank} {how}; the others were stopped", *lines])


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
