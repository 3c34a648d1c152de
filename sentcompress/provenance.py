"""Provenance of a result: which code, on which machine, with which recipe."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sentcompress import __version__
from sentcompress.errors import SentCompressError
from sentcompress.packages import installed_version
from sentcompress.recipe import Recipe
from sentcompress.registry import get_registry

PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


class Record(BaseModel):
    """Base of the parts of a result."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Honesty(Record):
    """What has to stand beside a figure for it to mean something."""

    command: str
    """Command line that measured it."""
    commit: str
    """Commit of this package; ``+dirty`` when files differed from it, ``unknown`` outside a checkout."""
    recipe: str
    """Name of the recipe."""
    recipe_digest: str
    """Changes with any field of the recipe."""
    device: str
    dtype: str
    threads: int
    seed: int
    training_tokens: int | None
    """Tokens the model was trained on in this run; None when that is not known."""
    mean_sentence_tokens: float | None
    """Mean length of the held-out sentences."""
    packages: dict[str, str]
    """Versions of Python and the packages that matter."""

    def line(self) -> str:
        """One line of text."""
        trained = "unknown" if self.training_tokens is None else f"{self.training_tokens:,}"
        mean = "unknown" if self.mean_sentence_tokens is None else f"{self.mean_sentence_tokens:.1f}"
        versions = ", ".join(f"{name} {version}" for name, version in self.packages.items())
        return (
            f"{self.command} | commit {self.commit} | recipe {self.recipe} {self.recipe_digest} | "
            f"{self.device}, {self.dtype}, {self.threads} threads | seed {self.seed} | "
            f"training tokens in this run {trained} | sentences of {mean} tokens | {versions}"
        )


@cache
def commit(folder: Path | None = None) -> str:
    """Commit of this package's own repository, ``+dirty`` when its tracked files differ; ``unknown`` elsewhere.

    A package that lies in someone else's repository (a virtual environment, say) is not a checkout of sentcompress.
    """
    package = Path(__file__).resolve().parent
    folder = folder or package

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # fails unless the repository tracks the package
        head = git("rev-parse", "HEAD")
        return f"{head[:12]}+dirty" if git("status", "--porcelain", "-uno", "--", ".") else head[:12]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def command(argv: Sequence[str] | None = None) -> str:
    """The command line of this process (or ``argv``), as one would type it."""
    # A path that is not UTF-8 is recorded with escapes: JSON cannot hold it.
    given = [a.encode("utf-8", "backslashreplace").decode() for a in (sys.argv if argv is None else argv)]
    program, *arguments = given
    path = Path(program)
    if path.name == "__main__.py":
        return shlex.join(["python", "-m", path.parent.name, *arguments])
    # A console script is found by its name; a script of one's own needs its path.
    start = ["python", program] if path.suffix == ".py" else [path.name]
    return shlex.join([*start, *arguments])


def plugin_packages(recipe: Recipe) -> dict[str, str]:
    """Versions of the packages a recipe's components come from, ours left out.

    What is missing or claimed twice is left to those who need it: not every benchmark does.
    """
    from sentcompress.modeling.llm_loading import adapter_name

    registry, backbone = get_registry(), recipe.backbone.name
    with suppress(SentCompressError):  # nothing can be found out about a hub's model without a network
        backbone = adapter_name(recipe.backbone)
    components = [
        ("segmenter", recipe.segmenter.name),
        ("fusion", recipe.fusion.name),
        ("backbone", backbone),
        ("dataset", recipe.data.name),
        *(("metric", metric.name) for metric in recipe.bench.extra_metrics),
        *(("memory", name.strip()) for name in (recipe.memory.name.split("+") if recipe.memory else ())),
    ]
    claims = [registry.claims(kind, name) for kind, name in components if name]
    owners = [claim[0].plugin for claim in claims if len(claim) == 1]
    return {owner.package: owner.version for owner in owners if owner.package != "sentcompress"}


def packages() -> dict[str, str]:
    """Versions of Python, ours and what we compute with."""
    found = {"python": platform.python_version(), "sentcompress": __version__}
    return found | {name: installed_version(name) or "missing" for name in PACKAGES}


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
            "packages": packages() | plugin_packages(recipe),
        }
        self.mean_sentence_tokens = mean_sentence_tokens

    def honesty(self, training_tokens: int | None) -> Honesty:
        return Honesty(
            **self._common, training_tokens=training_tokens, mean_sentence_tokens=self.mean_sentence_tokens
        )
