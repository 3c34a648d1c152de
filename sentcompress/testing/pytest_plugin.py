"""The pytest plugin. pytest loads it wherever sentcompress is installed, so it imports almost nothing at first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def check_plugin() -> Callable[..., None]:
    """``check_plugin(kind, name, options=None, **settings)``: fail with one sentence if the plugin is wrong."""
    from sentcompress.errors import SentCompressError
    from sentcompress.testing.checks import CheckFailed
    from sentcompress.testing.checks import check_plugin as check

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
