"""attention: what its SPEC does not say. Each identity is asked of both paths, the Triton kernels in their interpreter."""

import os

import pytest
import torch
import torch.nn.functional as F

from kernels.attention import attention, merge
from kernels.intervals import document_ids, spans
from kernels.launch import TRITON, use

interpreted = pytest.mark.skipif(not TRITON or os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
paths = pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=interpreted)])


def qkv(B=2, H=2, K=1, T=35, S=35, D=16, DV=16, dtype=torch.float32, grad=True):
    return tuple(torch.randn(B, h, t, d, dtype=dtype).requires_grad_(grad) for h, t, d in ((H, T, D), (K, S, D), (K, S, DV)))


def same(path, first: dict, second: dict, *args) -> None:
    """Two calls give the same outputs and, on the quicker path, gradients."""
    results = []
    for options in (first, second):
        with use(path):
            y, lse = attention(*args, with_lse=True, **options)
        more = torch.autograd.grad(y.square().sum() + lse.sin().sum(), args) if path == "torch" else ()
        results.append((y, lse, *more))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@paths
def test_wide_masks_are_no_masks(path):
    q, k, v = qkv()
    lengths = torch.full((2,), 35)
    same(
        path, {}, dict(window=35, global_tokens=3, key_lengths=lengths, documents=torch.ones(2, 35, dtype=torch.int64)), q, k, v
    )
    same(path, dict(causal=False), dict(causal=True, prefix=lengths), q, k, v)
    same(path, dict(window=7), dict(window=7, prefix=torch.zeros(2, dtype=torch.int64)), q, k, v)
    same(path, dict(causal=False), dict(causal=False, window=3, global_tokens=35), q, k, v)


