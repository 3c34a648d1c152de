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
            metavar="DEVICE",
            help="cpu (measured now, in seconds), h100, a100, a100-40 or 4090 (data sheets).",
        ),
    ] = "cpu",
    backbone: BackboneOption = None,
    sentence_tokens: Annotated[
        float,
        typer.Option(min=1.0, max=1e6, help="Mean tokens of a sentence; 'bench data' measures yours."),
    ] = 15.0,
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="NxDEVICE",
            help="How to train on these, such as 4xA100 or 1xcpu: memory of each by part, time, what fits.",
        ),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(min=0.0, max=1e6, help="Of one device for an hour, for the cost of training."),
    ] = None,
    set_: SetOption = None,
) -> None:
    """Predict speed, memory and training time of a recipe beside its token-level twin, from shapes alone.

    Loads no data and no weights. Batch sizes, prompt and new tokens are the recipe's bench settings. With --devices:
    the memory that each device needs to train each stage, whether DDP, FSDP or gradient checkpointing is needed, and
    the hours of all stages together.
    """
    from sentcompress.errors import InputError
    from sentcompress.estimate.decoding import estimate as predict
    from sentcompress.estimate.decoding import shapes, table
    from sentcompress.estimate.devices import device as find
    from sentcompress.estimate.plan import budget
    from sentcompress.table import as_rich

    resolved = resolve(recipe, set_, backbone=backbone)
    if resolved.pretrain is not None and devices is not None:
        raise InputError(
            f"--devices is for training a SentenceVAE, a graft and its twin; recipe '{recipe}' trains an LLM from "
            "nothing",
            fix="give a recipe that grafts it; 'sentcompress run RECIPE --dry-run' counts the tokens of this one",
        )
    if resolved.pretrain is not None:
        raise InputError(f"recipe '{recipe}' trains an LLM from nothing: there is no twin to compare with")
    if price is not None and devices is None:
        raise InputError("--price: of which devices?", fix="add --devices, such as 4xA100")
    if devices is not None:
        from sentcompress.estimate.training_time import parse_devices, tables

        for plain in tables(resolved, *parse_devices(devices), sentence_tokens, price):
            console().print(as_rich(plain))
        return
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
            "sentcompress estimate paper/sllm-1.3b-h1 --devices 4xA100 --price 1.5",
            "sentcompress estimate quickstart --sentence-tokens 20 --set 'bench.batch_sizes=[1,64]'",
        ),
    )(estimate)
