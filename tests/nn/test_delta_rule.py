"""The delta rule in chunks: against a loop over time, by what it stores, and in its gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nn.linear_attention.delta_rule import delta_rule

CLOSE = dict(rtol=0, atol=1e-10)


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_loop(q, k, v, beta, g, S, documents):
    """o and S of one row after the other, in NumPy."""
    q, k, v, beta, g, S = (x.detach().numpy().copy() for x in (q, k, v, beta, g, S))
    o = np.zeros(v.shape)
    for b, t, h in np.ndindex(v.shape[:3]):
        if t > 0 and documents[b, t] != documents[b, t - 1]:
            S[b, h] = 0
        kept = np.exp(g[b, t, h]) * S[b, h]
        S[b, h] = kept + np.outer(k[b, t, h], beta[b, t, h] * (v[b, t, h] - kept.T @ k[b, t, h]))
        o[b, t, h] = S[b, h].T @ q[b, t, h]
    return torch.from_numpy(o), torch.from_numpy(S)


def delta_inputs(B=2, T=19, H=2, D=5, V=4, seed=0, steep=1.0):
    q, k, v = (numbers(B, T, H, n, seed=seed + i) for i, n in enumerate((D, D, V)))
    beta, g = numbers(B, T, H, seed=seed + 3).sigmoid(), -steep * numbers(B, T, H, seed=seed + 4).abs()
    return q, nn.functional.normalize(k, dim=-1), v, beta, g, numbers(B, H, D, V, seed=seed + 5)


@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 19), st.integers(1, 2), st.integers(1, 5), st.integers(1, 4)),
    chunk=st.integers(1, 20), runs=st.integers(1, 19), steep=st.sampled_from([0.0, 1.0, 50.0]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_delta_rule(sizes, chunk, runs, steep, seed):
    """For any chunk, decay, division into documents and first state: what the loop gives."""
    q, k, v, beta, g, S = delta_inputs(*sizes, seed=seed, steep=steep)
    documents = (torch.arange(sizes[1]) + torch.arange(sizes[0])[:, None]) // runs % 2
    found = delta_rule(q, k, v, beta, g, initial_state=S, documents=documents, chunk=chunk)
    for one, other in zip(found, by_loop(q, k, v, beta, g, S, documents), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_the_delta_rule(packed):
    """By finite differences, in chunks of three: of all that is given."""
    inputs = [x.requires_grad_() for x in delta_inputs(1, 7, 2, 3, 2)]
    documents = torch.tensor([[0, 0, 1, 1, 1, 1, 0]]) if packed else None
    call = lambda *x: delta_rule(*x[:5], initial_state=x[5], documents=documents, chunk=3)  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_what_is_stored_is_recalled(chunk):
    """With keys at right angles and beta = 1 each value comes back exactly; writing at a key again replaces its value."""
    keys, values, new = torch.linalg.qr(numbers(6, 6)).Q, numbers(6, 4, seed=2), numbers(1, 4, seed=3)
    k, v = torch.cat([keys, keys[2:3]])[None, :, None], torch.cat([values, new])[None, :, None]
    _, S = delta_rule(k, k, v, torch.ones(1, 7, 1, dtype=torch.float64), chunk=chunk)
    expected = values.clone()
    expected[2] = new
    torch.testing.assert_close(keys @ S[0, 0], expected, **CLOSE)
    halves, S = delta_rule(k, k, v, torch.full((1, 7, 1), 0.5, dtype=torch.float64), chunk=chunk)
    torch.testing.assert_close(halves[0, 6, 0], 0.5 * new[0] + 0.25 * values[2], **CLOSE)


def test_delta_rule_without_times():
    q, k, v, beta, g, S = delta_inputs(T=0)
    o, after = delta_rule(q, k, v, beta, g, initial_state=S)
    assert o.shape == v.shape and torch.equal(after, S)


def test_delta_rule_refuses_what_does_not_fit():
    good = dict(zip(("q", "k", "v", "beta", "g", "initial_state"), delta_inputs(), strict=True))
    for name, bad in [
        ("q", good["q"][:, 1:]), ("k", good["k"][..., 1:]), ("v", good["v"][0]), ("beta", good["beta"][..., 0]),
        ("g", good["g"][:1]), ("initial_state", good["initial_state"].mT), ("documents", torch.zeros(2, 3)), ("chunk", 0),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: "):
            delta_rule(**good | {name: bad})
