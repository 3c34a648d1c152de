"""Writes what ``bench scaling-law`` found."""

from __future__ import annotations

from pathlib import Path

from sentcompress.files import storage_errors, write_atomically
from sentcompress.studies.scaling_law import ScalingLaw
from sentcompress.studies.scaling_plots import draw
from sentcompress.studies.scaling_tables import markdown

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
