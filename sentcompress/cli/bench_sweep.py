"""``sentcompress bench sweep``: speed over batch size, prompt length and sentence length."""

from __future__ import annotations

from typing import Annotated

import typer

from sentcompress.cli.bench_common import (
    InitOption,
    OptionalFolder,
    RecipeOption,
    ResultsOption,
    random_folder,
    random_recipe,
    require_only_folder,
)
from sentcompress.cli.common import BackboneOption, SetOption, console, examples


def add_to(bench: typer.Typer) -> None:
    bench.command(
        "sweep",
        epilog=examples(
            "sentcompress bench sweep out/quickstart",
            "sentcompress bench sweep --backbone opt-125m --init random --batch-sizes 1,16 --sentence-tokens 5,15,30",
        ),
    )(sweep)


def sweep(
    folder: OptionalFolder = None,
    backbone: BackboneOption = None,
    init: InitOption = None,
    recipe: RecipeOption = "strong",
    batch_sizes: Annotated[str, typer.Option(metavar="N,N", help="Batch sizes.")] = "1,8",
    prompt_tokens: Annotated[str, typer.Option(metavar="N,N", help="Tokens per prompt.")] = "32,128",
    sentence_tokens: Annotated[str, typer.Option(metavar="N,N", help="Tokens per sentence.")] = "2,8,16,32",
    out: ResultsOption = None,
    set_: SetOption = None,
) -> None:
    """Find the break-even by batch size, prompt length and sentence length.

    Says what to use instead where the sentence model is slower. The recipe's bench.new_tokens and bench.repeats set the
    number of new tokens and of repeats.
    """
    from sentcompress.benchmark.break_even import sweep_speed, sweep_table, write_sweep
    from sentcompress.benchmark.models import ModelFolder, Models
    from sentcompress.benchmark.timing import speed_models
    from sentcompress.table import as_rich

    sizes = _numbers("--batch-sizes", batch_sizes)
    overrides = [*(set_ or []), f"bench.batch_sizes={sizes}"]
    if folder is not None:
        require_only_folder(backbone, init)
        run = ModelFolder(folder)
        target = out or folder / "bench"
        models = Models(run.recipe(overrides), run, target)
    else:
        resolved = random_recipe(recipe, backbone, init, overrides)
        target = out or random_folder(resolved)
        models = Models(resolved, None, target)
    timed = speed_models(models)
    found = sweep_speed(
        timed.model,
        timed.backbone,
        sentences=timed.sentences,
        settings=models.recipe.bench,
        bos_token_id=timed.bos_token_id,
        prompt_tokens=_numbers("--prompt-tokens", prompt_tokens),
        sentence_tokens=_numbers("--sentence-tokens", sentence_tokens),
    )
    console().print(as_rich(sweep_table(found)))
    typer.echo(f"figures: {write_sweep(found, target)}")


def _numbers(option: str, text: str) -> list[int]:
    from sentcompress.errors import InputError

    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise InputError(f"{option}: '{text}' is not a list of numbers", fix="write them like 1,8,32")
    return numbers
