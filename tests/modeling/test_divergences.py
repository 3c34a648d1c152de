"""Cross-entropy plus divergences from a teacher: the blocks give what the whole logits give, gradients too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sentcompress.modeling import losses
from sentcompress.modeling.divergences import Divergences

TARGETS, VOCAB, WIDTH = 37, 50, 16


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOGITS_BUDGET", VOCAB * 8)
    monkeypatch.setattr(losses, "MIN_ROWS", 8)
    monkeypatch.setattr(losses, "CACHED_LOGITS", VOCAB * 3)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"states": (TARGETS, WIDTH), "weight": (VOCAB, WIDTH)}
    made = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    return made | {
        "targets": torch.randint(VOCAB, (TARGETS,)),
        "teacher_states": torch.randn(TARGETS, WIDTH - 4),
        "teacher_weight": torch.randn(VOCAB, WIDTH - 4),
    }


def expected(tensors: dict[str, Tensor], forward: float, reverse: float) -> tuple[Tensor, Tensor, Tensor]:
    student = (tensors["states"] @ tensors["weight"].t()).log_softmax(1)
    teacher = (tensors["teacher_states"] @ tensors["teacher_weight"].t()).log_softmax(1)
    nll = F.nll_loss(student, tensors["targets"], reduction="none")
    both = torch.stack(
        [
            F.kl_div(student, teacher, log_target=True, reduction="none").sum(1),
            F.kl_div(teacher, student, log_target=True, reduction="none").sum(1),
        ]
    )
    return (nll + forward * both[0] + reverse * both[1]).sum(), nll, both


@pytest.mark.parametrize(("forward", "reverse"), [(0.5, 0.25), (1.0, 0.0), (0.0, 2.0)])
@pytest.mark.parametrize("head_learns", [True, False])
def test_it_is_the_loss_over_whole_logits(tensors, forward, reverse, head_learns):
    learning = [tensors["states"]] + [tensors["weight"]] * head_learns
    tensors["weight"].requires_grad_(head_learns)
    loss, nll, both = Divergences(forward, reverse)(**tensors)
    right = expected(tensors, forward, reverse)
    torch.testing.assert_close((loss, nll, both), right)
    assert not nll.requires_grad
    assert not both.requires_grad
    gradients = torch.autograd.grad(3 * loss, learning)
    torch.testing.assert_close(gradients, torch.autograd.grad(3 * right[0], learning), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(tensors, dtype):
    with torch.autocast("cpu", dtype=dtype):
        loss, _, _ = Divergences(0.5, 0.5)(**tensors)
    exact = expected(tensors, 0.5, 0.5)[0]
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    learning = [tensors["states"], tensors["weight"]]
    for half, whole in zip(
        torch.autograd.grad(loss, learning), torch.autograd.grad(exact, learning), strict=True
    ):
        assert half.dtype == torch.float32
        assert F.cosine_similarity(half.flatten(), whole.flatten(), dim=0) > 0.999


def test_without_gradients_it_only_measures(tensors):
    with torch.no_grad():
        loss, nll, both = Divergences(0.5, 0.5)(**tensors)
    assert not loss.requires_grad
    torch.testing.assert_close((loss, nll, both), expected(tensors, 0.5, 0.5))


def test_a_teacher_that_agrees_costs_nothing(tensors):
    tensors["teacher_states"], tensors["teacher_weight"] = (
        tensors["states"].detach(),
        tensors["weight"].detach(),
    )
    loss, nll, both = Divergences(0.5, 0.5)(**tensors)
    assert both.abs().max() < 1e-5
    alone = F.cross_entropy(tensors["states"] @ tensors["weight"].t(), tensors["targets"], reduction="sum")
    assert loss.item() == pytest.approx(alone.item(), rel=1e-5)
    assert torch.allclose(
        *(torch.autograd.grad(value, tensors["states"])[0] for value in (loss, alone)), atol=1e-5
    )
    assert nll.shape == (TARGETS,)
