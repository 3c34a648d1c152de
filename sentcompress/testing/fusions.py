"""check_fusion: shape, padding, batches, gradients, dtypes, saving."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sentcompress.contracts import Fusion
from sentcompress.testing.checks import Subject, shown

_LENGTHS = (7, 1, 12, 4, 2, 1)
"""Tokens of the sentences used by the checks."""
_GARBAGE = 1e4


def check_fusion(cls: type[Fusion], options: Any | None = None, *, hidden_size: int = 32) -> None:
    """Check that a fusion fulfils its contract.

    Latents must have the shape ``[S, k, H]``, where k is the property ``latents``, and be finite, also for one token.
    They must be the same the second time, with any values and any amount of padding, and for a sentence alone or in a
    batch. The input must stay unchanged. Gradients must reach every sentence and parameter. bfloat16 in must give
    bfloat16 out, and autocast must work. A copy built on the meta device and loaded from the ``state_dict`` must be
    equal.

    Args:
        options: raw options or an ``Options`` instance.
        hidden_size: width ``H`` of the fusion.

    Raises:
        CheckFailed: says in one sentence what is wrong.
    """
    __tracebackhide__ = True
    subject = Subject("fusion", cls, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fusion: Fusion = subject.build(hidden_size=hidden_size)
        fusion.eval()
        hidden, mask = _sentences(hidden_size)
        with torch.no_grad():
            latents = _shape(subject, fusion, hidden, mask)
            _padding(subject, fusion, hidden, mask, latents)
            _batches(subject, fusion, hidden, mask, latents)
            _dtypes(subject, fusion, hidden, mask)
            _saving(subject, fusion, hidden, mask, latents)
        _gradients(subject, fusion.train(), hidden, mask)


def _sentences(hidden_size: int) -> tuple[Tensor, Tensor]:
    """Hidden states ``[S, L, H]``, zeros at padding, and their mask ``[S, L]``."""
    mask = torch.arange(max(_LENGTHS)) < torch.tensor(_LENGTHS)[:, None]
    return torch.randn(*mask.shape, hidden_size).masked_fill(~mask[:, :, None], 0.0), mask


def _run(subject: Subject, fusion: Fusion, hidden: Tensor, mask: Tensor, how: str = "") -> Tensor:
    shape = f"hidden states {list(hidden.shape)} {str(hidden.dtype).removeprefix('torch.')}{how}"
    latents = subject.call(f"forward with {shape}", lambda: fusion(hidden, mask))
    expected = [len(hidden), fusion.latents, hidden.shape[2]]
    promise = f"[S, k, H] = {expected} is expected, where k is the property latents ({fusion.latents})"
    if not isinstance(latents, Tensor):
        subject.fail(f"returns {type(latents).__name__} for {shape}", promise)
    if list(latents.shape) != expected:
        subject.fail(f"returns the shape {list(latents.shape)} for {shape}", promise)
    bad = (~latents.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        length = int(mask[bad[0]].sum())
        subject.fail(
            f"returns {_first_bad(latents[bad[0]])} for a sentence of {length} token(s) among {shape}",
            "latents must be finite",
        )
    return latents


def _first_bad(latents: Tensor) -> str:
    return "NaN" if bool(latents.isnan().any()) else "infinity"


def _shape(subject: Subject, fusion: Fusion, hidden: Tensor, mask: Tensor) -> Tensor:
    k = subject.call("latents", lambda: fusion.latents)
    if not isinstance(k, int) or k < 1:
        subject.fail(f"has latents {k!r}", "the property must be the number of vectors per sentence, an int")
    given, given_mask = hidden.clone(), mask.clone()
    latents = _run(subject, fusion, given, given_mask)
    if not torch.equal(given, hidden) or not torch.equal(given_mask, mask):
        what = "mask" if torch.equal(given, hidden) else "hidden_states"
        subject.fail(f"changes its input {what}", "it must work on copies")
    latents = latents.clone()
    _equal(subject, latents, _run(subject, fusion, hidden, mask), "returns different latents the second time")
    return latents


def _equal(subject: Subject, expected: Tensor, got: Tensor, what: str) -> None:
    """Compare latents sentence by sentence, up to rounding."""
    for number, (a, b) in enumerate(zip(expected, got, strict=True)):
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-4):
            difference = float((a - b).abs().max())
            subject.fail(
                f"{what}: those of a sentence of {_LENGTHS[number]} token(s) differ by {difference:.2g}",
                "latents may depend only on the sentence's own tokens",
            )


def _padding(subject: Subject, fusion: Fusion, hidden: Tensor, mask: Tensor, latents: Tensor) -> None:
    for garbage in (_GARBAGE, -_GARBAGE):
        noise = torch.randn_like(hidden).abs() * garbage
        filled = torch.where(mask[:, :, None], hidden, noise)
        what = f"lets padding change the result (with values around {garbage:g})"
        _equal(subject, latents, _run(subject, fusion, filled, mask), what)
    longer = nn.functional.pad(hidden, (0, 0, 0, 5)), nn.functional.pad(mask, (0, 5))
    what = "lets padding change the result (with 5 more columns)"
    _equal(subject, latents, _run(subject, fusion, *longer), what)


def _batches(subject: Subject, fusion: Fusion, hidden: Tensor, mask: Tensor, latents: Tensor) -> None:
    alone = []
    for row, length in enumerate(_LENGTHS):
        one = hidden[row : row + 1, :length], mask[row : row + 1, :length]
        alone.append(_run(subject, fusion, *one))
    _equal(
        subject, latents, torch.cat(alone), "returns different latents for a sentence in a batch than alone"
    )


def _gradients(subject: Subject, fusion: Fusion, hidden: Tensor, mask: Tensor) -> None:
    hidden = hidden.clone().requires_grad_()
    latents = _run(subject, fusion, hidden, mask, " in training")
    promise = "training needs them"
    if not latents.requires_grad:
        subject.fail("returns latents without gradients", promise)
    # Not a plain sum: after a LayerNorm it is constant.
    subject.call("backward", (latents * torch.randn_like(latents)).sum().backward)
    if hidden.grad is None:
        subject.fail("lets no gradient reach hidden_states", promise)
    for what, gradient in [("hidden_states", hidden.grad), *((n, p.grad) for n, p in _trained(fusion))]:
        if gradient is None:
            subject.fail(
                f"lets no gradient reach its parameter '{what}'", f"{promise}, or requires_grad=False"
            )
        if not bool(gradient.isfinite().all()):
            subject.fail(f"gives '{what}' the gradient {_first_bad(gradient)}", "gradients must be finite")
    reached = hidden.grad.abs().flatten(1).sum(1) > 0
    if not bool(reached.all()):
        length = _LENGTHS[int((~reached).nonzero()[0])]
        subject.fail(f"lets no gradient reach the tokens of a sentence of {length} token(s)", promise)


def _trained(fusion: Fusion) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in fusion.named_parameters() if p.requires_grad]


def _dtypes(subject: Subject, fusion: Fusion, hidden: Tensor, mask: Tensor) -> None:
    half = copy.deepcopy(fusion).to(torch.bfloat16)
    latents = _run(subject, half, hidden.bfloat16(), mask)
    if latents.dtype != torch.bfloat16:
        subject.fail(
            f"returns {str(latents.dtype).removeprefix('torch.')} for bfloat16 hidden states",
            "the result must have the dtype of hidden_states",
        )
    with torch.autocast("cpu", torch.bfloat16):
        _run(subject, fusion, hidden, mask, " under autocast to bfloat16")


def _saving(subject: Subject, fusion: Fusion, hidden: Tensor, mask: Tensor, latents: Tensor) -> None:
    state = {name: value.clone() for name, value in fusion.state_dict().items()}
    with torch.device("meta"):
        loaded: Fusion = subject.build(hidden_size=hidden.shape[2])
    subject.call("load_state_dict(state_dict())", lambda: loaded.load_state_dict(state, assign=True))
    promise = "a saved model is loaded into a fusion built on the meta device, so state_dict() must hold all its state"
    left = [name for name, t in [*loaded.named_parameters(), *loaded.named_buffers()] if t.is_meta]
    left += [name for name, value in vars(loaded).items() if isinstance(value, Tensor)]
    if left:
        subject.fail(
            f"keeps the tensor(s) {shown(', '.join(left), quote=False)} out of its state_dict", promise
        )
    loaded.eval()
    got = _run(subject, loaded, hidden, mask, " after loading")
    if not torch.allclose(latents, got, rtol=1e-3, atol=1e-4):
        difference = float((latents - got).abs().max())
        subject.fail(f"returns latents that differ by {difference:.2g} after saving and loading", promise)
