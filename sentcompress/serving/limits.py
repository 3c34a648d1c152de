"""Limits of the server, each an option of ``sentcompress serve``. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sentcompress.errors import InputError
from sentcompress.registry import describe_validation_error

KEY_VARIABLE = "SENTCOMPRESS_API_KEY"
"""Environment variable with the API key."""
SHORTEST_KEY = 16
"""Characters of an API key, at least."""


class ServeLimits(BaseModel):
    """What the server takes on, and for how long."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    max_batch: int = Field(default=32, ge=1)
    """Texts that are written at the same time; further ones wait."""
    max_waiting: int = Field(default=64, ge=0)
    """Texts that may wait; one more is refused with status 429."""
    max_prompt_tokens: int = Field(default=8192, ge=1)
    """Longest prompt in tokens."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """Most tokens of one answer; also the limit of a chat request that names none."""
    max_choices: int = Field(default=16, ge=1)
    """Most texts of one request: its prompts times its n."""
    max_body_bytes: int = Field(default=2**20, ge=1)
    """Longest body of a request in bytes."""
    max_connections: int = Field(default=256, ge=1)
    """Connections at a time; further ones are refused with status 503."""
    body_seconds: float = Field(default=10, gt=0, allow_inf_nan=False)
    """Time for a request's headers to arrive, then for its body, and for a client that stops reading its answer."""
    request_seconds: float = Field(default=600, gt=0, allow_inf_nan=False)
    """Longest time for one request, from its arrival to its last token."""
    drain_seconds: float = Field(default=30, ge=0, allow_inf_nan=False)
    """After SIGTERM: time for running requests to end; new ones are refused with status 503."""
    prompt_cache_bytes: int = Field(default=2**28, ge=0)
    """Bytes of caches kept for later prompts with the same beginning, which is then not read again."""

    @classmethod
    def checked(cls, values: Mapping[str, Any]) -> ServeLimits:
        """Limits as a user gave them. Raises InputError, which names the option."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise InputError(describe_validation_error(error, cls, "")) from None


def read_api_key(file: Path | None) -> str | None:
    """The API key from a file or the environment; None if there is none.

    Raises:
        InputError: the file cannot be read, or the key is too short or not ASCII.
    """
    key, where = os.environ.get(KEY_VARIABLE), f"the environment variable {KEY_VARIABLE}"
    if file is not None:
        where = str(file)
        try:
            key = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise InputError(f"--api-key-file: {file}: {reason}", fix="give a file with the key") from None
    if key is None:
        return None
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(
            f"{where}: an API key has at least {SHORTEST_KEY} printable ASCII characters and no spaces",
            fix='make one: python -c "import secrets; print(secrets.token_urlsafe())" > key.txt',
        )
    return key
