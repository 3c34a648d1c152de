"""The chunked loss against the same formula written out in double precision."""

import pytest
import torch

from sentcompress.modeling import losses
from sentcompress.modeling.losses import TokenLoss, kl_to_standard_normal, stop_loss


@pytest.mark.parametrize("budget", [2**23, 7 * 300], ids=["one-block", "many-blocks"])
@pytest.mark.parametrize(("gamma", "smoothing"), [(2.0, 0.0), (0.0, 0.1), (2.0, 0.1), (0.0, 0.0), (1.0, 0.0)])
def test_matches_the_formula_and_its_gradients(monkeypatch, budget, gamma, smoothing):
    monkeypatch.setattr(losses, "LOGITS_BUDGET", budget)
    torch.manual_seed(0)
    hidden = torch.randn(7, 16, dtype=torch.double, requires_grad=True)
    weight = torch.randn(1000, 16, dtype=torch.double, requires_grad=True)
    targets = torch.randint(0, 1000, (7,))
    share = torch.arange(7)

    loss, nll = TokenLoss(gamma, smoothing)(hidden.float(), weight.float(), targets)
    ours = torch.autograd.grad((loss * share).sum(), (hidden, weight))

    log_p = (hidden @ weight.T).log_softmax(-1)
    expected_nll = -log_p.gather(1, targets[:, None])[:, 0]
    expected = (1 - (-expected_nll).exp()) ** gamma * (
        (1 - smoothing) * expected_nll - smoothing * log_p.mean(1)
    )
    theirs = torch.autograd.grad((expected * share).sum(), (hidden, weight))
    torch.testing.assert_close(nll.double(), expected_nll, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(loss.double(), expected, atol=1e-4, rtol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_logits_never_exist_whole(monkeypatch):
    rows, vocab = 64, 4096
    monkeypatch.setattr(losses, "LOGITS_BUDGET", rows * 256)
    seen = []
    original = torch.Tensor.logsumexp
    monkeypatch.setattr(torch.Tensor, "logsumexp", lambda x, dim: seen.append(x.numel()) or original(x, dim))
    TokenLoss()(torch.randn(rows, 8), torch.randn(vocab, 8), torch.zeros(rows, dtype=torch.long))
    assert max(seen) <= rows * 256
    assert sum(seen) == rows * vocab


def test_bf16_autocast_stays_close():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(5, 16), torch.randn(300, 16) * 0.2, torch.randint(0, 300, (5,))
    exact, _ = TokenLoss()(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, _ = TokenLoss()(hidden, weight, targets)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.1, rtol=0.05)


def test_stop_loss_is_focal_cross_entropy():
    logits, stop = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    loss, nll = stop_loss(logits, stop, gamma=2.0)
    p = logits.softmax(-1)[torch.arange(2), stop]
    torch.testing.assert_close(nll, -p.log())
    torch.testing.assert_close(loss, (1 - p) ** 2 * -p.log())


def test_kl_floor_stops_pushing():
    mean = torch.full((3, 1, 4), 0.1, requires_grad=True)
    kl = kl_to_standard_normal(mean, torch.zeros(3, 1, 4), floor=0.5)
    assert kl.item() == pytest.approx(4 * 0.5)
    kl.backward()
    assert mean.grad.abs().max() == 0


def test_a_frozen_head_gets_no_gradient_and_the_states_theirs():
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 16, requires_grad=True), torch.randn(300, 16)
    targets = torch.randint(0, 300, (5,))
    (frozen,) = torch.autograd.grad(TokenLoss()(hidden, weight, targets)[0].sum(), hidden)
    learning, _ = torch.autograd.grad(
        TokenLoss()(hidden, weight.requires_grad_(), targets)[0].sum(), (hidden, weight)
    )
    torch.testing.assert_close(frozen, learning)
