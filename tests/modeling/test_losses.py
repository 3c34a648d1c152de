"""The chunked loss against the same formula written out in double precision."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sentcompress.modeling import losses
from sentcompress.modeling.losses import TokenLoss, floored_kl, kl_to_standard_normal, stop_loss


@pytest.fixture
def few_rows(monkeypatch):
    """Three rows a block."""
    monkeypatch.setattr(losses, "rows_at_once", lambda *_, learning: 3 if learning else 4)
    monkeypatch.setattr(losses, "rows_in_cache", lambda _: 2)


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request):
    if request.param == "many blocks":
        request.getfixturevalue("few_rows")


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("weigh", [torch.arange, torch.ones], ids=["weighed", "alike"])
@pytest.mark.parametrize(("gamma", "smoothing"), [(2.0, 0.0), (0.0, 0.1), (2.0, 0.1), (0.0, 0.0), (1.0, 0.0)])
def test_matches_the_formula_and_its_gradients(weigh, gamma, smoothing):
    torch.manual_seed(0)
    hidden = torch.randn(7, 16, dtype=torch.double, requires_grad=True)
    weight = torch.randn(1000, 16, dtype=torch.double, requires_grad=True)
    targets = torch.randint(0, 1000, (7,))
    share = 0.3 * weigh(7)

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


def head_of(rows, vocab=300, size=16):
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, size), torch.randn(vocab, size) * 0.2
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, vocab, (rows,))


class Products(TorchDispatchMode):
    """Notes the shapes of matrix products, ``(rows, inner, columns)``."""

    def __enter__(self):
        self.seen = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.seen.append((*left.shape, right.shape[1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("few_rows")
def test_blocks_of_rows_are_multiplied_with_the_head_once_and_twice_for_gradients():
    with Products() as products:
        TokenLoss()(*head_of(6))[0].mean().backward()
    of_a_block = [(3, 16, 300), (3, 300, 16), (300, 3, 16)]
    assert products.seen == 2 * of_a_block
    with Products() as products, torch.no_grad():
        TokenLoss()(*head_of(8))
    assert products.seen == 2 * [(4, 16, 300)]


def test_fp16_gradients_are_rounded_after_the_scalers_factor():
    hidden, weight, targets = head_of(7)
    with torch.no_grad():  # confident: what the other tokens get is below what fp16 can hold
        weight[targets] = 12 * hidden / hidden.norm(dim=1, keepdim=True) ** 2
    exact, _ = TokenLoss()(hidden, weight, targets)
    right = torch.autograd.grad(exact.sum(), hidden)[0]
    with torch.autocast("cpu", dtype=torch.float16):
        rough, _ = TokenLoss()(hidden, weight, targets)
    close = torch.autograd.grad(2.0**16 * rough.sum(), hidden)[0] / 2**16
    torch.testing.assert_close(close, right, atol=0.02 * right.abs().max().item(), rtol=0.05)


def test_second_derivatives_are_refused():
    hidden, weight, targets = head_of(5)
    loss, _ = TokenLoss()(hidden, weight, targets)
    (first,) = torch.autograd.grad(loss.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_few_bits_get_gradients_of_theirs(dtype):
    hidden, weight, targets = head_of(7)
    exact = torch.autograd.grad(TokenLoss()(hidden, weight, targets)[0].mean(), (hidden, weight))
    small = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight)]
    loss, _ = TokenLoss()(*small, targets)
    for right, found in zip(exact, torch.autograd.grad(loss.mean(), small), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), right, atol=0.03 * right.abs().max().item(), rtol=0.1)


def test_gradients_may_be_asked_for_twice():
    hidden, weight, targets = head_of(5)
    loss, _ = TokenLoss()(hidden, weight, targets)
    first = torch.autograd.grad(loss.mean(), (hidden, weight), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(2 * loss.mean(), (hidden, weight))
    for once, before, twice in zip(first, kept, second, strict=True):
        assert torch.equal(once, before)
        torch.testing.assert_close(twice, 2 * once)


def test_no_target_at_all_is_no_error():
    hidden, weight, targets = head_of(0)
    loss, nll = TokenLoss()(hidden, weight, targets)
    loss.sum().backward()
    assert len(nll) == 0
    assert not weight.grad.any()


@pytest.mark.usefixtures("blocks")
def test_bf16_autocast_stays_close():
    hidden, weight, targets = head_of(7)
    exact, _ = TokenLoss()(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, _ = TokenLoss()(hidden, weight, targets)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.1, rtol=0.05)
    gradients = [torch.autograd.grad(loss.mean(), (hidden, weight)) for loss in (exact, rough)]
    for right, close in zip(*gradients, strict=True):
        assert close.dtype == torch.float32
        torch.testing.assert_close(close, right, atol=0.02 * right.abs().max().item(), rtol=0.05)


def test_stop_loss_is_focal_cross_entropy():
    logits, stop = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    loss, nll = stop_loss(logits, stop, gamma=2.0)
    p = logits.softmax(-1)[torch.arange(2), stop]
    torch.testing.assert_close(nll, -p.log())
    torch.testing.assert_close(loss, (1 - p) ** 2 * -p.log())


def test_kl_floor_stops_pushing():
    mean = torch.full((3, 1, 4), 0.1, requires_grad=True)
    kl = floored_kl(kl_to_standard_normal(mean, torch.zeros(3, 1, 4)), floor=0.5)
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


def test_a_compiled_model_learns_the_same():
    hidden, weight, targets = head_of(7)
    layer = torch.nn.Linear(16, 16)

    def step(states):
        return TokenLoss()(layer(states), weight, targets)[0].mean()

    expected = torch.autograd.grad(step(hidden), (hidden, weight))
    found = torch.autograd.grad(torch.compile(step, backend="aot_eager")(hidden), (hidden, weight))
    for right, compiled in zip(expected, found, strict=True):
        torch.testing.assert_close(compiled, right)
