"""What the SPEC does not say: several slices, what is refused, that evaluation makes no gradients, that memory stays small."""

import pytest
import torch
import torch.nn.functional as F

from kernels import linear_cross_entropy as file
from kernels.launch import use
from kernels.linear_cross_entropy import linear_cross_entropy, slices
from tests.kernels.contract import interpreted


def case(N=700, V=5000, C=24, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x, head = torch.randn(N, C, generator=g, dtype=torch.float64), torch.randn(V, C, generator=g, dtype=torch.float64)
    targets = torch.randint(V, (N,), generator=g)
    targets[::7] = -100
    return x.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=interpreted)])
def test_several_slices_are_one(reduction, path, monkeypatch):
    """Losses and gradients do not depend on how many slices there are, the last of which is shorter."""
    if path == "triton":
        monkeypatch.setattr(file, "ROWS_ON_CPU", 5)
        monkeypatch.setattr(file, "SLICE_ON_CPU", 1)
        x, head, targets = case(13, 40, dtype=torch.float32)
    else:
        monkeypatch.setattr(file, "SLICE_ON_CPU", 2**20)
        x, head, targets = case()
    assert len(slices(x, head)) == 3
    weights = torch.linspace(-1, 2, len(x), dtype=x.dtype)
    want = F.cross_entropy(x @ head.T, targets, reduction=reduction)
    with use(path):
        got = linear_cross_entropy(x, head, targets, reduction=reduction)
    tolerance = dict(rtol=1e-10, atol=1e-10) if path == "torch" else dict(rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(got, want, **tolerance)
    feed = weights if reduction == "none" else torch.tensor(0.3, dtype=x.dtype)
    with use(path):
        grads = torch.autograd.grad(got, (x, head), feed)
    for mine, theirs in zip(grads, torch.autograd.grad(want, (x, head), feed), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


def test_slices_hold_few_logits():
    """As many numbers as a CPU's slice holds, or 256 rows where the vocabulary is larger than that allows."""
    for N, V in ((10000, 4096), (3000, 50257), (5, 10)):
        parts = slices(torch.empty(N, 1), torch.empty(V, 1))
        covered = [i for part in parts for i in range(*part.indices(N))]
        assert covered == list(range(N))
        assert all(len(range(*p.indices(N))) <= max(256, file.SLICE_ON_CPU // V) for p in parts)


def test_a_head_in_float32_under_activations_in_bfloat16():
    """The product is taken in the dtype of x; the head's gradient is summed and returned in its own."""
    x, head, targets = case(600, 3000, dtype=torch.float32)
    half = x.detach().bfloat16().requires_grad_()
    linear_cross_entropy(half, head, targets).backward()
    assert half.grad.dtype == torch.bfloat16 and head.grad.dtype == torch.float32
    want = torch.autograd.grad(
        F.cross_entropy(half.detach().float() @ head.bfloat16().float().T, targets, reduction="sum"), head
    )[0]
    assert (head.grad - want).norm() < 0.01 * want.norm()


def test_evaluation_makes_no_gradients(monkeypatch):
    x, head, targets = case()
    monkeypatch.setattr(file, "gradients", lambda *_: pytest.fail("made in vain"))
    with torch.no_grad():
        torch.testing.assert_close(
            linear_cross_entropy(x, head, targets), F.cross_entropy(x @ head.T, targets, reduction="sum"), rtol=1e-10, atol=0
        )


GOOD = dict(x=torch.zeros(3, 4), head=torch.zeros(5, 4), targets=torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.zeros(3)),
        ("x", torch.zeros(3, 4, dtype=torch.int64)),
        ("head", torch.zeros(5, 3)),
        ("head", torch.zeros(0, 4)),
        ("targets", torch.zeros(2, dtype=torch.int64)),
        ("targets", torch.zeros(3, dtype=torch.int32)),
        ("targets", torch.tensor([0, 5, 0])),
        ("targets", torch.tensor([0, -1, 0])),
        ("softcap", -1.0),
        ("label_smoothing", -0.1),
        ("label_smoothing", 1.0),
        ("z_loss", -0.1),
        ("reduction", "mean"),
    ],
)
def test_what_does_not_fit_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: "):
        linear_cross_entropy(**{**GOOD, name: value})
