"""Focal loss and cross-entropy through a large output head, without ever holding all logits.

Focal loss (paper section 3.1, gamma 2): ``(1 - p)^gamma * -log p`` of the right token. gamma 0 is cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_BUDGET = 2**23
"""Logits held at a time, unless that is too few rows; larger blocks cost page faults and save no time."""
CACHED_LOGITS = 2**21
"""Logits turned into gradients at a time: several passes over them stay in the processor's cache."""
MIN_ROWS = 512
"""Fewest targets whose logits are held at a time while the head is trained. With fewer, accumulating its gradient takes
as long as computing it. In 16 bits it is twice as many, for the same memory."""


def rows_at_once(vocab_size: int, dtype: torch.dtype, *, learning: bool) -> int:
    """Number of targets whose logits the loss holds at a time."""
    return max(MIN_ROWS if learning else 1, LOGITS_BUDGET // vocab_size) * 4 // dtype.itemsize


def rows_in_cache(vocab_size: int) -> int:
    """Number of targets whose logits the loss turns into gradients at a time."""
    return max(1, CACHED_LOGITS // vocab_size)


@dataclass(frozen=True)
class TokenLoss:
    """Which loss the output head is trained with.

    Attributes:
        gamma: focusing parameter of the focal loss; 0 is cross-entropy.
        label_smoothing: share of the target distribution that is uniform over the vocabulary.
    """

    gamma: float = 2.0
    label_smoothing: float = 0.0

    @torch.compiler.disable  # matrix products and in-place passes: there is nothing to gain from compiling
    def __call__(self, hidden_states: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and negative log-likelihood of each target.

        With gradients enabled, it also computes them, for the backward pass.

        Args:
            hidden_states: ``[T, H]``.
            weight: ``[V, H]`` of the output head.
            targets: ``[T]`` int64.

        Returns:
            loss ``[T]`` and NLL ``[T]`` in nats, both fp32; only the loss carries gradients.
        """
        learning = torch.is_grad_enabled()  # inside a Function it never is
        return _ChunkedFocalLoss.apply(
            hidden_states, weight, targets, self.gamma, self.label_smoothing, learning
        )


class _ChunkedFocalLoss(torch.autograd.Function):
    """The loss over blocks of targets. Gradients are computed in the same pass, from the block's logits.

    They are those of the sum of the losses; the backward pass scales them. It computes them again if it has to weight
    targets differently or runs a second time, and with fp16, where the scaler's factor must precede the rounding.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        targets: Tensor,
        gamma: float,
        smoothing: float,
        learning: bool,
    ) -> tuple[Tensor, Tensor]:
        device = hidden_states.device.type
        autocast = torch.is_autocast_enabled(device)
        ctx.dtype = torch.get_autocast_dtype(device) if autocast else hidden_states.dtype
        ctx.settings = gamma, smoothing
        ctx.save_for_backward(hidden_states, weight, targets)
        wanted = (False, False) if ctx.dtype == torch.float16 or not learning else ctx.needs_input_grad[:2]
        ones = torch.ones(len(targets), device=targets.device)
        loss, nll, *ctx.gradients = _by_rows(ctx, hidden_states, weight, targets, ones, wanted)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        upstream, wanted = grad_outputs[0].float(), ctx.needs_input_grad[:2]
        made, ctx.gradients = ctx.gradients, (None, None)
        if wanted == tuple(gradient is not None for gradient in made):
            on_hidden, on_weight = made
            # For a frozen head, skip the comparison of values, which would wait for a GPU.
            if on_weight is None or bool((upstream == upstream[:1]).all()):
                if on_hidden is not None:
                    on_hidden *= upstream[:, None]
                if on_weight is not None and len(upstream):
                    on_weight *= upstream[0]
                return on_hidden, on_weight, None, None, None, None
        hidden_states, weight, targets = ctx.saved_tensors
        *_, on_hidden, on_weight = _by_rows(ctx, hidden_states, weight, targets, upstream, wanted)
        return on_hidden, on_weight, None, None, None, None


def _by_rows(
    ctx: Any,
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    upstream: Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Loss and NLL ``[T]``, and the wanted gradients of ``(upstream * loss).sum()`` by hidden states and weight."""
    hidden, head, vocab = hidden_states.to(ctx.dtype), weight.to(ctx.dtype), len(weight)
    loss, nll = torch.empty_like(upstream), torch.empty_like(upstream)
    grad_hidden = torch.empty_like(hidden) if wanted[0] else None
    # A frozen head saves a third of the work.
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
    exact = ctx.dtype == torch.float32
    part = None if grad_weight is None or exact else torch.empty_like(head)
    at_once = min(rows_at_once(vocab, ctx.dtype, learning=any(wanted)), max(1, len(hidden)))
    in_cache = min(at_once, rows_in_cache(vocab))
    # Reused by each block, in place: new memory costs page faults.
    block = hidden.new_empty(at_once, vocab)
    precise = None if exact else block.new_empty(in_cache, vocab, dtype=torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), at_once):
            rows = slice(start, start + at_once)
            states = hidden[rows]
            logits = torch.mm(states, head.t(), out=block[: len(states)])
            for first in range(0, len(states), in_cache):
                some = logits[first : first + in_cache]
                those = slice(start + first, start + first + len(some))
                work = some if precise is None else precise[: len(some)].copy_(some)
                weights = upstream[those] if any(wanted) else None
                loss[those], nll[those] = _into_gradients(work, targets[those], weights, *ctx.settings)
                if weights is not None and precise is not None:
                    some.copy_(work)
            if not any(wanted):
                continue
            if grad_hidden is not None:
                torch.mm(logits, head, out=grad_hidden[rows])
            if grad_weight is not None:
                if part is None:
                    grad_weight.addmm_(logits.t(), states)
                else:
                    grad_weight += torch.mm(logits.t(), states, out=part)
    on_hidden = None if grad_hidden is None else grad_hidden.to(hidden_states.dtype)
    return loss, nll, on_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)


def _into_gradients(
    logits: Tensor, targets: Tensor, upstream: Tensor | None, gamma: float, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Loss and NLL ``[r]``; fp32 logits ``[r, V]`` become the gradients of ``(upstream * loss).sum()`` by them.

    Without ``upstream`` that pass is skipped, and the logits are not meaningful afterwards.
    """
    wanted = targets[:, None]
    highest, target_logit = logits.amax(1), logits.gather(1, wanted).squeeze(1)
    mean = logits.mean(1) if smoothing else 0.0
    unscaled = logits.sub_(highest[:, None]).exp_()
    sums = unscaled.sum(1)
    total = highest + sums.log()
    nll = total - target_logit
    smoothed = (1 - smoothing) * nll + smoothing * (total - mean)
    p = torch.exp(-nll)
    miss = (1 - p).clamp_min(1e-12)
    focus = miss**gamma if gamma else torch.ones_like(miss)
    loss = focus * smoothed
    if upstream is None:
        return loss, nll
    push = smoothed * gamma * miss ** (gamma - 1) * p if gamma else torch.zeros_like(miss)
    gradients = unscaled.mul_((upstream * (focus + push) / sums)[:, None])
    on_target = upstream * (focus * (1 - smoothing) + push)
    gradients.scatter_(1, wanted, gradients.gather(1, wanted) - on_target[:, None])
    if smoothing:
        gradients -= (upstream * focus * (smoothing / logits.shape[1]))[:, None]
    return loss, nll


@dataclass(frozen=True)
class Teaching:
    """What a token-level LLM expects at each token of some sentences.

    Attributes:
        states: ``[S, L, H_teacher]``, its last hidden states; the state at a token predicts that token.
        weight: ``[V, H_teacher]`` of its output head.
        share: weight of the cross-entropy against the teacher's distribution; the rest is that of the text.
    """

    states: Tensor
    weight: Tensor
    share: float

    def of(self, sentences: Tensor) -> Teaching:
        """Select sentences ``[S']``."""
        return Teaching(self.states[sentences], self.weight, self.share)


def distillation_loss(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, teaching: Teaching, states: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """Loss against the text and a teacher's distribution (arXiv 1503.02531), block by block.

    Args:
        hidden_states, weight, targets: as for :class:`TokenLoss`.
        teaching: the teacher's weight and share.
        states: ``[T, H_teacher]`` of the teacher at the same targets.
        gamma: focusing parameter of the loss against the text.

    Returns:
        loss ``[T]`` and NLL ``[T]`` in nats, both fp32; only the loss carries gradients.
    """
    rows = max(1, LOGITS_BUDGET // len(weight))
    blocks = [
        checkpoint(
            _distillation_loss_of_block,
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


def _distillation_loss_of_block(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, states: Tensor, teaching: Teaching, gamma: float
) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden_states, weight).float()
    total = logits.logsumexp(1)
    nll = total - logits.gather(1, targets[:, None]).squeeze(1)
    with torch.no_grad():
        expected = F.linear(states, teaching.weight).float().softmax(1)
    against_teacher = total - (expected * logits).sum(1)
    against_text = (1 - torch.exp(-nll)).clamp_min(1e-12) ** gamma * nll if gamma else nll
    return (1 - teaching.share) * against_text + teaching.share * against_teacher, nll.detach()


def stop_loss(logits: Tensor, stop: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Focal loss of the stop decisions (paper section 3.2).

    Args:
        logits: ``[D, 2]``, continue and stop.
        stop: ``[D]`` int64, 1 where the document ends.

    Returns:
        loss ``[D]`` and NLL ``[D]`` in nats; only the loss is used for gradients.
    """
    nll = F.cross_entropy(logits.float(), stop, reduction="none")
    miss = (1 - torch.exp(-nll)).clamp_min(1e-12)
    return miss**gamma * nll, nll.detach()


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence to N(0, 1) of each dimension: ``[S, k, H]`` nats of means and log-variances ``[S, k, H]``."""
    return 0.5 * (mean.float() ** 2 + log_variance.float().exp() - 1 - log_variance.float())


def floored_kl(nats: Tensor, floor: float, step_mean: Tensor | None = None) -> Tensor:
    """KL divergence averaged over sentences, then floored per dimension and summed ("free bits", arXiv 1606.04934).

    Args:
        nats: ``[S, k, H]`` of :func:`kl_to_standard_normal`.
        floor: nats per dimension below which there is no gradient.
        step_mean: ``[k, H]``, the mean that is compared with the floor; None takes that of ``nats``. The results of the
            micro-batches of a step, weighted by their sentences, then sum to that of all its sentences.

    Returns:
        nats per sentence, scalar.
    """
    own = nats.mean(0)
    return torch.where((own if step_mean is None else step_mean) < floor, floor, own).sum()
