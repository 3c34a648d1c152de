"""``sentcompress baseline``: the token-level twin."""

from __future__ import annotations

import typer

from sentcompress.cli.common import (
    BackboneOption,
    DataOption,
    DryRunOption,
    OutOption,
    OverwriteOption,
    RecipeArgument,
    ResumeOption,
    RevisionOption,
    SetOption,
    examples,
)
from sentcompress.cli.experiment import execute, resolve


def baseline(
    recipe: RecipeArgument = "quickstart",
    backbone: BackboneOption = None,
    revision: RevisionOption = None,
    data: DataOption = None,
    out: OutOption = None,
    set_: SetOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Fine-tune the LLM token by token, for comparison. Writes OUT/baseline.

    It reads the graft's passages for as many steps: equal data.
    """
    resolved = resolve(recipe, set_, backbone=backbone, revision=revision, data=data)
    execute(resolved, out, stages=["baseline"], resume=resume, overwrite=overwrite, dry_run=dry_run)


def add_to(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            "sentcompress baseline --out out/quickstart",
            "sentcompress baseline paper/sllm-125m-h1 --data corpus.jsonl --set baseline.learning_rate=1e-5",
        )
    )(baseline)
