"""What the SPEC of causal_conv1d does not say: its errors, decoding, packing, and one realistic size."""

import pytest
import torch

from kernels.causal_conv1d import SPEC, causal_conv1d, pytorch, step
from tests.kernels.contract import check, interpreted, seeded

B, T, C, W = 2, 9, 6, 4
GOOD = dict(x=torch.randn(B, T, C), weight=torch.randn(C, W), bias=torch.randn(C), activation="silu")


@pytest.mark.parametrize(
    "name, value",
    [
        ("x", torch.randn(T, C)),
        ("x", torch.ones(B, T, C, dtype=torch.int64)),
        ("x", torch.randn(B, T, 0)),
        ("weight", torch.randn(C + 1, W)),
        ("weight", torch.randn(C, 1)),
        ("weight", torch.randn(C, 9)),
        ("weight", torch.randn(C)),
        ("bias", torch.randn(C + 1)),
        ("activation", "gelu"),
        ("initial_state", torch.randn(B, W, C)),
        ("initial_state", torch.randn(B, W - 1, C, dtype=torch.float64)),
        ("documents", torch.zeros(B, T + 1, dtype=torch.int64)),
        ("documents", torch.zeros(B, T)),
    ],
)
def test_errors_name_the_argument(name, value):
    with pytest.raises(ValueError, match=f"^{name}: "):
        causal_conv1d(**{**GOOD, name: value})


def test_step_wants_one_time():
    with pytest.raises(ValueError, match="^x: "):
        step(torch.randn(B, 1, C), torch.zeros(B, W - 1, C), GOOD["weight"])


def test_widest_and_narrowest_filters_are_allowed():
    for taps in (2, 8):
        assert causal_conv1d(GOOD["x"], torch.randn(C, taps))[1].shape == (B, taps - 1, C)


def test_steps_and_pieces_equal_the_whole():
    y, final = causal_conv1d(**GOOD)
    first, state = causal_conv1d(**{**GOOD, "x": GOOD["x"][:, :2]})  # fewer times than the state holds
    parts = [first]
    for t in range(2, T):
        one, state = step(GOOD["x"][:, t], state, GOOD["weight"], GOOD["bias"], activation="silu")
        parts.append(one.unsqueeze(1))
    torch.testing.assert_close(torch.cat(parts, 1), y)
    torch.testing.assert_close(state, final)


def test_packed_documents_equal_each_alone():
    documents = torch.tensor([[7, 7, 7, 7, 7, 1, 1, 7, 7]] * B)
    y, final = causal_conv1d(**GOOD, documents=documents)
    pieces = [causal_conv1d(**{**GOOD, "x": piece}) for piece in GOOD["x"].split([5, 2, 2], 1)]
    torch.testing.assert_close(y, torch.cat([piece for piece, _ in pieces], 1))
    torch.testing.assert_close(final, pieces[-1][1])


def test_agrees_with_conv1d_at_a_real_size():
    x, weight, bias = torch.randn(2, 512, 256, requires_grad=True), torch.randn(256, 4, requires_grad=True), torch.randn(256)
    g = torch.randn(2, 512, 256)
    ours, theirs = (f(x, weight, bias, activation="silu")[0] for f in (causal_conv1d, pytorch))
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), g) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("T", [2, 41])
@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=interpreted)])
def test_everything_at_once(path, T):
    """Documents shorter than the filter, one of them begun in the state, some ending within it."""
    draw = seeded(3)
    case = dict(
        x=draw.normal(2, T, 35),
        weight=draw.normal(35, 4),
        bias=draw.normal(35),
        activation="silu",
        initial_state=draw.normal(2, 3, 35),
        documents=draw.integers(2, T, high=3) // 3,
    )
    check(SPEC, case, torch.float32, path)
    check(SPEC, case | dict(documents=None), torch.float32, path)
