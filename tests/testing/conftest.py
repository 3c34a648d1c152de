"""A folder of third-party packages, which the registry of the process finds while a test runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sentcompress.registry import get_registry


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Path]]:
    """``install(package, code)``: a distribution of version 1.2 with one plugin module; returns its folder."""
    monkeypatch.delenv("SENTCOMPRESS_PLUGINS", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = []

    def put(package: str, code: str) -> Path:
        module = package.replace("-", "_")
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(code, encoding="utf-8")
        info = tmp_path / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[sentcompress]\n{module} = {module}\n")
        get_registry.cache_clear()
        return tmp_path

    get_registry.cache_clear()
    yield put
    get_registry.cache_clear()
    for module in modules:
        sys.modules.pop(module, None)
