"""Memory, time, cost and need of the published set-up, recipe by recipe: the two tables in docs/scaling.md.

python tools/docs/scaling_table.py 4xA100 --price 1.5
python tools/docs/scaling_table.py 4x4090 sllm-1.3b-h1
"""

from __future__ import annotations

import argparse

from sentcompress.estimate.training_memory import StageName
from sentcompress.estimate.training_time import fastest, parse_devices, training_modes
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
    """GiB on each device in each mode, hours and cost of the fastest that fits; and that mode's memory by part."""
    recipe = load_recipe(f"paper/{name}")
    stage: StageName = "vae" if name.startswith("vae") else "graft"
    number, machine = parse_devices(devices)
    sizes, modes = training_modes(recipe, stage, machine, number, SENTENCE_TOKENS)
    peaks = {mode.name.replace("gradient_", ""): f"{mode.total / 2**30:.1f}" for mode in modes}
    best = fastest(modes)
    total = [
        f"`{name}`",
        f"{sizes.weights / 1e6:,.0f} M",
        *(peaks.get(column, "-") for column in COLUMNS[2:6]),
        f"{best.hours:,.1f}" if best else "-",
        f"{best.hours * number * price:,.1f}" if best else "-",
        best.name if best else "more devices",
    ]
    shown = best or modes[-1]
    parts = [f"{getattr(shown.memory, part) / 2**30:.2f}" for part in PARTS]
    return total, [f"`{name}`", shown.name, *parts, f"{shown.total / 2**30:.1f}"]


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
    print("\n".join(as_markdown(("recipe", "mode", *PARTS, "peak"), [parts for _, parts in found])))


if __name__ == "__main__":
    main()
