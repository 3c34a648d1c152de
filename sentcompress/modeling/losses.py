"""Focal loss and cross-entropy through a large output head, without the logits ever existing whole.

Focal loss (paper section 3.1, gamma 2): ``(1 - p)^gamma * -log p`` of the right token. gamma 0 is cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_BUDGET = 2**23
"""Logits held at a time; larger blocks cost page faults rather than save time."""


@dataclass(frozen=True)
class TokenLoss:
    """Which loss the output head is trained with.

    Attributes:
        gamma: focusing parameter of the focal loss; 0 is cross-entropy.
        label_smoothing: share of the target spread evenly over the vocabulary.
    """

    gamma: float = 2.0
    label_smoothing: float = 0.0

    def __call__(self, hidden_states: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and negative log-likelihood of each target.

        Args:
            hidden_states: ``[T, H]``.
            weight: ``[V, H]`` of the output head.
            targets: ``[T]`` int64.

        Returns:
            loss ``[T]`` and NLL ``[T]`` in nats, both fp32; only the loss carries gradients.
        """
        return _ChunkedFocalLoss.apply(hidden_states, weight, targets, self.gamma, self.label_smoothing)


class _ChunkedFocalLoss(torch.autograd.Function):
    """The loss over blocks of the vocabulary: a running log-sum-exp forward, logits again backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, targets: Tensor, gamma: float, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        device = hidden_states.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden_states.dtype
        hidden, rows, vocab = hidden_states.to(dtype), hidden_states.shape[0], weight.shape[0]
        step = max(256, LOGITS_BUDGET // max(rows, 1))
        total = hidden.new_full((rows,), float("-inf"), dtype=torch.float32)
        mean = torch.zeros_like(total)
        target_logit = torch.zeros_like(total)
        logits = None
        with torch.autocast(device, enabled=False):
            for start in range(0, vocab, step):
                logits = (hidden @ weight[start : start + step].to(dtype).t()).float()
                total = torch.logaddexp(total, logits.logsumexp(1))
                if smoothing:
                    mean += logits.sum(1) / vocab
                inside = (targets >= start) & (targets < start + step)
                picked = logits.gather(1, (targets - start).clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
                target_logit = torch.where(inside, picked, target_logit)
        nll = total - target_logit
        smoothed = (1 - smoothing) * nll + smoothing * (total - mean) if smoothing else nll
        p = torch.exp(-nll)
        miss = (1 - p).clamp_min(1e-12)
        loss = miss**gamma * smoothed if gamma else smoothed.clone()
        # One block held everything: keep it, and the backward pass need not multiply again.
        kept = logits if step >= vocab else None
        ctx.save_for_backward(hidden, weight, targets, total, p, miss, smoothed, kept)
        ctx.settings = (gamma, smoothing, step, hidden_states.dtype)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        hidden, weight, targets, total, p, miss, smoothed, kept = ctx.saved_tensors
        gamma, smoothing, step, input_dtype = ctx.settings
        vocab = weight.shape[0]
        grad_loss = grad_outputs[0].float()
        focus = miss**gamma if gamma else torch.ones_like(miss)
        push = smoothed * gamma * miss ** (gamma - 1) * p if gamma else torch.zeros_like(miss)
        on_all = grad_loss * (focus + push)
        on_target = grad_loss * (focus * (1 - smoothing) + push)
        on_even = grad_loss * focus * (smoothing / vocab)
        grad_hidden = torch.zeros_like(hidden)
        # A frozen head is a third of its work cheaper.
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        rows = torch.arange(targets.shape[0], device=targets.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, vocab, step):
                block = weight[start : start + step].to(hidden.dtype)
                logits = (hidden @ block.t()).float() if kept is None else kept
                grad = torch.exp(logits - total[:, None]) * on_all[:, None]
                inside = (targets >= start) & (targets < start + step)
                grad[rows[inside], targets[inside] - start] -= on_target[inside]
                if smoothing:
                    grad -= on_even[:, None]
                grad = grad.to(hidden.dtype)
                grad_hidden += grad @ block
                if grad_weight is not None:
                    grad_weight[start : start + step] = grad.t() @ hidden
        return grad_hidden.to(input_dtype), grad_weight, None, None, None


@dataclass(frozen=True)
class Teaching:
    """What a token-level LLM expects at each token of some sentences.

    Attributes:
        states: ``[S, L, H_teacher]``, its last hidden states: what stands at a token predicts that token.
        weight: ``[V, H_teacher]`` of its output head.
        share: of the loss that is cross-entropy against its distribution; the rest is that of the text itself.
    """

    states: Tensor
    weight: Tensor
    share: float

    def of(self, sentences: Tensor) -> Teaching:
        """Only some sentences, ``[S']``, in that order."""
        return Teaching(self.states[sentences], self.weight, self.share)


def taught_loss(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, teaching: Teaching, states: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """Loss against the text and against a teacher's distribution (arXiv 1503.02531), a block of rows at a time.

    Args:
        hidden_states, weight, targets: as :class:`TokenLoss` takes them.
        states: ``[T, H_teacher]`` of the teacher at the same targets.
        gamma: focusing parameter of the part against the text.

    Returns:
        loss ``[T]`` and NLL ``[T]`` in nats, both fp32; only the loss carries gradients.
    """
    rows = max(1, LOGITS_BUDGET // len(weight))
    blocks = [
        checkpoint(
            _taught,
            hidden,
            weight,
            target,
            state,
            teaching,
            gamma,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for hidden, target, state in zip(
            hidden_states.split(rows), targets.split(rows), states.split(rows), strict=True
        )
    ]
    return torch.cat([loss for loss, _ in blocks]), torch.cat([nll for _, nll in blocks])


def _taught(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, states: Tensor, teaching: Teaching, gamma: float
) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden_states, weight).float()
    total = logits.logsumexp(1)
    nll = total - logits.gather(1, targets[:, None]).squeeze(1)
    with torch.no_grad():
        expected = F.linear(states, teaching.weight).float().softmax(1)
    taught = total - (expected * logits).sum(1)
    told = (1 - torch.exp(-nll)).clamp_min(1e-12) ** gamma * nll if gamma else nll
    return (1 - teaching.share) * told + teaching.share * taught, nll.detach()


def stop_loss(logits: Tensor, stop: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Focal loss of the stop decisions (paper section 3.2).

    Args:
        logits: ``[D, 2]``, go on and stop.
        stop: ``[D]`` int64, 1 where the document ends.

    Returns:
        loss ``[D]`` and NLL ``[D]`` in nats; only the loss is used for gradients.
    """
    nll = F.cross_entropy(logits.float(), stop, reduction="none")
    miss = (1 - torch.exp(-nll)).clamp_min(1e-12)
    return miss**gamma * nll, nll.detach()


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor, floor: float) -> Tensor:
    """KL divergence to N(0, 1) a dimension, averaged over sentences, then floored and summed.

    Args:
        mean: ``[S, k, H]``.
        log_variance: ``[S, k, H]``.
        floor: nats a dimension below which nothing is pushed ("free bits").

    Returns:
        nats a sentence, scalar.
    """
    nats = 0.5 * (mean.float() ** 2 + log_variance.float().exp() - 1 - log_variance.float())
    return nats.mean(0).clamp_min(floor).sum()
