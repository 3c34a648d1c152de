"""The honesty line: which code, on which machine, with which recipe."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from sentcompress import __version__
from sentcompress.benchmark.results import Honesty
from sentcompress.recipe import Recipe

PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


def commit(folder: Path | None = None) -> str:
    """Commit of this package's own repository, ``+dirty`` when tracked files differ; ``unknown`` elsewhere.

    A package that lies in someone else's repository (a virtual environment, say) is not a checkout of ours.
    """
    package = Path(__file__).resolve().parent.parent
    folder = folder or package

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # fails unless the repository tracks the package
        head = git("rev-parse", "HEAD")
        return f"{head[:12]}+dirty" if git("status", "--porcelain", "-uno") else head[:12]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def command() -> str:
    """The command line of this process, as one would type it."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return shlex.join(["python", "-m", program.parent.name, *sys.argv[1:]])
    start = ["python", str(program)] if program.suffix == ".py" else [program.name]
    return shlex.join([*start, *sys.argv[1:]])


def packages() -> dict[str, str]:
    """Versions of Python, ours and what we compute with."""
    found = {"python": platform.python_version(), "sentcompress": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def device_name(device: Any) -> str:
    """``cpu (AMD EPYC ...)`` or the GPU's name."""
    import torch

    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{device.type} ({name})"


class Provenance:
    """What the rows of one benchmark have in common.

    Args:
        recipe: of the run.
        device: torch device the models are on.
        dtype: of their weights, as text.
        mean_sentence_tokens: of the held-out text, once known.
    """

    def __init__(
        self, recipe: Recipe, device: Any, dtype: str, mean_sentence_tokens: float | None = None
    ) -> None:
        import torch

        self._common: dict[str, Any] = {
            "command": command(),
            "commit": commit(),
            "recipe": recipe.name,
            "recipe_digest": recipe.digest(),
            "device": device_name(device),
            "dtype": dtype,
            "threads": torch.get_num_threads(),
            "seed": recipe.seed,
            "packages": packages(),
        }
        self.mean_sentence_tokens = mean_sentence_tokens

    def honesty(self, training_tokens: int | None) -> Honesty:
        return Honesty(
            **self._common, training_tokens=training_tokens, mean_sentence_tokens=self.mean_sentence_tokens
        )
