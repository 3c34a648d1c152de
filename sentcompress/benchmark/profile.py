"""Where a token's time goes: encoder, backbone, decoder blocks, output head, sampling, and everything else."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sentcompress.benchmark.records import PartTime
from sentcompress.benchmark.systems import Prompt, SentenceSystem, System, TokenSystem
from sentcompress.generation.compiled import CompiledStep
from sentcompress.generation.sentence_writer import Sampler

ENCODER, BACKBONE, DECODER = "encoder", "backbone blocks", "decoder blocks"
HEAD, SAMPLING, REST = "output head", "sampling", "everything else (Python, bookkeeping)"
PARTS = (ENCODER, BACKBONE, DECODER, HEAD, SAMPLING, REST)

Place = tuple[Any, str, str]
"""An object or class, the name of its method, and the part it belongs to."""


class Stopwatch:
    """Seconds spent in methods, each without those called inside it that are watched too."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    @contextmanager
    def watching(self, places: Sequence[Place]) -> Iterator[None]:
        """Put a clock around methods; they are put back as they were."""
        before = [(owner, name, name in vars(owner), vars(owner).get(name)) for owner, name, _ in places]
        for owner, name, part in places:
            setattr(owner, name, self._timed(getattr(owner, name), part))
        try:
            yield
        finally:
            for owner, name, own, value in reversed(before):
                if own:
                    setattr(owner, name, value)
                else:
                    delattr(owner, name)

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            began = self._now()
            try:
                return call(*args, **kwargs)
            finally:
                took = self._now() - began
                self.seconds[part] += took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        return timed

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def total(self, call: Callable[[], Any]) -> float:
        """Seconds of a call; what is in none of the parts counts as the rest."""
        known = sum(self.seconds.values())
        began = self._now()
        call()
        took = self._now() - began
        self.seconds[REST] += took - (sum(self.seconds.values()) - known)
        return took


def profile(system: System, prompts: Sequence[Prompt], new_tokens: int, repeats: int) -> list[PartTime]:
    """Time the parts of writing ``new_tokens`` after each prompt, the prefill included; medians over the repeats."""
    places = _places(system)
    watch = Stopwatch(next(system.model.parameters()).device)
    runs: list[dict[str, float]] = []
    for _ in range(repeats):
        watch.seconds.clear()
        with watch.watching(places):
            watch.total(lambda: system.write(prompts, new_tokens))
        runs.append(dict(watch.seconds))
    known = {part for _, _, part in places} | {REST}
    medians = {part: statistics.median(run.get(part, 0.0) for run in runs) for part in known}
    total = sum(medians.values())
    return [
        PartTime(
            system=system.name,
            batch_size=len(prompts),
            part=part,
            milliseconds_per_token=1000 * medians[part] / (len(prompts) * new_tokens),
            share=medians[part] / total,
        )
        for part in PARTS
        if part in known
    ]


def _places(system: System) -> list[Place]:
    if isinstance(system, SentenceSystem):
        model = system.model
        decoder = model.vae.decoder
        return [
            (model, "encode", ENCODER),
            (model, "backbone_states", BACKBONE),
            *(
                (decoder, name, DECODER)
                for name in ("read", "allocate", "restart", "step", "retire")
                if hasattr(decoder, name)
            ),
            *((system.head, name, HEAD) for name in ("words", "argmax", "logits")),
            (CompiledStep, "step", DECODER),
            (Sampler, "pick", SAMPLING),
        ]
    assert isinstance(system, TokenSystem)
    return [
        # Some models call their decoder past the module that wraps it.
        (system.model.get_decoder(), "forward", BACKBONE),
        (system.model.get_output_embeddings(), "forward", HEAD),
    ]
