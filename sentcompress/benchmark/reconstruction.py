"""How well latents keep held-out sentences: written free-running, and teacher-forced for contrast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sentcompress.benchmark.measurements.reconstruct import ReconstructionReport
from sentcompress.errors import DataError
from sentcompress.generation import reconstruct
from sentcompress.modeling.losses import TokenLoss
from sentcompress.modeling.vae import SentenceVAE, pad_sentences
from sentcompress.recipe import ComponentSpec
from sentcompress.registry import get_registry
from sentcompress.text.corpus import Corpus

BATCH = 64
LOGITS_ROWS = 512
EXAMPLES = 8


def spaced_sentences(corpus: Corpus, count: int) -> list[list[int]]:
    """``count`` sentences, evenly spaced over all held-out documents."""
    ranges = [corpus.document_sentences(number) for number in corpus.heldout.tolist()]
    numbers = np.concatenate([np.arange(r.start, r.stop) for r in ranges])
    if not len(numbers):
        raise DataError("there are no held-out sentences", fix="raise data.options.heldout_documents")
    chosen = numbers[np.unique(np.linspace(0, len(numbers) - 1, min(count, len(numbers))).astype(np.int64))]
    return [corpus.sentence(number).tolist() for number in chosen.tolist()]


class _Right(TokenLoss):
    """Cross-entropy that also records which targets were the most likely token."""

    def __init__(self) -> None:
        super().__init__(gamma=0.0)
        object.__setattr__(self, "right", [])

    def __call__(self, hidden_states: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        for begin in range(0, len(targets), LOGITS_ROWS):
            rows = slice(begin, begin + LOGITS_ROWS)
            best = (hidden_states[rows] @ weight.t()).argmax(-1)
            self.right.append(best == targets[rows])  # type: ignore[attr-defined]
        return super().__call__(hidden_states, weight, targets)


@torch.no_grad()
def measure_reconstruction(
    vae: SentenceVAE,
    tokenizer: Any,
    sentences: Sequence[Sequence[int]],
    *,
    system: str,
    extra_metrics: Sequence[ComponentSpec] = (),
) -> ReconstructionReport:
    """Encode sentences and decode them again; run the metric plugins on the result.

    Args:
        sentences: token ids, no special tokens.
        system: what is measured, for the table.
    """
    vae.eval()
    written = reconstruct(vae, tokenizer, sentences, batch_size=BATCH)
    device = next(vae.parameters()).device
    nats, targets, exact = 0.0, 0, 0
    for begin in range(0, len(sentences), BATCH):
        block = sentences[begin : begin + BATCH]
        right = _Right()
        output = vae(*pad_sentences(block, device, vae.config.pad_token_id), token_loss=right)
        nats += float(output.nll.double().sum())
        targets += int(output.targets.sum())
        flags = torch.cat(right.right).cpu().split([len(ids) + 1 for ids in block])  # type: ignore[attr-defined]
        exact += sum(bool(sentence.all()) for sentence in flags)
    pairs = [(r.reference_ids, r.hypothesis_ids) for r in written]
    tokens_right = sum(a == b for one, two in pairs for a, b in zip(one, two, strict=False))
    tokens = sum(len(reference) for reference, _ in pairs)
    extra: dict[str, float] = {}
    for number, spec in enumerate(extra_metrics):
        options = get_registry().options(
            "metric", spec.name, spec.options, f"bench.extra_metrics.{number}.options"
        )
        metric: Any = get_registry().get("metric", spec.name)(options)
        extra |= {f"{spec.name}.{name}": float(value) for name, value in metric.compute(written).items()}
    return ReconstructionReport(
        system=system,
        sentences=len(sentences),
        tokens=tokens,
        token_accuracy=tokens_right / tokens,
        exact_sentences=sum(one == two for one, two in pairs) / len(pairs),
        teacher_forced_perplexity=math.exp(min(nats / targets, 700.0)),
        teacher_forced_exact=exact / len(sentences),
        extra=extra,
        examples=[
            (r.reference, r.hypothesis) for r in written[:: max(1, len(written) // EXAMPLES)][:EXAMPLES]
        ],
    )
