"""pytest plugin, loaded wherever sentcompress is installed; it imports next to nothing until it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def check_plugin() -> Callable[..., None]:
    """``check_plugin(kind, name, options=None, **settings)``: fail with one sentence when a plugin is wrong."""
    from sentcompress.errors import SentCompressError
    from sentcompress.testing.failures import CheckFailed
    from sentcompress.testing.plugins import check_plugin as check

    def run(kind: str, name: str, options: dict[str, Any] | None = None, **settings: Any) -> None:
        __tracebackhide__ = True
        try:
            check(kind, name, options, **settings)
        except (CheckFailed, SentCompressError) as error:
            failure = str(error)
        else:
            return
        pytest.fail(failure, pytrace=False)

    return run
