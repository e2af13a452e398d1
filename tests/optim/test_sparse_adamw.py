"""AdamW of the rows that have a gradient: PyTorch's SparseAdam, and AdamW with the other rows put back."""

import pytest
import torch
from torch import nn

from optim import AdamW, Combined, SparseAdamW

SHAPES = [(6, 4), (5, 3, 2), (7,)]


def params(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def gradients(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each parameter the rows that are used, and a gradient."""
    generator = torch.Generator().manual_seed(step)
    rows = [torch.rand(shape[0], generator=generator) < 0.4 for shape in SHAPES]
    return [(r, torch.randn(*s, generator=generator, dtype=torch.float64) * r.view(-1, *[1] * (len(s) - 1)))
            for r, s in zip(rows, SHAPES, strict=True)]  # fmt: skip


def test_without_decay_it_is_the_sparse_adam_of_pytorch():
    ours, theirs = params(), params()
    hyper = dict(lr=0.03, betas=(0.8, 0.95))
    built, other = SparseAdamW(ours, eps=1e-30, weight_decay=0.0, **hyper), torch.optim.SparseAdam(theirs, eps=1e-30, **hyper)
    for step in range(12):
        for p, q, (_, grad) in zip(ours, theirs, gradients(step), strict=True):
            p.grad, q.grad = grad.clone(), grad.to_sparse(1)
        built.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_without_a_gradient_and_their_state_stay_bit_for_bit(dtype, offload):
    """A used row steps as in AdamW, decay among it; beside it AdamW itself, whose unused rows are put back by hand."""
    ours, theirs = params(dtype), params(dtype)
    hyper = dict(lr=0.03, betas=(0.8, 0.95), weight_decay=0.3)
    built, other = SparseAdamW(ours, **hyper), AdamW(theirs, **hyper)
    moved = Combined([built]).offload() if offload else None
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    used = 0
    for step in range(12):
        given, before = gradients(step), [[t.clone() for t in everything(built, p)] for p in ours]
        held = [[t.clone() for t in everything(other, q)] for q in theirs]
        for p, q, (_, grad) in zip(ours, theirs, given, strict=True):
            p.grad, q.grad = grad.to(dtype), grad.to(dtype)
        built.step()
        other.step()
        for p, q, (rows, _), old, kept in zip(ours, theirs, given, before, held, strict=True):
            used += p[rows].numel()
            for t, u, a, b in zip(everything(built, p), everything(other, q), old, kept, strict=True):
                assert torch.equal(t[~rows], a[~rows])
                u.data[~rows] = b[~rows]
                torch.testing.assert_close(t[rows], u[rows], rtol=rounding, atol=rounding)
            assert not rows.any() or not torch.equal(p[rows], old[0][rows])
    wide = torch.promote_types(dtype, torch.float32)
    assert moved is None or moved["up"] == used * wide.itemsize  # of used rows alone


def everything(optimizer, param) -> list[torch.Tensor]:
    """The parameter and its state; zeros before the first step."""
    state = optimizer.state[param] or optimizer.init_state(param)
    return [param.detach(), state["mean"], state["square"]]
