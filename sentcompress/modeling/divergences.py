"""Cross-entropy plus KL divergences from a teacher's distribution, both ways, without ever holding all logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sentcompress.modeling.losses import rows_at_once, rows_in_cache

HALF_SCALE = 1024.0
"""Gradients of logits are multiplied by this before they are rounded to fp16, which has nothing below 6e-8."""


@dataclass(frozen=True)
class Divergences:
    """Which loss an LLM is trained with beside a teacher of the same vocabulary.

    Attributes:
        forward: weight of KL(teacher || student): the student gives a chance to all that the teacher may say.
        reverse: weight of KL(student || teacher): the student says nothing that the teacher would not.
    """

    forward: float
    reverse: float

    @torch.compiler.disable  # matrix products and in-place passes, as in TokenLoss
    def __call__(
        self, states: Tensor, weight: Tensor, targets: Tensor, teacher_states: Tensor, teacher_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sum of the losses, and the parts of each.

        Args:
            states: ``[T, H]`` of the student.
            weight: ``[V, H]`` of its output head.
            targets: ``[T]`` int64.
            teacher_states: ``[T, H']``, at the same targets; without gradients, like the next.
            teacher_weight: ``[V, H']``.

        Returns:
            summed loss (a scalar, the only one with gradients), NLL ``[T]``, and the divergences ``[2, T]``, the
            forward one first; all in nats and fp32.
        """
        loss, nll, divergences = _Divergences.apply(
            states, weight, targets, teacher_states, teacher_weight, self, torch.is_grad_enabled()
        )
        return loss, nll, divergences


class _Divergences(torch.autograd.Function):
    """The losses over blocks of targets; their gradients are computed in the same pass, from the block's logits."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        teacher_states: Tensor,
        teacher_weight: Tensor,
        weights: Divergences,
        learning: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        wanted = ctx.needs_input_grad[:2] if learning else (False, False)
        student, head = states.to(dtype), weight.to(dtype)
        teacher, teacher_head = teacher_states.to(dtype), teacher_weight.to(dtype)
        scale = HALF_SCALE if dtype == torch.float16 else 1.0
        nll = torch.empty(len(targets), device=targets.device)
        divergences = nll.new_empty(2, len(targets))
        grad_states = torch.empty_like(states) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        at_once, in_cache = rows_at_once(len(head), dtype, learning=any(wanted)), rows_in_cache(len(head))
        with torch.autocast(device, enabled=False):
            for rows in torch.arange(len(targets)).split(at_once):
                block = slice(int(rows[0]), int(rows[-1]) + 1)
                logits, expected = student[block] @ head.t(), teacher[block] @ teacher_head.t()
                for start in range(0, len(rows), in_cache):
                    some = slice(start, min(len(rows), start + in_cache))
                    those = slice(block.start + some.start, block.start + some.stop)
                    nll[those], divergences[:, those], gradients = _of_rows(
                        logits[some].float(), expected[some].float(), targets[those], weights
                    )
                    if any(wanted):
                        logits[some] = gradients.mul_(scale)
                if grad_states is not None:
                    grad_states[block] = (logits @ head).to(states.dtype) / scale
                if grad_weight is not None:
                    grad_weight += (logits.t() @ student[block]).float() / scale
        ctx.gradients = grad_states, None if grad_weight is None else grad_weight.to(weight.dtype)
        ctx.mark_non_differentiable(nll, divergences)
        return (
            (nll + weights.forward * divergences[0] + weights.reverse * divergences[1]).sum(),
            nll,
            divergences,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        upstream = grad_outputs[0]
        scaled = (None if one is None else one * upstream for one in ctx.gradients)
        return (*scaled, None, None, None, None, None)


def _of_rows(
    logits: Tensor, expected: Tensor, targets: Tensor, weights: Divergences
) -> tuple[Tensor, Tensor, Tensor]:
    """NLL ``[r]``, divergences ``[2, r]``, and the gradients ``[r, V]`` of the loss by the logits."""
    student, teacher = logits.log_softmax(1), expected.log_softmax(1)
    nll = -student.gather(1, targets[:, None]).squeeze(1)
    ratio = student - teacher
    student, teacher = student.exp_(), teacher.exp_()  # from here on probabilities
    forward, reverse = -(teacher * ratio).sum(1), (student * ratio).sum(1)
    gradients = ratio.sub_(reverse[:, None]).mul_(weights.reverse).add_(1 + weights.forward).mul_(student)
    gradients.sub_(teacher, alpha=weights.forward)
    gradients.scatter_add_(1, targets[:, None], torch.full_like(targets, -1, dtype=gradients.dtype)[:, None])
    return nll, torch.stack([forward, reverse]), gradients
