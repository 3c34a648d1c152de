"""``sentcompress estimate``: what would it bring, on which device?"""

from __future__ import annotations

from typing import Annotated

import typer

from sentcompress.cli.common import BackboneOption, RecipeArgument, SetOption, console, examples
from sentcompress.cli.experiment import resolve


def estimate(
    recipe: RecipeArgument,
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE", help="cpu (measured now, in seconds), h100, a100 or 4090 (data sheets)."
        ),
    ] = "cpu",
    backbone: BackboneOption = None,
    sentence_tokens: Annotated[
        float, typer.Option(min=1.0, help="Mean tokens of a sentence; 'bench data' measures yours.")
    ] = 15.0,
    set_: SetOption = None,
) -> None:
    """Predict speed, memory and training time of a recipe beside its token-level twin, from shapes alone.

    Loads no data and no weights. Batch sizes, prompt and new tokens are the recipe's bench settings.
    """
    from sentcompress.benchmark.devices import device as find
    from sentcompress.benchmark.estimate import estimate as predict
    from sentcompress.benchmark.estimate import shapes, table
    from sentcompress.benchmark.tables import as_rich
    from sentcompress.errors import InputError
    from sentcompress.training.plan import budget

    resolved = resolve(recipe, set_, backbone=backbone)
    if resolved.pretrain is not None:
        raise InputError(f"recipe '{recipe}' trains an LLM from nothing: there is no twin to compare with")
    model, twin = shapes(resolved)
    machine = find(device)
    bench = resolved.bench
    estimates = [
        predict(
            model,
            twin,
            machine,
            batch_size=size,
            prompt_tokens=bench.prompt_tokens,
            new_tokens=bench.new_tokens,
            sentence_tokens=sentence_tokens,
        )
        for size in bench.batch_sizes
    ]
    console().print(as_rich(table(estimates, machine, sentence_tokens, budget(resolved)["graft"])))


def add_to(app: typer.Typer) -> None:
    app.command(
        "estimate",
        epilog=examples(
            "sentcompress estimate strong",
            "sentcompress estimate strong --backbone opt-1.3b --device a100",
            "sentcompress estimate quickstart --sentence-tokens 20 --set 'bench.batch_sizes=[1,64]'",
        ),
    )(estimate)
