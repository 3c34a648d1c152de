"""Installed packages: their metadata, which may be broken, and the import of their code, which may do anything."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

SLOW_IMPORT_SECONDS = 5.0
"""An import that takes longer is named: it may never end."""

_every_distribution = metadata.distributions


def distributions(**context: Any) -> Iterator[metadata.Distribution]:
    """As ``importlib.metadata.distributions``, without packages whose metadata cannot be read.

    Python's own ``entry_points`` fails for all packages when one is broken, and with it ``import torch``. A warning
    names each package that is left out.
    """
    for dist in _every_distribution(**context):
        try:
            _ = dist.entry_points, dist._normalized_name  # type: ignore[attr-defined]
        except Exception as error:
            _warn_once(
                f"package '{name_of(dist)}' in {dist.locate_file('')} is left out, since its metadata cannot be read "
                f"({type(error).__name__}: {error}); reinstall or delete it"
            )
        else:
            yield dist


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def leave_out_broken_packages() -> None:
    """Let the libraries that this process imports see :func:`distributions` only."""
    metadata.distributions = distributions


def entry_points(group: str) -> list[metadata.EntryPoint]:
    """The entry points of a group, sorted; of two versions of a package only those that Python finds first."""
    found: list[metadata.EntryPoint] = []
    seen: set[str] = set()
    for dist in distributions():
        if (name := dist._normalized_name) not in seen:  # type: ignore[attr-defined]
            seen.add(name)
            found += dist.entry_points.select(group=group)
    return sorted(found, key=lambda entry_point: (entry_point.name, entry_point.value))


def name_of(dist: metadata.Distribution | None) -> str:
    """The name of a package; without one in its metadata, that of its folder."""
    with suppress(Exception):
        if dist is not None and dist.name:
            return dist.name
    return Path(getattr(dist, "_path", "")).name.partition("-")[0] or "?"


def version_of(dist: metadata.Distribution | None) -> str:
    """The version of a package, ``?`` without one."""
    with suppress(Exception):
        return (dist and dist.version) or "?"
    return "?"


def installed_version(name: str) -> str | None:
    """The version of the package of this name; None if it is not installed, ``?`` if it does not say."""
    try:
        return version_of(metadata.distribution(name))
    except metadata.PackageNotFoundError:
        return None


@contextmanager
def foreign_import(what: str) -> Iterator[None]:
    """Within the block, code of ``what`` is imported: nothing it prints reaches stdout, which may be JSON.

    It goes to stderr. The current folder and the handlers of signals stay what they are. After some seconds, a line on
    stderr says what is being waited for.
    """

    def say() -> None:
        print(
            f"still importing {what} after {SLOW_IMPORT_SECONDS:.0f} s; to do without it, press Ctrl-C and set "
            "SENTCOMPRESS_PLUGINS to the plugins to load (empty for none)",
            file=sys.stderr,
        )

    timer = threading.Timer(SLOW_IMPORT_SECONDS, say)
    timer.daemon = True
    folder = os.getcwd() if os.path.exists(".") else None
    in_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM) if in_main_thread}
    timer.start()
    try:
        with redirect_stdout(sys.stderr), _descriptor_of_stdout_redirected():
            yield
    finally:
        timer.cancel()
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        if folder is not None:
            os.chdir(folder)


@contextmanager
def _descriptor_of_stdout_redirected() -> Iterator[None]:
    """Within the block, what C code and child processes write to stdout goes to stderr as well."""
    with suppress(OSError, ValueError, AttributeError):  # a stream may be closed
        sys.__stdout__.flush()  # type: ignore[union-attr]
    try:
        kept = os.dup(1)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            os.dup2(2, 1)
        yield
    finally:
        with suppress(Exception):  # what C code still holds back
            import ctypes

            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
