"""Writes what ``bench scaling-law`` found."""

from __future__ import annotations

from pathlib import Path

from sentcompress.benchmark.scaling.law import ScalingLaw
from sentcompress.benchmark.scaling.plots import draw
from sentcompress.benchmark.scaling.tables import markdown
from sentcompress.io import storage_errors, write_atomically

NAME = "scaling-law"


def write(law: ScalingLaw, folder: Path) -> Path:
    """Write ``scaling-law.json``, ``.md`` and ``.png`` into a folder, which is made; return the page's path.

    Raises:
        InputError: matplotlib is not installed.
        StorageError: a file cannot be written.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    draw(law, folder / f"{NAME}.png")
    page = folder / f"{NAME}.md"
    write_atomically(page, markdown(law, f"{NAME}.png"))
    write_atomically(folder / f"{NAME}.json", law.model_dump_json(indent=1) + "\n")
    return page
