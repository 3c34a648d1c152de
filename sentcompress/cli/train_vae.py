"""``sentcompress train-vae``: the first stage."""

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


def train_vae(
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
    """Train a SentenceVAE: sentences to latents and back. Writes OUT/vae."""
    resolved = resolve(recipe, set_, backbone=backbone, revision=revision, data=data)
    execute(resolved, out, stages=["vae"], resume=resume, overwrite=overwrite, dry_run=dry_run)


def add_to(app: typer.Typer) -> None:
    app.command(
        "train-vae",
        epilog=examples(
            "sentcompress train-vae",
            "sentcompress train-vae --data 'corpus/*.jsonl' --out out/mine",
            "sentcompress train-vae paper/vae-768-h1 --backbone opt-125m --dry-run",
        ),
    )(train_vae)
