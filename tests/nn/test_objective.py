"""The next-token loss against PyTorch's cross-entropy, against NumPy, and against finite differences."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import linear_cross_entropy
from nn.objective import next_token_loss

N, DIM, VOCAB = 11, 6, 17


@pytest.fixture(params=[1, 4, 1000], ids="rows={}".format)
def rows_at_once(request, monkeypatch):
    """Tokens of one slice: one, a number that does not divide N, more than there are."""
    slice_by(monkeypatch, request.param)


def slice_by(patch: pytest.MonkeyPatch, rows: int) -> None:
    patch.setattr(linear_cross_entropy, "SLICE_ON_CPU", 1)
    patch.setattr(linear_cross_entropy, "ROWS_ON_CPU", rows)


def inputs(dtype=torch.float64, n=N, ignored=(2, 3, 10), scale=1.0):
    made = torch.Generator().manual_seed(0)
    x, head = (scale * torch.randn(rows, DIM, dtype=torch.float64, generator=made) for rows in (n, VOCAB))
    targets = torch.randint(VOCAB, (n,), generator=made)
    targets[[i for i in ignored if i < n]] = -100
    return x.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), targets


def theirs(x, head, targets, softcap=0.0):
    logits = x @ head.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return F.cross_entropy(logits, targets, reduction="sum")


def with_gradients(loss, x, head, upstream=1.0):
    dx, dhead = torch.autograd.grad(loss * upstream, (x, head))
    return loss.detach(), dx, dhead


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_equals_pytorch(softcap, rows_at_once):
    x, head, targets = inputs()
    expected = with_gradients(theirs(x, head, targets, softcap), x, head, 0.37)
    found = with_gradients(next_token_loss(x, head, targets, softcap=softcap), x, head, 0.37)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert (next_token_loss(x, head, targets, softcap=softcap) - expected[0]).abs() < 1e-12


@given(st.integers(0, 9), st.integers(1, 5), st.sampled_from([0.0, 0.5, 30.0]), st.floats(0.01, 50))
@settings(max_examples=60, deadline=None)
def test_any_size(n, rows, softcap, scale):
    x, head, targets = inputs(n=n, scale=scale)
    with pytest.MonkeyPatch.context() as patch:
        slice_by(patch, rows)
        found = with_gradients(next_token_loss(x, head, targets, softcap=softcap), x, head)
    for a, b in zip(found, with_gradients(theirs(x, head, targets, softcap), x, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_numpy(rows_at_once):
    """Token by token, as the equation says."""
    x, head, targets = inputs()
    total = 0.0
    for vector, target in zip(x.detach().numpy(), targets.tolist(), strict=True):
        if target != -100:
            logits = head.detach().numpy() @ vector
            total -= np.log(np.exp(logits[target]) / np.exp(logits).sum())
    assert abs(next_token_loss(x, head, targets).item() - total) < 1e-10


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_gradcheck(softcap, rows_at_once):
    x, head, targets = inputs()
    assert torch.autograd.gradcheck(lambda x, head: next_token_loss(x, head, targets, softcap=softcap), (x, head))


def test_nothing_counts(rows_at_once):
    x, head, targets = inputs()
    loss, dx, dhead = with_gradients(next_token_loss(x, head, torch.full_like(targets, -100)), x, head)
    assert loss == 0 and not dx.any() and not dhead.any()


def test_no_tokens():
    x, head, targets = inputs(n=0)
    loss, dx, dhead = with_gradients(next_token_loss(x, head, targets), x, head)
    assert loss == 0 and dx.shape == (0, DIM) and not dhead.any()
    with torch.no_grad():
        assert next_token_loss(x, head, targets) == 0


def test_one_input_may_be_fixed():
    x, head, targets = inputs()
    expected = with_gradients(theirs(x, head, targets), x, head)
    torch.testing.assert_close(torch.autograd.grad(next_token_loss(x, head.detach(), targets), x)[0], expected[1])
    torch.testing.assert_close(torch.autograd.grad(next_token_loss(x.detach(), head, targets), head)[0], expected[2])


def test_extreme_logits_stay_finite():
    x, head, targets = inputs(torch.float32, scale=300.0)
    exact = theirs(*(array.detach().double() for array in (x, head)), targets)
    loss, dx, dhead = with_gradients(next_token_loss(x, head, targets), x, head)
    assert abs(loss / exact - 1) < 1e-5 and dx.isfinite().all() and dhead.isfinite().all()


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_autocast(softcap, rows_at_once):
    """Products in bfloat16, the loss in float32, gradients in the dtype of what they belong to."""
    x, head, targets = inputs(torch.float32)
    expected = with_gradients(theirs(x, head, targets, softcap), x, head)
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(x, head, targets, softcap=softcap)
    found = with_gradients(loss, x, head)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() / b.norm() < 0.02
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(next_token_loss(x, head, targets, softcap=softcap), loss.detach())


def test_never_all_logits_at_once(monkeypatch):
    """What is kept for the backward pass are the two gradients, not the logits."""
    slice_by(monkeypatch, 2)
    kept = []
    x, head, targets = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        next_token_loss(x, head, targets).backward()
    assert sum(kept) <= N * DIM + VOCAB * DIM
