"""Memory, time and need of the published set-up, recipe by recipe: the table in docs/scaling.md.

python tools/scaling_table.py 4xA100
python tools/scaling_table.py 4x4090 sllm-1.3b-h1
"""

from __future__ import annotations

import argparse

from sentcompress.benchmark.tables import as_markdown
from sentcompress.recipe import load_recipe, shipped_recipes
from sentcompress.training.footprint import Stage
from sentcompress.training.scaling import parse_devices, ways

SENTENCE_TOKENS = 15.0
COLUMNS = (
    "recipe",
    "parameters",
    "ddp",
    "ddp, checkpointing",
    "fsdp",
    "fsdp, checkpointing",
    "hours",
    "needed",
)


def row(name: str, devices: str) -> list[str]:
    """GiB on each device of each way, hours of the fastest that fits."""
    recipe = load_recipe(f"paper/{name}")
    stage: Stage = "vae" if name.startswith("vae") else "graft"
    number, machine = parse_devices(devices)
    sizes, possible = ways(recipe, stage, machine, number, SENTENCE_TOKENS)
    peaks = {way.footprint.name.replace("gradient_", ""): f"{way.total / 2**30:.1f}" for way in possible}
    fits = [way for way in possible if way.fits]
    return [
        f"`{name}`",
        f"{sizes.weights / 1e6:,.0f} M",
        *(peaks.get(column, "-") for column in COLUMNS[2:6]),
        f"{fits[0].hours:,.1f}" if fits else "-",
        fits[0].footprint.name if fits else "more devices",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("devices")
    parser.add_argument("names", nargs="*")
    asked = parser.parse_args()
    names = asked.names or [n.removeprefix("paper/") for n in shipped_recipes() if n.startswith("paper/")]
    print("\n".join(as_markdown(COLUMNS, [row(name, asked.devices) for name in names])))


if __name__ == "__main__":
    main()
