"""How long `sentcompress generate` takes from the shell until its first sentence is there, and what of it is imports.

    python tools/measure/first_sentence.py out/strong/graft --repeats 5

The command and the imports alone are processes of their own, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

PROMPT = "The state of the Union is"
IMPORTS = "import torch, transformers.modeling_utils"


def until_written(command: list[str], length: int) -> float:
    """Seconds until a command has written more than ``length`` bytes, or ends."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        while length >= 0 and (piece := process.stdout.read(4096)):
            length -= len(piece)
        took = time.perf_counter() - began
        process.stdout.read()
    if process.returncode:
        sys.exit(process.returncode)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="of a SentenceLM")
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    python = [sys.executable, "-c"]
    commands = {
        "the first sentence": (
            [
                sys.executable,
                "-m",
                "sentcompress",
                "generate",
                asked.folder,
                PROMPT,
                "--max-new-sentences",
                "1",
            ],
            len(PROMPT),
        ),
        "torch and transformers imported": ([*python, f"{IMPORTS}; print('done', flush=True)"], 0),
        "torch imported": ([*python, "import torch; print('done', flush=True)"], 0),
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(asked.repeats):
        for name, (command, length) in commands.items():
            times[name].append(until_written(command, length))
    for name, seconds in times.items():
        print(f"{name}: {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")


if __name__ == "__main__":
    main()
