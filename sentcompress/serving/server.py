"""Runs the server until a signal, and lets running requests end."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

import uvicorn

from sentcompress.distributed import Interruption
from sentcompress.errors import InputError, RunError
from sentcompress.serving.guard import Guard, is_loopback, timed_protocol
from sentcompress.serving.http_app import Service, create_app
from sentcompress.serving.limits import KEY_VARIABLE

log = logging.getLogger(__package__)
POLL_SECONDS = 0.2
"""How often the main thread looks for a signal."""
KEEP_ALIVE_SECONDS = 20
"""How long an idle connection stays open: longer than clients use it again, whose request would be lost otherwise."""
CLOSE_SECONDS = 5
"""After the last answer was written: time for connections to take it."""
OPEN_FILES = 2**16
"""Descriptors: 64 texts with 2 for each of 64 blocks take 8,192, and prompts that stay read as many again."""


def allow_open_files() -> None:
    """Take as many open files as the system allows: texts in ``storage=file`` and connections need them."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # the system may allow fewer than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_address(host: str, key: str | None) -> None:
    """Refuse to let other machines in without a key. Raises InputError."""
    if key is None and not is_loopback(host):
        raise InputError(
            f"--host {host} lets other machines in, and there is no API key",
            fix=f"give one with --api-key-file FILE or in the environment variable {KEY_VARIABLE}, or leave out --host",
        )


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which does not listen yet: the model is loaded first.

    Raises:
        InputError: the address is not free or not of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        raise InputError(
            f"cannot listen on {host}, port {port}: {error.strerror}", fix="choose another --port or --host"
        ) from None
    return bound


def log_to_stderr() -> None:
    """One line for each request, and for errors. Texts are in it only if asked for."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def serve(
    service: Service, bound: socket.socket, host: str, key: str | None, ready: Callable[[str], None]
) -> None:
    """Answer requests until SIGINT or SIGTERM. Then refuse new ones, let running ones end, and return.

    Args:
        service: with the model.
        bound: from :func:`bind`.
        host: as the user gave it.
        key: of the API; None: anyone who reaches the address may come.
        ready: called with the URL once requests are answered.

    Raises:
        RunError: it ended without a signal.
    """
    limits = service.limits
    allow_open_files()
    app = Guard(
        create_app(service), key=key, local=is_loopback(host), limits=limits, count=service.metrics.count
    )
    config = uvicorn.Config(
        app,
        http=timed_protocol(limits.body_seconds),
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        limit_concurrency=limits.max_connections,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )
    server = uvicorn.Server(config)
    # uvicorn handles signals in the main thread only; there, ours let it go on answering with 503 for a while.
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, name="http", daemon=True)
    with Interruption() as interruption:
        thread.start()
        announced = False
        while thread.is_alive() and interruption.signal is None and service.scheduler.alive:
            if server.started and not announced:
                shown = f"[{host}]" if ":" in host else host
                ready(f"http://{shown}:{bound.getsockname()[1]}")
                announced = True
            thread.join(POLL_SECONDS)
        failed = interruption.signal is None and not service.scheduler.draining
        if not service.scheduler.drain(limits.drain_seconds):
            log.info("some texts were not complete after %g seconds", limits.drain_seconds)
        service.scheduler.close()
        server.should_exit = True
        thread.join()
    if failed:
        raise RunError("the server ended by itself", fix="its log above says why; start it again")