@paths
def test_global_tokens_see_and_are_seen(path):
    """Nothing of what a global token or its neighbours in the window say is lost to the others, and no more than that."""
    q, k, v = qkv(B=1)
    with use(path):
        y = attention(q, k, v, causal=False, window=4, global_tokens=3)
        full, near = attention(q, k, v, causal=False), attention(q, k, v, causal=False, window=4)
        lonely = attention(q[:, :, :7], k[:, :, :7], v[:, :, :7], causal=False, window=4, global_tokens=3)
    torch.testing.assert_close(y[:, :, :3], full[:, :, :3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[:, :, 3], lonely[:, :, 3], rtol=1e-4, atol=1e-5)
    assert ((y - near).abs().amax((0, 1, 3)) > 1e-3).sum() == 34  # the fourth alone has all global tokens in its window


@paths
def test_a_window_of_one_gives_the_values(path):
    q, k, v = qkv(K=2, DV=24)
    with use(path):
        torch.testing.assert_close(attention(q, k, v, window=1), v, rtol=1e-6, atol=1e-6)
        y = attention(q, k, v, window=1, causal=False)
    torch.testing.assert_close(y, v, rtol=1e-6, atol=1e-6)


@paths
def test_packed_documents_are_documents_alone(path):
    q, k, v = qkv(B=1)
    borders = [0, 13, 14, 35]
    ids = document_ids(torch.tensor(borders), 35)
    assert ids.tolist() == [[0] * 13 + [1] + [2] * 21]
    with use(path):
        packed = attention(q, k, v, documents=ids)
        shared = attention(q, k, v, shared_spans=spans(1, 35, 35, documents=ids))
        alone = [attention(*(x[:, :, a:b] for x in (q, k, v))) for a, b in zip(borders, borders[1:], strict=False)]
    torch.testing.assert_close(packed, torch.cat(alone, 2))
    assert torch.equal(packed, shared)


@paths
def test_the_last_queries_are_those_of_the_whole(path):
    q, k, v = qkv(B=1)
    for options in ({}, dict(window=9, global_tokens=4), dict(alibi=torch.rand(2)), dict(prefix=torch.tensor([29]))):
        with use(path):
            whole, part = attention(q, k, v, **options), attention(q[:, :, 21:], k, v, **options)
            one = attention(q[:, :, -1:], k, v, **options)
        torch.testing.assert_close(part, whole[:, :, 21:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one, whole[:, :, -1:], rtol=1e-4, atol=1e-5)


@paths
@pytest.mark.parametrize("first", [2, 25])
@pytest.mark.parametrize("T", [9, 35, 40])
def test_global_tokens_are_counted_from_the_first_of_all(path, first, T):
    """In an encoder, too: of the last T of 50 tokens those before `first` see beyond the window, and no other."""
    q, k, v = qkv(S=50, T=50)
    options, found = dict(causal=False, window=4, global_tokens=first), []
    for way, start in (("torch", 0), (path, 50 - T)):
        with use(way):
            y = attention(q[:, :, start:], k, v, **options)[:, :, -T:]
            found.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-5)


@paths
def test_parts_merge(path):
    """Two sets of keys, one with the sink; the merged result and its gradients are those of all keys at once."""
    q, k, v = qkv(T=5)
    sinks = torch.randn(2, requires_grad=True)
    lengths = torch.tensor([0, 15])  # the first row has nothing in the second part
    results = []
    with use(path):
        y, lse = attention(q, k, v, causal=False, key_lengths=20 + lengths, sinks=sinks, with_lse=True)
        results.append((y, lse, *torch.autograd.grad(y.square().sum() + lse.sin().sum(), (q, k, v, sinks))))
        first = attention(q, k[:, :, :20], v[:, :, :20], causal=False, sinks=sinks, with_lse=True)
        second = attention(q, k[:, :, 20:], v[:, :, 20:], causal=False, key_lengths=lengths, with_lse=True)
        y, lse = merge(*first, *second)
        results.append((y, lse, *torch.autograd.grad(y.square().sum() + lse.sin().sum(), (q, k, v, sinks))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@paths
def test_rows_that_see_nothing(path):
    q, k, v = qkv()
    with use(path):
        y, lse = attention(q, k, v, key_lengths=torch.tensor([0, 5]), window=8, with_lse=True)
        grads = torch.autograd.grad((y, lse), (q, k, v), (torch.randn_like(y), torch.randn_like(lse)), retain_graph=True)
    blind = torch.stack([torch.ones(35, dtype=torch.bool), torch.arange(35) >= 12])[:, None].expand(2, 2, 35)
    assert torch.equal(lse == -torch.inf, blind) and not y[blind].any() and y[~blind].all()
    assert all(g.isfinite().all() for g in grads) and not grads[0][blind].any()
    y, lse = merge(y, lse, y, lse)
    assert torch.equal(lse == -torch.inf, blind) and not y[blind].any()
    assert all(
        g.isfinite().all() for g in torch.autograd.grad((y, lse), (q, k, v), (torch.ones_like(y), torch.zeros_like(lse)))
    )


@paths
def test_no_keys_at_all(path):
    q, k, v = qkv(S=0, T=3)
    with use(path):
        y, lse = attention(q, k, v, causal=False, with_lse=True)
        y.sum().backward()
    assert not y.any() and (lse == -torch.inf).all() and not q.grad.any() and k.grad.shape == k.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_like_pytorch_at_a_real_size(dtype):
    """More queries than one block, and than what is kept for the backward pass."""
    for T, S in ((300, 300), (1, 200), (130, 200)):
        q, k, v = qkv(T=T, S=S, D=32, DV=32, dtype=dtype)
        past = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        theirs = F.scaled_dot_product_attention(q, k, v, past, enable_gqa=True)
        ours = attention(q, k, v)
        dy = torch.randn_like(ours)
        close = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.05, atol=0.05)
        torch.testing.assert_close(ours, theirs, **close)
        found, wanted = (torch.autograd.grad(y, (q, k, v), dy) for y in (ours, theirs))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, **close)


def test_long_rows_on_the_pytorch_path():
    """All masks over several blocks of queries, against the same masks written out."""
    from kernels.attention import pytorch

    q, k, v = qkv(T=290, S=300, D=8, DV=8)
    ids = torch.arange(300).div(70, rounding_mode="floor").repeat(2, 1)
    lengths = torch.tensor([300, 222])
    for options in (
        dict(window=40, global_tokens=5),
        dict(window=40, global_tokens=150, causal=False),
        dict(documents=ids, sinks=torch.randn(2)),
        dict(documents=ids, causal=False, window=30, sinks=torch.randn(2)),
        dict(key_lengths=lengths, softcap=3.0),
        dict(prefix=lengths - 100, alibi=torch.rand(2), window=200),
    ):
        ours, theirs = attention(q, k, v, **options), pytorch(q, k, v, **options)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (ours, theirs)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


WRONG = {
    "q": [dict(q=torch.zeros(2, 4, 5)), dict(q=torch.zeros(2, 4, 60, 16)), dict(q=torch.zeros(2, 4, 50, 300)),
          dict(q=torch.zeros(2, 4, 60, 16), causal=False, window=3), dict(q=torch.zeros(2, 4, 50, 16, dtype=torch.int64))],
    "k": [dict(k=torch.zeros(2, 3, 50, 16)), dict(k=torch.zeros(2, 2, 50, 8)), dict(k=torch.zeros(2, 2, 50, 16).double()),
          dict(k=torch.zeros(1, 2, 50, 16))],
    "v": [dict(v=torch.zeros(2, 2, 49, 16)), dict(v=torch.zeros(2, 2, 50, 300)), dict(v=torch.zeros(2, 2, 50, 16).half())],
    "window": [dict(window=0)],
    "global_tokens": [dict(global_tokens=-1)],
    "softcap": [dict(softcap=-1.0)],
    "scale": [dict(scale=0.0)],
    "documents": [dict(documents=torch.zeros(2, 49, dtype=torch.int64)), dict(documents=torch.zeros(2, 50))],
    "prefix": [dict(prefix=torch.zeros(3, dtype=torch.int64)), dict(prefix=torch.zeros(2, dtype=torch.int64), causal=False)],
    "key_lengths": [dict(key_lengths=torch.zeros(2)), dict(key_lengths=torch.zeros(2, 1, dtype=torch.int64))],
    "alibi": [dict(alibi=torch.zeros(3)), dict(alibi=torch.zeros(4, dtype=torch.int64))],
    "sinks": [dict(sinks=torch.zeros(2)), dict(sinks=torch.zeros(4, dtype=torch.int64))],
    "shared_spans": [
        dict(shared_spans=(torch.zeros(2, 50), torch.zeros(2, 50))),
        dict(shared_spans=(torch.zeros(2, 50).int(),) * 2, key_lengths=torch.zeros(2, dtype=torch.int64)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name, wrong", [(name, wrong) for name, cases in WRONG.items() for wrong in cases])
def test_what_does_not_fit_is_named(name, wrong):
    right = dict(q=torch.zeros(2, 4, 50, 16), k=torch.zeros(2, 2, 50, 16), v=torch.zeros(2, 2, 50, 16))
    attention(**right)
    with pytest.raises(ValueError, match=f"^{name}: "):
        attention(**right | wrong)
