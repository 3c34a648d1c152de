"""Memory, time, cost and need of the published set-up, recipe by recipe: the two tables in docs/scaling.md.

python tools/scaling_table.py 4xA100 --price 1.5
python tools/scaling_table.py 4x4090 sllm-1.3b-h1
"""

from __future__ import annotations

import argparse

from sentcompress.estimate.training_memory import Stage
from sentcompress.estimate.training_time import fastest, parse_devices, ways
from sentcompress.recipe import load_recipe, shipped_recipes
from sentcompress.table import as_markdown

SENTENCE_TOKENS = 15.0
COLUMNS = (
    "recipe",
    "parameters",
    "ddp",
    "ddp, checkpointing",
    "fsdp",
    "fsdp, checkpointing",
    "hours",
    "cost",
    "needed",
)
PARTS = ("weights", "gradients", "optimizer", "activations", "logits")


def rows(name: str, devices: str, price: float) -> tuple[list[str], list[str]]:
    """GiB on each device of each way, hours and cost of the fastest that fits; and that way's parts."""
    recipe = load_recipe(f"paper/{name}")
    stage: Stage = "vae" if name.startswith("vae") else "graft"
    number, machine = parse_devices(devices)
    sizes, possible = ways(recipe, stage, machine, number, SENTENCE_TOKENS)
    peaks = {way.footprint.name.replace("gradient_", ""): f"{way.total / 2**30:.1f}" for way in possible}
    best = fastest(possible)
    total = [
        f"`{name}`",
        f"{sizes.weights / 1e6:,.0f} M",
        *(peaks.get(column, "-") for column in COLUMNS[2:6]),
        f"{best.hours:,.1f}" if best else "-",
        f"{best.hours * number * price:,.1f}" if best else "-",
        best.footprint.name if best else "more devices",
    ]
    shown = best or possible[-1]
    parts = [f"{getattr(shown.footprint, part) / 2**30:.2f}" for part in PARTS]
    return total, [f"`{name}`", shown.footprint.name, *parts, f"{shown.total / 2**30:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("devices")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--price", type=float, default=1.5, help="of a device for an hour")
    asked = parser.parse_args()
    names = asked.names or [n.removeprefix("paper/") for n in shipped_recipes() if n.startswith("paper/")]
    found = [rows(name, asked.devices, asked.price) for name in names]
    print("\n".join(as_markdown(COLUMNS, [total for total, _ in found])))
    print()
    print("\n".join(as_markdown(("recipe", "way", *PARTS, "peak"), [parts for _, parts in found])))


if __name__ == "__main__":
    main()
