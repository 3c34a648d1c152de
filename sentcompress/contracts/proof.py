"""Proof, on random input, that a backbone adapter behaves as the rest of the package expects.

It takes only a few short forward passes, so every backbone is checked when it is wrapped, whoever wrote its adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sentcompress.contracts.backbone import Backbone
from sentcompress.contracts.causal_lm import position_limit
from sentcompress.errors import is_out_of_memory

MAX_POSITIONS = 8
"""Positions of the random input, if the LLM has as many."""
TOLERANCE = 1e-5
"""Largest difference allowed between equal states, relative to the largest state (at least 1)."""


_FAILURES = {
    "structure": "its modules are not laid out as in other LLMs",
    "equivalence": "its forward does not accept embeddings with a four-dimensional mask",
}
"""What it means if a check raises an exception."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: ``structure``, ``equivalence``, ``causality``, ``mask``, ``positions``, ``padding`` or ``cache``.
        delta: largest difference found; infinite if the forward failed.
        allowed: largest difference allowed.
        problem: what is wrong, a sentence; empty if the check passed.
        cause: what was raised, if the check failed by an exception.
    """

    name: str
    delta: float
    allowed: float
    problem: str = ""
    cause: Exception | None = None

    @property
    def passed(self) -> bool:
        return not self.problem


@dataclass(frozen=True)
class Reference:
    """The states of the library's own forward for random tokens, computed before an adapter changes the LLM.

    Attributes:
        input_ids: ``[2, positions]``.
        hidden_states: ``[2, positions, width of the head]``.
        leak: how much earlier states change when later tokens change.
    """

    input_ids: Tensor
    hidden_states: Tensor
    leak: float


@torch.no_grad()
def reference_of(causal_lm: Any, seed: int = 0) -> Reference:
    """Run a transformers causal LM on random tokens.

    Raises:
        ValueError: its forward fails, whatever it raises.
    """
    generator = torch.Generator().manual_seed(seed)
    try:
        table = causal_lm.get_input_embeddings().weight
        vocab = int(table.shape[0])
        positions = min(MAX_POSITIONS, position_limit(causal_lm.config))
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise ValueError(f"its token embeddings cannot be found: {_short(error)}") from error
    cut = _cut(positions)
    ids = torch.randint(0, vocab, (2, positions), generator=generator)
    changed = torch.cat([ids[:, :cut], (ids[:, cut:] + 1) % vocab], 1)
    device = table.device
    states = []
    was_training = causal_lm.training
    causal_lm.eval()
    try:
        for given in (ids, changed):
            output = causal_lm.base_model(
                input_ids=given.to(device), attention_mask=torch.ones_like(given).to(device), use_cache=False
            )
            if "last_hidden_state" not in output:
                raise ValueError("its decoder cannot be taken from under its output head")
            states.append(output.last_hidden_state)
    except Exception as error:  # models raise anything
        if is_out_of_memory(error):
            raise
        raise ValueError(f"its own forward failed: {_short(error)}") from error
    finally:
        causal_lm.train(was_training)
    leak = float((states[0] - states[1])[:, :cut].abs().max())
    return Reference(ids.to(device), states[0], leak)


@torch.no_grad()
def prove_backbone(backbone: Backbone, reference: Reference) -> list[Finding]:
    """Compare an adapter with the library's own forward, and with itself in all the ways it is used.

    Args:
        backbone: in fp32, with its token embeddings.
        reference: of the same LLM.
    """
    # Module by module: a new wrapper is in training mode, whatever the mode of the LLM inside it.
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        return list(_Proof(backbone, reference).findings())
    finally:
        for module, training in modes:
            module.training = training


class _Proof:
    def __init__(self, backbone: Backbone, reference: Reference) -> None:
        self.backbone, self.reference = backbone, reference
        self.device = reference.input_ids.device
        self.length = reference.input_ids.shape[1]
        self.cut = _cut(self.length)
        self.scale = max(1.0, float(reference.hidden_states.abs().max()))
        self.allowed = TOLERANCE * self.scale
        self.causal = torch.ones(self.length, self.length, dtype=torch.bool, device=self.device).tril()
        self.positions = torch.arange(self.length, device=self.device)

    def findings(self) -> Iterator[Finding]:
        first = self._try("equivalence", self.equivalence)
        yield first
        if first.delta == float("inf"):
            return  # the forward fails, so all other checks would fail the same way
        for name, check in (
            ("structure", self.structure),
            ("causality", self.causality),
            ("mask", self.mask),
            ("positions", self.packing),
            ("padding", self.padding),
            ("cache", self.cache),
        ):
            yield self._try(name, check)

    def _try(self, name: str, check: Callable[[], tuple[float, float, str]]) -> Finding:
        try:
            delta, allowed, problem = check()
        except Exception as error:  # models and plugins raise anything
            if is_out_of_memory(error):
                raise
            what = _FAILURES.get(name, f"its forward failed in the check of its {name}")
            return Finding(name, float("inf"), self.allowed, f"{what}: {_short(error)}", error)
        return Finding(name, delta, allowed, problem if not delta <= allowed else "")

    def _run(self, embeddings: Tensor, allowed: Tensor, positions: Tensor, **more: Any) -> tuple[Tensor, Any]:
        rows = len(embeddings)
        return self.backbone(
            embeddings,
            allowed.expand(rows, 1, *allowed.shape[-2:]),
            positions.expand(rows, -1),
            **more,
        )

    def _states(self, embeddings: Tensor | None = None) -> Tensor:
        return self._run(self.embeddings if embeddings is None else embeddings, self.causal, self.positions)[
            0
        ]

    def structure(self) -> tuple[float, float, str]:
        """What the rest of the package asks an adapter for."""
        backbone = self.backbone
        sizes = {
            "hidden_size": backbone.hidden_size,
            "num_heads": backbone.num_heads,
            "max_positions": backbone.max_positions,
            "num_hidden_layers": backbone.config.num_hidden_layers,
            "vocab_size": backbone.config.vocab_size,
        }
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                return float("inf"), 0.0, f"its {name} is {size!r}, but a number of at least 1 is needed"
        if not len(backbone.blocks):
            return float("inf"), 0.0, "it has no blocks"
        width = self.embeddings.shape[-1]
        problem = f"its token embeddings have width {width}, but its hidden_size is {backbone.hidden_size}"
        return abs(width - backbone.hidden_size), 0.0, problem

    def equivalence(self) -> tuple[float, float, str]:
        self.embeddings = self.backbone.token_embeddings(self.reference.input_ids)
        if self.reference.leak > self.allowed:
            return (
                self.reference.leak,
                self.allowed,
                "the LLM itself is not causal: its states depend on later tokens",
            )
        states = self.backbone.project_out(self._states())
        if states.shape != self.reference.hidden_states.shape:
            given, expected = tuple(states.shape), tuple(self.reference.hidden_states.shape)
            return float("inf"), self.allowed, f"it returns states of shape {given} instead of {expected}"
        return (
            largest_difference(states, self.reference.hidden_states),
            self.allowed,
            "given token embeddings instead of latents, it does not return the library's own hidden states",
        )

    def causality(self) -> tuple[float, float, str]:
        """Also checks that there is attention at all: earlier positions must have an effect."""
        before = self._states()
        changed = torch.cat([self.embeddings[:, : self.cut], self.embeddings[:, self.cut :].flip(1) * 2], 1)
        leak = largest_difference(before[:, : self.cut], self._states(changed)[:, : self.cut])
        first = torch.cat([self.embeddings[:, :1] * 2 + 1, self.embeddings[:, 1:]], 1)
        if largest_difference(before[:, -1], self._states(first)[:, -1]) == 0:
            return float("inf"), 0.0, "earlier positions have no effect on later ones"
        return leak, 1e-6 * self.scale, "later positions change earlier states: it leaks the future"

    def _packed(self, embeddings: Tensor) -> Tensor:
        """Run two packed passages, separated by the mask, each with positions from 0."""
        passage = (self.positions >= self.cut).long()
        allowed = self.causal & (passage[:, None] == passage[None, :])
        return self._run(embeddings, allowed, self.positions - self.cut * passage)[0]

    def mask(self) -> tuple[float, float, str]:
        changed = torch.cat([self.embeddings[:, : self.cut].flip(1) * 2, self.embeddings[:, self.cut :]], 1)
        delta = largest_difference(
            self._packed(self.embeddings)[:, self.cut :], self._packed(changed)[:, self.cut :]
        )
        return (
            delta,
            1e-6 * self.scale,
            "it does not honour the mask: a packed document attends to the one before it",
        )

    def packing(self) -> tuple[float, float, str]:
        rest = self.embeddings[:, self.cut :]
        number = self.length - self.cut
        alone = self._run(rest, self.causal[:number, :number], self.positions[:number])[0]
        problem = (
            "it does not honour positions: a document packed after another gives other states than on its own"
        )
        return largest_difference(self._packed(self.embeddings)[:, self.cut :], alone), self.allowed, problem

    def padding(self) -> tuple[float, float, str]:
        pad = 3
        embeddings = torch.cat([self.embeddings[:, :pad] * 3, self.embeddings], 1)
        columns = torch.arange(self.length + pad, device=self.device)
        real = columns >= pad
        allowed = (columns[:, None] >= columns[None, :]) & real[None, :] & real[:, None]
        allowed |= columns[:, None] == columns[None, :]
        states = self._run(embeddings, allowed, (columns - pad).clamp_min(0))[0]
        return (
            largest_difference(states[:, pad:], self._states()),
            self.allowed,
            "left padding changes the result",
        )

    def cache(self) -> tuple[float, float, str]:
        parts, past = [], None
        for begin, end in ((0, self.cut), *((i, i + 1) for i in range(self.cut, self.length))):
            states, past = self._run(
                self.embeddings[:, begin:end],
                self.causal[begin:end, :end],
                self.positions[begin:end],
                past_key_values=past,
                use_cache=True,
            )
            parts.append(states)
            if past is None:
                return float("inf"), self.allowed, "it returns no cache although use_cache is set"
        return (
            largest_difference(torch.cat(parts, 1), self._states()),
            self.allowed,
            "its states with a cache differ from those without",
        )


def _cut(length: int) -> int:
    """The position where the input is changed or divided: at least one is before it, and one after it if possible."""
    return max(1, min(length - 1, length * 5 // 8))


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Largest difference; infinite if it is NaN."""
    difference = (a.double() - b.double()).abs().max()
    return float(difference) if torch.isfinite(difference) else float("inf")


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 160 else text[:157] + '...'}"
