"""Output speed of several processes: every process of the run writes a batch of its own, at the same time.

What a number of processes bring is measured beside what the first brings alone, in turns, in one run. On a CPU a
process has the threads that ``sentcompress launch`` or torchrun gave it, when it is alone too.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from accelerate.utils import gather_object

from sentcompress.benchmark.measurements.speed import quiet, require_positions
from sentcompress.benchmark.records import Throughput
from sentcompress.benchmark.speed_models import SpeedModels
from sentcompress.benchmark.systems import Prompt, System, both_systems, make_prompts, seconds
from sentcompress.distributed import processes
from sentcompress.errors import RunError
from sentcompress.recipe import BenchSettings


def measure_throughput(
    timed: SpeedModels, sentence_lengths: Sequence[int], settings: BenchSettings
) -> list[Throughput]:
    """Time both systems on 1, 2, 4, ... and all processes, each at the largest of ``batch_sizes``.

    All processes must ask for it, and get the same figures.

    Raises:
        InputError: prompt and new tokens do not fit in the backbone's positions.
        RunError: a system wrote more or fewer tokens than it was asked for.
    """
    require_positions(timed.backbone, settings.prompt_tokens, settings.new_tokens)
    batch, ranks = max(settings.batch_sizes), processes()
    all_prompts = make_prompts(timed.sentences, settings.prompt_tokens, batch * ranks.num_processes)
    prompts = all_prompts[ranks.process_index :: ranks.num_processes]
    systems = both_systems(timed.model, timed.backbone, sentence_lengths, settings, timed.bos_token_id)
    with quiet():
        return by_processes(systems, prompts, settings.new_tokens, settings.repeats)


def by_processes(
    systems: Sequence[System], prompts: Sequence[Prompt], new_tokens: int, repeats: int
) -> list[Throughput]:
    """The figures, from ``prompts`` that are each process's own; one more repeat warms up.

    Raises:
        RunError: a system wrote more or fewer tokens than it was asked for, in whichever process.
    """
    ranks = processes()
    counts = [2**n for n in range(ranks.num_processes.bit_length()) if 2**n < ranks.num_processes]
    counts.append(ranks.num_processes)
    rates: dict[tuple[str, int], list[float]] = {(s.name, n): [] for s in systems for n in counts}
    for repeat in range(repeats + 1):
        for system in systems:
            for count in counts:
                took = _together(system, prompts, new_tokens, count)
                if repeat:  # the first is to warm up
                    rates[system.name, count].append(count * len(prompts) * new_tokens / took)
    return [
        Throughput(
            system=name,
            processes=count,
            batch_size=len(prompts),
            rates=found,
            tokens_per_second=statistics.median(found),
            efficiency=statistics.median(
                rate / (count * alone) for rate, alone in zip(found, rates[name, 1], strict=True)
            ),
        )
        for (name, count), found in rates.items()
    ]


def _together(system: System, prompts: Sequence[Prompt], new_tokens: int, count: int) -> float:
    """Seconds until the last of the first ``count`` processes has written, from when all began."""
    ranks = processes()
    ranks.wait_for_everyone()
    took, written = 0.0, new_tokens

    def write(asked: System) -> None:
        nonlocal written
        written = asked.write(prompts, new_tokens)

    if ranks.process_index < count:
        took = seconds(system, write)
    found = gather_object([(took, written)])
    if any(tokens != new_tokens for _, tokens in found):  # in every process, so that none waits for another
        wrote = ", ".join(str(tokens) for _, tokens in found)
        raise RunError(f"bench: '{system.name}' wrote {wrote} tokens by process instead of {new_tokens}")
    return max(seconds for seconds, _ in found)
