"""``sentcompress graft``: the second stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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


def graft(
    recipe: RecipeArgument = "quickstart",
    backbone: BackboneOption = None,
    revision: RevisionOption = None,
    vae: Annotated[
        Path | None, typer.Option(help="Folder of a trained SentenceVAE.", show_default="OUT/vae")
    ] = None,
    data: DataOption = None,
    out: OutOption = None,
    set_: SetOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Graft a SentenceVAE onto an LLM and fine-tune both. Writes OUT/graft."""
    resolved = resolve(recipe, set_, backbone=backbone, revision=revision, data=data, vae=vae)
    execute(resolved, out, stages=["graft"], resume=resume, overwrite=overwrite, dry_run=dry_run)


def add_to(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            "sentcompress graft --out out/quickstart",
            "sentcompress graft --backbone opt-1.3b --vae out/paper-vae-2048-h1/vae --set graft.tune=lora",
            "sentcompress graft paper/sllm-125m-h1 --vae out/paper-vae-768-h1/vae --dry-run",
        )
    )(graft)
