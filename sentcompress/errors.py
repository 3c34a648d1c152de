"""Every error that a user can cause, each with the exit code of the command line.

The message says what is wrong and where; ``fix`` says what to do about it. Both are shown without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SentCompressError(Exception):
    """Base of all errors that users see. Exit code 1: the run failed."""

    exit_code = 1

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message


class RunError(SentCompressError):
    """A run that had started could not continue."""


class TerminatedError(RunError):
    """The run was stopped by SIGTERM and saved first. Exit code 75: start it again and it continues."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class NumericsError(RunError):
    """A loss or gradient became NaN or infinite."""


class OutOfMemoryError(RunError):
    """The device or the machine has too little memory for the settings."""


class StorageError(RunError):
    """A file could not be written or read: disk full, no permission, device gone."""


class CausalityError(RunError):
    """A model sees the future, so its quality figures would mean nothing."""


class CoverageError(RunError):
    """A scorer could not prove that it scored every byte of the text exactly once."""


class InputError(SentCompressError):
    """Bad usage, a bad recipe or bad input. Exit code 2."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe is invalid."""


class DataError(InputError):
    """A corpus cannot be read as requested."""


class ModelFolderError(InputError):
    """A folder does not contain the requested model, or the model is damaged."""


class OfflineError(InputError):
    """Something is needed from the hub, but the hub cannot be reached."""


class PluginError(SentCompressError):
    """A requested plugin is missing or broken. Exit code 3."""

    exit_code = 3


_OUT_OF_MEMORY_TEXTS = ("out of memory", "not enough memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch or a device had too little memory."""
    # By name, since isinstance would need torch, whose import takes seconds.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(known in text for known in _OUT_OF_MEMORY_TEXTS)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
