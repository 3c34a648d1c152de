"""Writes the model folder and the task file that tools/peers/kvpress_rows.py reads where sentcompress is not installed.

    python tools/peers/export_tasks.py smollm2-135m out/peers

Each text begins with the start token, and comes from held-out documents: of the package corpus, or of the files that
``--data`` names. A text to score is the first ``--length`` tokens of a document, of which the last ``--scored``
are scored. Needles are those of the ``recall`` measurement.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sentcompress.benchmark.needles import Task, encode_task, heldout_texts, make_tasks
from sentcompress.cli.train import data_section
from sentcompress.modeling.llm_loading import load_backbone_tokenizer, load_causal_lm
from sentcompress.recipe import BackboneSpec
from sentcompress.registry import get_registry
from sentcompress.text.corpus import build_corpus
from sentcompress.text.lossless_tokenizer import LosslessTokenizer, lossless


def text_task(number: int, ids: list[int], scored: int, tokenizer: LosslessTokenizer) -> dict[str, Any]:
    """A text of which the last tokens are scored."""
    context, scored_ids = ids[:-scored], ids[-scored:]
    size = len(tokenizer.to_bytes(scored_ids))
    return {"kind": "text", "id": f"text-{number}", "context": context, "scored": scored_ids, "bytes": size}


def needle_task(number: int, task: Task, tokenizer: LosslessTokenizer, start: int) -> dict[str, Any]:
    """A needle task with one needle, in tokens."""
    encoded = encode_task(task, tokenizer, start)
    (answer,) = encoded.answers
    question = answer.start - len(tokenizer.encode(task.questions[0], begins=False))
    return {
        "kind": "needle",
        "id": f"{task.kind}-{number}",
        "context": encoded.ids[:question],
        "question": encoded.ids[question : answer.start],
        "answer": encoded.ids[answer],
        "depth": task.needles[0].depth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="what --backbone takes")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", metavar="PATH", help="files of text, as sentcompress takes them")
    parser.add_argument("--length", type=int, default=4000, help="tokens of a text")
    parser.add_argument("--scored", type=int, default=512, help="tokens scored at its end")
    parser.add_argument("--documents", type=int, default=4, help="documents to score")
    parser.add_argument("--needles", type=int, default=8, help="tasks of each kind")
    parser.add_argument("--kinds", nargs="+", default=["number", "fact"])
    arguments = parser.parse_args()
    spec = BackboneSpec(model=arguments.model)
    saved, model = load_backbone_tokenizer(spec), load_causal_lm(spec)
    tokenizer = lossless(saved)
    registry = get_registry()
    data = data_section(arguments.data) if arguments.data else {"name": "python-package", "options": {}}
    dataset = registry.create("dataset", data["name"], {"heldout_documents": 20, **data["options"]})
    corpus = build_corpus(dataset, registry.create("segmenter", "regex", {}), saved)
    start = model.config.bos_token_id
    documents = [tokenizer.encode(corpus.document_text(document)) for document in corpus.heldout.tolist()]
    long_enough = [[start, *ids[: arguments.length - 1]] for ids in documents if len(ids) >= arguments.length]
    tasks = [
        text_task(number, ids, arguments.scored, tokenizer)
        for number, ids in enumerate(long_enough[: arguments.documents])
    ]
    planted = make_tasks(
        heldout_texts(corpus),
        tokenizer,
        lengths=[arguments.length],
        tasks=arguments.needles,
        kinds=arguments.kinds,
    )
    tasks += [needle_task(number, task, tokenizer, start) for number, task in enumerate(planted)]
    folder = arguments.out / "model"
    model.save_pretrained(folder)
    # KVzip takes a chat template's tokens for the beginning of every context. These contexts have none.
    saved.chat_template = None
    saved.save_pretrained(folder)
    lines = "".join(json.dumps(task) + "\n" for task in tasks)
    (arguments.out / "tasks.jsonl").write_text(lines, encoding="utf-8")
    print(f"{len(tasks)} tasks written to {arguments.out}")


if __name__ == "__main__":
    main()
