"""Peak memory of training, predicted (``estimate --devices 1xcpu``) and measured here, on a machine without a GPU.

    python tools/measure/training_memory.py quickstart reconstruction strong smollm2-sentence-model
    python tools/measure/training_memory.py strong --set "backbone.config={hidden_size: 512, word_embed_proj_dim: 512}"

Each stage that learns is a process of its own, of a few steps; what the system says it had at most is compared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

from sentcompress.estimate.training_memory import StageName
from sentcompress.estimate.training_time import parse_devices, training_modes
from sentcompress.recipe import Recipe, load_recipe
from sentcompress.training.inputs import load_inputs

STEPS = 6
COMMANDS: tuple[tuple[StageName, str, str], ...] = (
    ("vae", "train-vae", "train_vae"),
    ("graft", "graft", "graft"),
)


def measured(command: str, recipe: Path, out: Path) -> int:
    """Bytes that a training command had in memory at most.

    Read while it runs: in what the system says of a process that has ended, the peak of this one is included.
    """
    line = [sys.executable, "-m", "sentcompress", command, str(recipe), "--out", str(out)]
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        with suppress(OSError):  # it ends just now
            status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = next((int(x.split()[1]) * 1024 for x in status if x.startswith("VmHWM")), peak)
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(line)} ended with {process.returncode}")
    return peak


def predicted(recipe: Recipe, stage: StageName, tokens: float) -> float:
    """Bytes; called in a process of its own, as those of the process itself count.

    Args:
        tokens: mean length of a sentence.
    """
    number, cpu = parse_devices("1xcpu")
    _, (plain, *others) = training_modes(recipe, stage, cpu, number, tokens)
    settings = recipe.graft if stage == "graft" else recipe.train_vae
    return (others[0] if settings.gradient_checkpointing else plain).total


def short(name: str, sets: list[str], section: str) -> Recipe:
    return load_recipe(name, [*sets, f"{section}.steps={STEPS}", f"{section}.precision=fp32"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    asked = parser.parse_args()
    for name in asked.recipes:
        corpus = load_inputs(load_recipe(name, asked.set)).corpus
        tokens = len(corpus.tokens) / corpus.num_sentences
        with tempfile.TemporaryDirectory() as folder:
            for stage, command, section in COMMANDS:
                learns = getattr(load_recipe(name, asked.set), section).steps > 0
                recipe = short(name, asked.set, section) if learns else load_recipe(name, asked.set)
                path = Path(folder) / f"{stage}.yaml"
                path.write_text(recipe.dump())
                peak = measured(command, path, Path(folder) / "out")
                if not learns:
                    continue
                with ProcessPoolExecutor(1, get_context("spawn")) as alone:
                    expected = alone.submit(predicted, recipe, stage, tokens).result()
                print(
                    f"{name} {stage}: {peak / 2**30:.2f} GiB measured, {expected / 2**30:.2f} predicted "
                    f"({expected / peak - 1:+.1%})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
