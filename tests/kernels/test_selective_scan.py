"""What the SPEC of selective_scan does not say: its errors, decoding, packing, Theorem 1, and all options at once."""

import pytest
import torch

from kernels.selective_scan import SPEC, pytorch, selective_scan, step
from tests.kernels.contract import check, interpreted, seeded

B, T, D, N = 2, 11, 6, 4
GOOD = dict(
    u=torch.randn(B, T, D),
    delta=torch.randn(B, T, D),
    A=-torch.rand(D, N),
    B=torch.randn(B, T, N),
    C=torch.randn(B, T, N),
    D=torch.randn(D),
    z=torch.randn(B, T, D),
    delta_bias=torch.randn(D),
    delta_softplus=True,
)


@pytest.mark.parametrize(
    "name, value",
    [
        ("u", torch.randn(T, D)),
        ("u", torch.ones(B, T, D, dtype=torch.int64)),
        ("delta", torch.randn(B, T, D + 1)),
        ("delta", torch.randn(B, T, D, dtype=torch.float64)),
        ("A", torch.randn(D + 1, N)),
        ("A", torch.randn(D, 257)),
        ("A", torch.randn(D, 0)),
        ("B", torch.randn(B, T, N + 1)),
        ("C", torch.randn(B, T + 1, N)),
        ("z", torch.randn(B, T)),
        ("D", torch.randn(N)),
        ("delta_bias", torch.randn(D, 1)),
        ("initial_state", torch.randn(B, N, D)),
        ("documents", torch.zeros(B, T + 1, dtype=torch.int64)),
        ("documents", torch.zeros(B, T)),
    ],
)
def test_errors_name_the_argument(name, value):
    with pytest.raises(ValueError, match=f"^{name}: "):
        selective_scan(**{**GOOD, name: value})


def test_step_wants_one_time():
    with pytest.raises(ValueError, match="^u: "):
        step(*(GOOD[k] for k in ("u", "delta", "A", "B", "C")), state=torch.zeros(B, D, N))


def at(when) -> dict:
    return {k: v[:, when] if k in ("u", "delta", "B", "C", "z") else v for k, v in GOOD.items()}


def test_steps_and_pieces_equal_the_whole():
    y, final = selective_scan(**GOOD)
    first, state = selective_scan(**at(slice(0, 3)))
    parts = [first]
    for t in range(3, T):
        one, state = step(**at(t), state=state)
        parts.append(one.unsqueeze(1))
    torch.testing.assert_close(torch.cat(parts, 1), y)
    torch.testing.assert_close(state, final)


def test_packed_documents_equal_each_alone():
    documents = torch.tensor([[3, 3, 3, 3, 1, 1, 1, 3, 3, 3, 3]] * B)
    y, final = selective_scan(**GOOD, documents=documents)
    alone = [selective_scan(**at(slice(*ends))) for ends in ((0, 4), (4, 7), (7, 11))]
    torch.testing.assert_close(y, torch.cat([piece for piece, _ in alone], 1))
    torch.testing.assert_close(final, alone[-1][1])


def test_one_state_is_a_gated_average():
    """Gu and Dao 2023, Theorem 1 with Euler's rule for B: N = 1, A = -1, B = C = 1; the decay is 1 - sigmoid(delta)."""
    u, delta = torch.randn(1, T, D), torch.randn(1, T, D)
    one = torch.ones(1, T, 1)
    y, _ = selective_scan(u, delta, -torch.ones(D, 1), one, one, delta_softplus=True)
    h = torch.zeros(1, D)
    for t in range(T):
        h = (1 - torch.sigmoid(delta[:, t])) * h + torch.nn.functional.softplus(delta[:, t]) * u[:, t]
        torch.testing.assert_close(y[:, t], h)


def everything(T: int, seed: int, softplus: bool) -> dict:
    draw = seeded(seed)
    B, D, N = 2, 35, 3
    return dict(
        u=draw.normal(B, T, D),
        delta=draw.normal(B, T, D, scale=5.0) if softplus else draw.uniform(B, T, D),
        A=-draw.uniform(D, N, low=0.1, high=4),
        B=draw.normal(B, T, N),
        C=draw.normal(B, T, N),
        D=draw.normal(D),
        z=draw.normal(B, T, D),
        delta_bias=draw.uniform(D),
        delta_softplus=softplus,
        initial_state=draw.normal(B, D, N),
        documents=draw.integers(B, T, high=8) // 8,
    )


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=interpreted)])
def test_everything_at_once(path, softplus):
    check(SPEC, everything(19, 1, softplus), torch.float32, path)


def test_long_sequences_cross_chunks():
    check(SPEC, everything(150, 2, True), torch.float32, "torch")


def test_agrees_with_a_loop_at_a_real_size():
    call = dict(GOOD, u=torch.randn(1, 256, 128), delta=torch.randn(1, 256, 128), A=-torch.rand(128, 16) * 8, z=None)
    call |= dict(B=torch.randn(1, 256, 16), C=torch.randn(1, 256, 16), D=torch.randn(128), delta_bias=torch.randn(128))
    for a, b in zip(selective_scan(**call), pytorch(**call), strict=True):
        torch.testing.assert_close(a, b)
