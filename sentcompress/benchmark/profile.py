"""Where the time per token goes: encoder, backbone, decoder blocks, output head, sampling, and everything else."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from sentcompress.benchmark.measurements.speed import PartTime
from sentcompress.benchmark.timing import Prompt, SentenceSystem, System, TokenSystem
from sentcompress.generation.compiled import CompiledStep
from sentcompress.generation.sentence_writer import Sampler

ENCODER, BACKBONE, DECODER = "encoder", "backbone blocks", "decoder blocks"
HEAD, SAMPLING, REST = "output head", "sampling", "everything else (Python, bookkeeping)"
PARTS = (ENCODER, BACKBONE, DECODER, HEAD, SAMPLING, REST)


class TimedMethod(NamedTuple):
    """A method to time.

    Attributes:
        owner: the object or class that has it.
        name: of the method.
        part: what its time is counted as, one of :data:`PARTS`.
    """

    owner: Any
    name: str
    part: str


class Stopwatch:
    """Seconds spent in methods; a timed method called inside another counts for itself only."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._nested: list[float] = []

    @contextmanager
    def timing(self, methods: Sequence[TimedMethod]) -> Iterator[None]:
        """Wrap the methods with a clock, and restore them afterwards."""
        before = [
            (
                method.owner,
                method.name,
                method.name in vars(method.owner),
                vars(method.owner).get(method.name),
            )
            for method in methods
        ]
        for owner, name, part in methods:
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
            self._nested.append(0.0)
            began = self._now()
            try:
                return call(*args, **kwargs)
            finally:
                took = self._now() - began
                self.seconds[part] += took - self._nested.pop()
                if self._nested:
                    self._nested[-1] += took

        return timed

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def total(self, call: Callable[[], Any]) -> float:
        """Seconds of a call; time outside the timed methods counts as :data:`REST`."""
        counted = sum(self.seconds.values())
        began = self._now()
        call()
        took = self._now() - began
        self.seconds[REST] += took - (sum(self.seconds.values()) - counted)
        return took


def profile(system: System, prompts: Sequence[Prompt], new_tokens: int, repeats: int) -> list[PartTime]:
    """Time the parts of writing ``new_tokens`` after each prompt, prefill included; medians over the repeats."""
    methods = _timed_methods(system)
    watch = Stopwatch(next(system.model.parameters()).device)
    runs: list[dict[str, float]] = []
    for _ in range(repeats):
        watch.seconds.clear()
        with watch.timing(methods):
            watch.total(lambda: system.write(prompts, new_tokens))
        runs.append(dict(watch.seconds))
    timed_parts = {method.part for method in methods} | {REST}
    medians = {part: statistics.median(run.get(part, 0.0) for run in runs) for part in timed_parts}
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
        if part in timed_parts
    ]


def _timed_methods(system: System) -> list[TimedMethod]:
    if isinstance(system, SentenceSystem):
        model = system.model
        decoder = model.vae.decoder
        return [
            TimedMethod(model, "encode", ENCODER),
            TimedMethod(model, "backbone_states", BACKBONE),
            *(
                TimedMethod(decoder, name, DECODER)
                for name in ("read", "allocate", "restart", "step", "retire")
                if hasattr(decoder, name)
            ),
            *(TimedMethod(system.head, name, HEAD) for name in ("candidates", "argmax", "logits")),
            TimedMethod(CompiledStep, "step", DECODER),
            TimedMethod(Sampler, "pick", SAMPLING),
        ]
    assert isinstance(system, TokenSystem)
    return [
        # Some models bypass the module that wraps their decoder.
        TimedMethod(system.model.get_decoder(), "forward", BACKBONE),
        TimedMethod(system.model.get_output_embeddings(), "forward", HEAD),
    ]
