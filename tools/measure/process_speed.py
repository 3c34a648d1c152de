"""Training throughput by number of processes, and how much of the ideal that is.

    python tools/measure/process_speed.py strong --processes 1 2

Each process has the same micro-batch and one thread (on GPUs, one GPU); the graft of a recipe is trained for some steps
under ``sentcompress launch``, with ``ddp`` and with ``fsdp``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from sentcompress.training.monitor import read_metrics


def rate(recipe: str, processes: int, distributed: str, steps: int, sets: list[str]) -> float:
    """Real tokens/s of all processes together."""
    chosen = [
        *sets,
        "train_vae.steps=0",
        f"graft.steps={steps}",
        f"graft.distributed={distributed}",
        "graft.gradient_accumulation=1",
        "graft.log_every=1",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for command in ("train-vae", "graft"):
            launch = ["launch", "-n", str(processes)] if command == "graft" else []
            line = [sys.executable, "-m", "sentcompress", *launch, command, recipe, "--out", folder]
            line += [part for choice in chosen for part in ("--set", choice)]
            done = subprocess.run(
                line, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(done.stderr)
        lines = read_metrics(Path(folder) / "graft" / "metrics.jsonl")
    return statistics.median(line["tokens_per_second"] for line in lines[2:] if "tokens_per_second" in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    asked = parser.parse_args()
    for distributed in ("ddp", "fsdp"):
        first = 0.0
        for processes in asked.processes:
            found = rate(asked.recipe, processes, distributed, asked.steps, asked.set)
            first = first or found / processes
            share = found / first / processes
            print(
                f"{distributed}, {processes} process(es): {found:,.0f} tokens/s, {share:.0%} of the ideal",
                flush=True,
            )


if __name__ == "__main__":
    main()
