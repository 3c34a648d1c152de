"""``sentcompress bench speed``, ``memory`` and ``sweep``: of a trained model, or of random weights in its shapes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sentcompress.cli.bench_common import ResultsOption, measure, show
from sentcompress.cli.common import BackboneOption, SetOption, console, examples
from sentcompress.cli.options import FieldCommand, recipe_options

if TYPE_CHECKING:
    from sentcompress.recipe import Recipe

OptionalFolder = Annotated[
    Path | None,
    typer.Argument(metavar="[DIR]", help="Folder of a run or model; not needed with --init random."),
]
InitOption = Annotated[
    Literal["random"] | None,
    typer.Option(help="Measure random weights in the shapes of --backbone: no training, no download."),
]
RecipeOption = Annotated[
    str, typer.Option(metavar="RECIPE", help="Recipe to take text and shapes from, without DIR.")
]
LargestBatchOption = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help="Also time each system at the largest batch whose cache fits into so much, such as 4GiB; else the "
        "recipe's bench.largest_batch.",
    ),
]


def add_to(bench: typer.Typer) -> None:
    bench.command(
        "speed",
        cls=FieldCommand,
        epilog=examples(
            "sentcompress bench speed out/quickstart",
            "sentcompress bench speed --backbone opt-125m --init random --out out/speed-125m",
            "sentcompress bench speed out/quickstart --profile --quantize decoder,encoder",
            "sentcompress bench speed out/quickstart --largest-batch 1GiB --set bench.prompt_tokens=300",
            "sentcompress bench speed --backbone opt-1.3b --init random --device cuda --dtype bf16 --compile",
            "sentcompress bench speed out/quickstart --set 'bench.batch_sizes=[1,4,16]'",
        ),
    )(speed)
    bench.command(
        "memory",
        cls=FieldCommand,
        epilog=examples(
            "sentcompress bench memory out/quickstart",
            "sentcompress bench memory --backbone opt-1.3b --init random --out out/memory-1.3b",
        ),
    )(memory)
    bench.command(
        "sweep",
        epilog=examples(
            "sentcompress bench sweep out/quickstart",
            "sentcompress bench sweep --backbone opt-125m --init random --batch-sizes 1,16 --sentence-tokens 5,15,30",
        ),
    )(sweep)


@recipe_options(
    device="bench.device",
    dtype="bench.dtype",
    head="bench.head",
    quantize="bench.quantize",
    compile="bench.compile",
    profile="bench.profile",
)
def speed(
    folder: OptionalFolder = None,
    backbone: BackboneOption = None,
    init: InitOption = None,
    recipe: RecipeOption = "strong",
    largest_batch: LargestBatchOption = None,
    out: ResultsOption = None,
    set_: SetOption = None,
) -> None:
    """Tokens/s, time to first token and break-even beside the backbone's own generate."""
    chosen = []
    if largest_batch is not None:
        size = _bytes("--largest-batch", largest_batch)
        chosen = ["bench.largest_batch=true", f"bench.memory_budget_bytes={size}"]
    _measure_shapes("speed", folder, backbone, init, recipe, out, [*chosen, *(set_ or [])])


@recipe_options(device="bench.device", dtype="bench.dtype")
def memory(
    folder: OptionalFolder = None,
    backbone: BackboneOption = None,
    init: InitOption = None,
    recipe: RecipeOption = "strong",
    out: ResultsOption = None,
    set_: SetOption = None,
) -> None:
    """Cache bytes a token, slope of allocated memory, longest text in a budget."""
    _measure_shapes("memory", folder, backbone, init, recipe, out, set_)


def sweep(
    folder: OptionalFolder = None,
    backbone: BackboneOption = None,
    init: InitOption = None,
    recipe: RecipeOption = "strong",
    batch_sizes: Annotated[str, typer.Option(metavar="N,N", help="Texts written together.")] = "1,8",
    prompt_tokens: Annotated[str, typer.Option(metavar="N,N", help="Tokens of the prompts.")] = "32,128",
    sentence_tokens: Annotated[
        str, typer.Option(metavar="N,N", help="Tokens of each sentence.")
    ] = "2,8,16,32",
    out: ResultsOption = None,
    set_: SetOption = None,
) -> None:
    """Find the break-even: speed over batch size, prompt length and sentence length.

    Names what to take instead where the sentence model is slower. New tokens and repeats are the recipe's
    bench.new_tokens and bench.repeats.
    """
    from sentcompress.benchmark.break_even import sweep_speed, sweep_table, write_sweep
    from sentcompress.benchmark.models import Folder, Parts
    from sentcompress.benchmark.timing import speed_models
    from sentcompress.table import as_rich

    sizes = _numbers("--batch-sizes", batch_sizes)
    overrides = [*(set_ or []), f"bench.batch_sizes={sizes}"]
    if folder is not None:
        _only_folder(backbone, init)
        place = Folder(folder)
        target = out or folder / "bench"
        parts = Parts(place.recipe(overrides), place, target)
    else:
        asked = _random_recipe(recipe, backbone, init, overrides)
        target = out or _bench_folder(asked.backbone.model)
        parts = Parts(asked, None, target)
    timed = speed_models(parts)
    found = sweep_speed(
        timed.model,
        timed.backbone,
        sentences=timed.sentences,
        settings=parts.recipe.bench,
        bos_token_id=timed.bos_token_id,
        prompt_tokens=_numbers("--prompt-tokens", prompt_tokens),
        sentence_tokens=_numbers("--sentence-tokens", sentence_tokens),
    )
    console().print(as_rich(sweep_table(found)))
    typer.echo(f"figures: {write_sweep(found, target)}")


def _bytes(option: str, text: str) -> int:
    """A number of bytes, with or without a unit. Raises InputError."""
    from sentcompress.errors import InputError

    units = {"": 1, "B": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in units or not float(found[1]):
        raise InputError(f"{option}: '{text}' is no size", fix="write it like 4GiB, 500MB or 4294967296")
    return int(float(found[1]) * units[found[2].upper()])


def _numbers(option: str, text: str) -> list[int]:
    from sentcompress.errors import InputError

    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise InputError(f"{option}: '{text}' is no list of numbers", fix="write them like 1,8,32")
    return numbers


def _measure_shapes(
    part: str,
    folder: Path | None,
    backbone: str | None,
    init: str | None,
    recipe: str,
    out: Path | None,
    overrides: list[str] | None,
) -> None:
    """Measure a trained model, or random weights where there is none."""
    if folder is not None:
        _only_folder(backbone, init)
        measure([part], folder, out, overrides)
        return
    from sentcompress.benchmark.runner import run_bench

    resolved = _random_recipe(recipe, backbone, init, overrides)
    target = out or _bench_folder(resolved.backbone.model)
    show(run_bench([part], None, resolved, target), target, [part])


def _only_folder(backbone: str | None, init: str | None) -> None:
    from sentcompress.errors import InputError

    if backbone is not None or init is not None:
        raise InputError("give either DIR, or --backbone with --init random", fix="leave one of them out")


def _random_recipe(
    recipe: str, backbone: str | None, init: str | None, overrides: list[str] | None
) -> Recipe:
    from sentcompress.cli.experiment import resolve
    from sentcompress.errors import InputError

    if init is None:
        raise InputError(
            "no folder of a model was given", fix="give DIR, or add --init random to measure random weights"
        )
    return resolve(recipe, [*(overrides or []), "backbone.init=random"], backbone=backbone)


def _bench_folder(model: str) -> Path:
    return Path("out") / f"bench-{Path(model).name}"
