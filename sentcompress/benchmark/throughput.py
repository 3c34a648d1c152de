"""Output speed of several devices: every process of the run writes a batch of its own, at the same time.

What a number of processes bring is measured beside what the first brings alone, in turns, in one run. On a CPU a
process has the threads that ``sentcompress launch`` or torchrun gave it, when it is alone too.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from accelerate.utils import gather_object

from sentcompress.benchmark.records import Throughput
from sentcompress.benchmark.speed import quiet, require_positions
from sentcompress.benchmark.speed_models import SpeedModels
from sentcompress.benchmark.systems import Prompt, System, both_systems, make_prompts, seconds
from sentcompress.processes import processes
from sentcompress.recipe import BenchSettings


def measure_throughput(
    timed: SpeedModels, sentence_lengths: Sequence[int], settings: BenchSettings
) -> list[Throughput]:
    """Time both systems on 1, 2, 4, ... and all processes, each at the largest of ``batch_sizes``.

    All processes must ask for it, and get the same figures.

    Raises:
        InputError: prompt and new tokens do not fit in the backbone's positions.
    """
    require_positions(timed.backbone, settings.prompt_tokens, settings.new_tokens)
    prompts = make_prompts(timed.sentences, settings.prompt_tokens, max(settings.batch_sizes))
    systems = both_systems(timed.model, timed.backbone, sentence_lengths, settings, timed.bos_token_id)
    with quiet():
        return _by_devices(systems, prompts, settings.new_tokens, settings.repeats)


def _by_devices(
    systems: Sequence[System], prompts: Sequence[Prompt], new_tokens: int, repeats: int
) -> list[Throughput]:
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
            devices=count,
            batch_size=len(prompts),
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
    took = 0.0
    if ranks.process_index < count:
        took = seconds(system, lambda s: s.write(prompts, new_tokens))
    return max(gather_object([took]))
