"""Bits per byte and needles found with sentence memories, on the tasks that tools/peers/kvpress_rows.py runs.

    python tools/peers/memory_rows.py out/peers --memory window+recall recent_sentences=8 recall=4

Each ``--memory`` gives names joined by ``+``, and options. The memory is in effect from the first token, as while
writing, and does not know the question when it reads. With ``full_prompts=true`` the context is read under full
attention, as kvpress reads it, and everything after it token by token. Device bytes are measured when a text has been
read; then, unlike after a single call, the cache holds recalled tokens too.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from kvpress_rows import read_tasks
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from sentcompress.benchmark.memory_scoring import EVERYTHING, MemorySystem, device_bytes
from sentcompress.recipe import ComponentSpec


def row_of(model: Any, tokenizer: Any, tasks: list[dict[str, Any]], words: list[str]) -> dict[str, Any]:
    """What one memory makes of all tasks."""
    name, *settings = words
    options = {key: json.loads(value) for key, value in (setting.split("=", 1) for setting in settings)}
    spec = None if name == EVERYTHING else ComponentSpec(name=name, options=options)
    system = MemorySystem(name, model, tokenizer, spec)
    nats = size = most = 0
    found: dict[str, list[bool]] = {}
    for task in tasks:
        memory = system.cache()
        if task["kind"] == "text":
            given, asked = task["context"], task["scored"]
        else:
            given, asked = torch.cat([task["context"], task["question"]]), task["answer"]
        ids = torch.cat([given, asked])
        whole = len(task["context"]) if options.get("full_prompts") else len(ids)
        steps = [ids[:whole], *(ids[n : n + 1] for n in range(whole, len(ids)))]
        with torch.no_grad():
            logits = [
                model(step[None], past_key_values=memory, logits_to_keep=len(asked) + 1).logits[0]
                for step in steps
            ]
        predicted = torch.cat(logits)[-len(asked) - 1 : -1]
        if task["kind"] == "text":
            nats += float(F.cross_entropy(predicted.float(), asked, reduction="sum"))
            size += task["bytes"]
        else:
            kind = task["id"].partition("-")[0]
            found.setdefault(kind, []).append(bool((predicted.argmax(-1) == asked).all()))
        most = max(most, device_bytes(memory))
    row: dict[str, Any] = {
        "memory": name,
        **options,
        "most_bytes": most,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if size:
        row |= {"bits_per_byte": round(nats / math.log(2) / size, 4), "bytes": size}
    if found:
        every = [one for kind in found.values() for one in kind]
        row["found"] = f"{sum(every)} of {len(every)}"
        # A needle that full attention misses too is in the column of another row.
        row["by_kind"] = {kind: "".join("x" if one else "." for one in ones) for kind, ones in found.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="written by export_tasks.py")
    parser.add_argument("--memory", nargs="+", action="append", required=True, metavar="WORD")
    parser.add_argument("--tasks", type=Path, help="default: FOLDER/tasks.jsonl")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    disable_progress_bar()
    folder = arguments.folder / "model"
    tasks = read_tasks(arguments.tasks or arguments.folder / "tasks.jsonl")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, arguments.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for words in arguments.memory:
        print(json.dumps(row_of(model, tokenizer, tasks, words)), flush=True)


if __name__ == "__main__":
    main()
