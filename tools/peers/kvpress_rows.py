"""Bits per byte and needles found with kvpress's policies, at given cache sizes. Prints one JSON row for each.

Runs in an environment with kvpress and without sentcompress (``nox -s peers``)::

    python tools/peers/kvpress_rows.py FOLDER/model FOLDER/tasks.jsonl --tokens 600 1000

``tools/peers/export_tasks.py`` writes both. The task file has one JSON object a line. Texts are token ids, so that
every program reads the same::

    {"kind": "text", "id": "", "context": [], "scored": [], "bytes": 0}
    {"kind": "needle", "id": "", "context": [], "question": [], "answer": [], "depth": 0.0}

``--tokens`` is the most that the cache may hold, the tokens being read included. A context is read in one of two ways:

``after``       Whole, under full attention, then compressed once: what kvpress is made for. Until then the cache is as
                large as that of full attention.
``throughout``  In blocks of ``--block`` tokens; DecodingPress compresses after each block. The cache never holds more
                than ``--tokens``. This is also what happens to text that the model writes itself.

Scored text is read in blocks of ``--block`` tokens. DecodingPress compresses after each block where the policy can. A
needle is found if greedy decoding writes exactly its answer. ``found``: the policy had not seen the question when it
compressed. ``found_asked``: the question was part of what was compressed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

PARTS = {"text": ("context", "scored", "bytes"), "needle": ("context", "question", "answer", "depth")}
Key = tuple[str, int, str]


def read_tasks(path: Path) -> list[dict[str, Any]]:
    """The tasks in a file. Texts become tensors of token ids.

    Raises:
        ValueError: a line is not a task. The message names the line.
    """
    tasks = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            task = json.loads(line)
            task |= {"id": task["id"]} | {name: task[name] for name in PARTS[task["kind"]]}
            texts = {name: torch.tensor(part) for name, part in task.items() if isinstance(part, list)}
            assert all(len(ids) and ids.dtype == torch.int64 for ids in texts.values()), (
                "a text has no token ids"
            )
        except KeyError as error:
            raise ValueError(f"{path}, line {number}: {error} is missing or not a kind of task") from error
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        tasks.append(task | texts)
    if not tasks:
        raise ValueError(f"{path}: no tasks")
    return tasks


class Peers:
    """The policies at all sizes, on one model, and what was counted for each."""

    def __init__(self, model: Any, names: list[str], sizes: list[int], block: int) -> None:
        from kvpress_caches import policies

        self.model, self.block, self.full = model, block, "full" in names
        self.policies = {(name, size): policies()[name] for name in names if name != "full" for size in sizes}
        self.counts: dict[Key, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def readings(self, context: torch.Tensor, how: str) -> Iterator[tuple[Key, Any]]:
        """The cache of each policy after it read the context."""
        from kvpress_caches import Reading, compress_apart, compress_together

        # Room for the next block.
        targets = {key: key[1] - self.block for key in self.policies}
        writing = {key: policy.while_writing for key, policy in self.policies.items()}
        if how == "throughout":
            for key, policy in self.policies.items():
                if policy.throughout:
                    reading = Reading(self.model, writing[key](), targets[key])
                    reading.read(context, self.block, logits=False)
                    yield (*key, how), reading
            return
        shared = {key: policy.after_reading for key, policy in self.policies.items() if not policy.own_pass}
        whole, compressed = compress_together(self.model, context, shared, targets)
        if self.full:
            yield ("full", 0, how), Reading(self.model, None, 0, whole, len(context))
        for key, policy in self.policies.items():
            if policy.own_pass:
                compressed[key] = compress_apart(self.model, context, policy.after_reading(), targets[key])
            press = writing[key] and writing[key]()
            yield (*key, how), Reading(self.model, press, targets[key], compressed.pop(key), len(context))

    def run(self, task: dict[str, Any], how: str, questions: list[str]) -> None:
        """Count one task for all policies."""
        context = task["context"]
        if task["kind"] == "text":
            for key, reading in self.readings(context[:-1], how):
                logits = reading.read(torch.cat([context[-1:], task["scored"][:-1]]), self.block)
                nats = float(F.cross_entropy(logits, task["scored"], reduction="sum"))
                self.count(key, reading, nats=nats, bytes=task["bytes"])
            return
        question, answer = task["question"], task["answer"]
        asked = torch.cat([context, question])
        ways = {"unseen": ("found", context, question), "seen": ("found_asked", asked[:-1], asked[-1:])}
        for found, before, rest in map(ways.__getitem__, questions):
            for key, reading in self.readings(before, how):
                reading.press = None  # question and answer fit in the room that is left
                best = reading.read(torch.cat([rest, answer[:-1]]), self.block)[-len(answer) :].argmax(-1)
                hit = bool((best == answer).all())
                self.count(key, reading, **{found: hit, f"needles_{found}": 1})

    def count(self, key: Key, reading: Any, **figures: float) -> None:
        counts = self.counts[key]
        for name, value in figures.items():
            counts[name] += value
        counts["most"] = max(counts["most"], reading.most)

    def rows(self) -> Iterator[dict[str, Any]]:
        config = self.model.config
        pair = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        for (name, size, how), counts in self.counts.items():
            row: dict[str, Any] = {"policy": name, "kvpress": version("kvpress"), "read": how, "tokens": size}
            row["dtype"] = str(self.model.dtype).removeprefix("torch.")
            row["most_tokens"] = round(counts["most"])
            row["most_bytes"] = round(counts["most"] * pair * self.model.dtype.itemsize)
            if counts["bytes"]:
                bits = counts["nats"] / math.log(2) / counts["bytes"]
                row |= {"bits_per_byte": round(bits, 4), "bytes": round(counts["bytes"])}
            for found in ("found", "found_asked"):
                if counts[f"needles_{found}"]:
                    row[found] = f"{counts[found]:.0f} of {counts[f'needles_{found}']:.0f}"
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder written by save_pretrained")
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[600, 1000], help="cache sizes")
    parser.add_argument("--policies", nargs="+", help="default: all, and full attention ('full')")
    parser.add_argument("--read", nargs="+", choices=["after", "throughout"], default=["after", "throughout"])
    ways = ["unseen", "seen"]
    parser.add_argument("--question", nargs="+", choices=ways, default=ways, help="when compressing")
    parser.add_argument("--block", type=int, default=64, help="tokens read at once")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    try:
        tasks = read_tasks(arguments.tasks)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if min(arguments.tokens) < 3 * arguments.block:
        parser.error(f"--tokens: at least three blocks of {arguments.block}")
    from kvpress_caches import policies
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    names = arguments.policies or ["full", *policies()]
    if unknown := set(names) - {"full", *policies()}:
        parser.error(f"--policies: {', '.join(sorted(unknown))} is not one of full, {', '.join(policies())}")
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    peers = Peers(model.eval(), names, arguments.tokens, arguments.block)
    for how in arguments.read:
        for task in tasks:
            start = time.perf_counter()
            with torch.no_grad():
                peers.run(task, how, arguments.question)
            print(f"{how} {task['id']}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    for row in peers.rows():
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
