"""The PyTorch path of attention against PyTorch's own, and against finite differences; blocks of queries change nothing."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import query_blocks
from kernels.attention import attention

# batch, query heads, kv heads, queries, keys, head dim, value dim
SHAPES = [
    (2, 4, 4, 7, 7, 8, 8),
    (2, 4, 2, 9, 9, 4, 6),
    (1, 6, 1, 5, 12, 4, 4),
    (1, 2, 2, 1, 10, 8, 5),
    (2, 3, 3, 1, 1, 3, 3),
    (1, 4, 2, 33, 70, 16, 16),
]


def inputs(shape, dtype=torch.float64, seed=0, scale=1.0):
    batch, heads, kv_heads, queries, keys, dim, value_dim = shape
    made = torch.Generator().manual_seed(seed)
    sizes = ((batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, value_dim))
    return [(scale * torch.randn(*size, dtype=torch.float64, generator=made)).to(dtype) for size in sizes]


def some_documents(shape, seed=0):
    """(B, S) integers: the document of each token, documents of random lengths."""
    batch, _, _, _, keys, _, _ = shape
    return (torch.rand(batch, keys, generator=torch.Generator().manual_seed(seed)) < 0.3).cumsum(1)


def theirs(q, k, v, causal, documents=None):
    """PyTorch's operation, with the mask and the repeated heads written out."""
    queries, keys = q.shape[2], k.shape[2]
    mask = torch.ones(queries, keys, dtype=torch.bool)
    mask = mask.tril(keys - queries) if causal else mask
    if documents is not None:
        mask = mask & (documents[:, None, keys - queries :, None] == documents[:, None, None])
    k, v = (u.repeat_interleave(q.shape[1] // u.shape[1], dim=1) for u in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def forward_and_gradients(operation, arrays, upstream):
    leaves = [array.detach().clone().requires_grad_() for array in arrays]
    y = operation(*leaves)
    y.backward(upstream.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def errors(found, exact):
    """As shares of the length of what is exact; of a gradient that is 0 (a query that sees one key), as lengths: all inputs are
    about 1, and of its rounding in float64 some machines make exactly 0, others 1e-17."""
    lengths = (1.0 if b.norm() < 1e-12 else b.norm() for b in exact)
    return [((a.double() - b).norm() / length).item() for a, b, length in zip(found, exact, lengths, strict=True)]


@pytest.mark.parametrize("block", [3, 256])
@pytest.mark.parametrize(("shape", "causal", "packed"), [*product(SHAPES, [True, False], [True, False])])
def test_equals_pytorch(shape, causal, packed, block, monkeypatch):
    monkeypatch.setattr(query_blocks, "QUERY_BLOCK", block)
    documents = some_documents(shape) if packed else None
    upstream = torch.randn(*inputs(shape)[0].shape[:3], shape[-1], dtype=torch.float64)
    results = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        arrays = inputs(shape, torch.bfloat16)  # the same numbers in every dtype
        arrays = [array.to(dtype) for array in arrays]
        ours = forward_and_gradients(lambda q, k, v: attention(q, k, v, causal=causal, documents=documents), arrays, upstream)
        peer = forward_and_gradients(lambda q, k, v: theirs(q, k, v, causal, documents), arrays, upstream)
        assert all(array.dtype == dtype for array in ours)
        results[dtype] = ours, peer
    exact = results[torch.float64][1]
    assert max(errors(results[torch.float64][0], exact)) < 1e-12
    assert max(errors(results[torch.float32][0], exact)) < 2e-6
    assert max(errors(results[torch.bfloat16][0], exact)) < 2e-2  # half a unit in the last place of bfloat16 is 0.4 %


@pytest.mark.parametrize("block", [4, 256])
@pytest.mark.parametrize(("causal", "packed"), [*product([True, False], [True, False])])
def test_bfloat16_is_as_exact_as_pytorch(causal, packed, block, monkeypatch):
    """Over arrays of a training run's size the errors average out, and the comparison is sharp."""
    monkeypatch.setattr(query_blocks, "QUERY_BLOCK", block)
    shape = (2, 4, 2, 128, 128, 32, 32)
    arrays, documents = inputs(shape, torch.bfloat16), some_documents(shape) if packed else None
    upstream = inputs(shape, torch.bfloat16, seed=1)[0]
    exact = forward_and_gradients(lambda q, k, v: theirs(q, k, v, causal, documents), [a.double() for a in arrays], upstream)
    ours = forward_and_gradients(lambda q, k, v: attention(q, k, v, causal=causal, documents=documents), arrays, upstream)
    peer = forward_and_gradients(lambda q, k, v: theirs(q, k, v, causal, documents), arrays, upstream)
    for mine, other in zip(errors(ours, exact), errors(peer, exact), strict=True):
        assert mine <= 2 * other


@given(
    st.tuples(
        *(st.integers(1, 3) for _ in range(3)), st.integers(1, 7), st.integers(0, 5), st.integers(1, 4), st.integers(1, 4)
    ),
    st.booleans(),
    st.booleans(),
    st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_any_block(sizes, causal, packed, block):
    batch, kv_heads, group, queries, earlier, dim, value_dim = sizes
    shape = (batch, kv_heads * group, kv_heads, queries, queries + earlier, dim, value_dim)
    documents = some_documents(shape, seed=queries) if packed else None
    arrays, upstream = inputs(shape), torch.randn(batch, kv_heads * group, queries, value_dim, dtype=torch.float64)
    exact = forward_and_gradients(lambda q, k, v: theirs(q, k, v, causal, documents), arrays, upstream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(query_blocks, "QUERY_BLOCK", block)
        ours = forward_and_gradients(lambda q, k, v: attention(q, k, v, causal=causal, documents=documents), arrays, upstream)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("block", [2, 256])
@pytest.mark.parametrize(("causal", "packed"), [*product([True, False], [True, False])])
def test_gradcheck(causal, packed, block, monkeypatch):
    monkeypatch.setattr(query_blocks, "QUERY_BLOCK", block)
    shape = (2, 4, 2, 5, 6, 3, 2)
    documents = some_documents(shape) if packed else None
    arrays = [array.requires_grad_() for array in inputs(shape)]
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, causal=causal, documents=documents), arrays)


def test_strided_inputs():
    """Heads that lie beside each other in memory, as a projection leaves them."""
    shape = (2, 4, 2, 6, 6, 8, 8)
    arrays = inputs(shape)
    strided = [array.transpose(1, 2).contiguous().transpose(1, 2) for array in arrays]
    assert not strided[0].is_contiguous()
    upstream = inputs(shape, seed=1)[0].transpose(1, 2).contiguous().transpose(1, 2)
    straight = forward_and_gradients(lambda q, k, v: attention(q, k, v, causal=True), arrays, upstream.contiguous())
    for a, b in zip(
        forward_and_gradients(lambda q, k, v: attention(q, k, v, causal=True), strided, upstream), straight, strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(0, 4, 2, 3, 3, 4, 4), (2, 4, 2, 0, 3, 4, 4), (2, 4, 2, 0, 0, 4, 4)])
def test_nothing_in_nothing_out(shape):
    arrays = [array.requires_grad_() for array in inputs(shape)]
    y = attention(*arrays, causal=True)
    assert y.shape == (shape[0], shape[1], shape[3], shape[6])
    y.sum().backward()
    assert all(array.grad.shape == array.shape and not array.grad.any() for array in arrays)


def test_large_scores_stay_finite():
    arrays = inputs((1, 2, 1, 6, 6, 8, 8), torch.float32, scale=1e4)
    found = forward_and_gradients(lambda q, k, v: attention(q, k, v, causal=True), arrays, torch.ones(1, 2, 6, 8))
    assert all(array.isfinite().all() for array in found)


@pytest.mark.parametrize("window", [None, 64])
def test_memory_kept_for_the_backward_pass_is_linear(window, monkeypatch):
    """With more than one block of queries, the probabilities are not among what is kept: q, k, v, the output and the lse."""
    monkeypatch.setattr(query_blocks, "KEEP", 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        attention(*(array.requires_grad_() for array in inputs((1, 1, 1, 64, 64, 2, 2))), causal=True, window=window)
    assert sum(kept) <= 5 * 64 * 2
