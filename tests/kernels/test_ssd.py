"""What the SPEC of ssd does not say: its errors, decoding, packing, what it is a case of, and all options at once."""

import pytest
import torch

from kernels.linear_attention import linear_attention
from kernels.selective_scan import selective_scan
from kernels.ssd import SPEC, ssd, step
from tests.kernels.contract import check, interpreted, seeded

B, T, H, P, G, N = 2, 11, 4, 5, 2, 3
GOOD = dict(
    x=torch.randn(B, T, H, P),
    dt=torch.randn(B, T, H),
    A=-torch.rand(H),
    B=torch.randn(B, T, G, N),
    C=torch.randn(B, T, G, N),
    D=torch.randn(H),
    dt_bias=torch.randn(H),
    dt_softplus=True,
)


@pytest.mark.parametrize(
    "name, value",
    [
        ("x", torch.randn(B, T, H)),
        ("x", torch.ones(B, T, H, P, dtype=torch.int64)),
        ("x", torch.randn(B, T, H, 257)),
        ("dt", torch.randn(B, T, H + 1)),
        ("A", torch.randn(H, 1)),
        ("B", torch.randn(B, T, 3, N)),
        ("B", torch.randn(B, T, N)),
        ("B", torch.randn(B, T, G, 257)),
        ("B", torch.randn(B, T, G, N, dtype=torch.float64)),
        ("C", torch.randn(B, T, G, N + 1)),
        ("C", torch.randn(B, T, G, N, dtype=torch.float64)),
        ("D", torch.randn(P)),
        ("dt_bias", torch.randn(H + 1)),
        ("initial_state", torch.randn(B, H, N, P)),
        ("documents", torch.zeros(B, T + 1, dtype=torch.int64)),
        ("documents", torch.zeros(B, T)),
    ],
)
def test_errors_name_the_argument(name, value):
    with pytest.raises(ValueError, match=f"^{name}: "):
        ssd(**{**GOOD, name: value})


def test_step_wants_one_time():
    with pytest.raises(ValueError, match="^x: "):
        step(*(GOOD[name] for name in ("x", "dt", "A", "B", "C")), state=torch.zeros(B, H, P, N))


def at(when) -> dict:
    return {k: v[:, when] if k in ("x", "dt", "B", "C") else v for k, v in GOOD.items()}


def test_steps_and_pieces_equal_the_whole():
    y, final = ssd(**GOOD)
    first, state = ssd(**at(slice(0, 3)))
    parts = [first]
    for t in range(3, T):
        one, state = step(**at(t), state=state)
        parts.append(one.unsqueeze(1))
    torch.testing.assert_close(torch.cat(parts, 1), y)
    torch.testing.assert_close(state, final)


def test_packed_documents_equal_each_alone():
    y, final = ssd(**GOOD, documents=torch.tensor([[3, 3, 3, 3, 1, 1, 1, 3, 3, 3, 3]] * B))
    alone = [ssd(**at(slice(*ends))) for ends in ((0, 4), (4, 7), (7, 11))]
    torch.testing.assert_close(y, torch.cat([piece for piece, _ in alone], 1))
    torch.testing.assert_close(final, alone[-1][1])


def test_it_is_linear_attention_with_a_decay_a_head_and_time():
    y, final = ssd(**GOOD | dict(D=None, dt_bias=None, dt_softplus=False, dt=GOOD["dt"].abs()))
    dt = GOOD["dt"].abs()
    o, state = linear_attention(GOOD["C"], GOOD["B"], GOOD["x"] * dt[..., None], dt * GOOD["A"], scale=1.0)
    torch.testing.assert_close(y, o)
    torch.testing.assert_close(final, state.mT)


def test_it_is_a_selective_scan_whose_channels_share_a_decay():
    """Dao and Gu 2024, section 3: A a number times the identity within a head."""
    call = GOOD | dict(B=GOOD["B"][:, :, :1], C=GOOD["C"][:, :, :1])
    y, final = ssd(**call)
    each = [GOOD[name].repeat_interleave(P, -1) for name in ("dt", "A", "D", "dt_bias")]
    scan, state = selective_scan(
        GOOD["x"].flatten(2), each[0], each[1][:, None].expand(-1, N), call["B"][:, :, 0], call["C"][:, :, 0], each[2],
        delta_bias=each[3], delta_softplus=True,
    )  # fmt: skip
    torch.testing.assert_close(y.flatten(2), scan)
    torch.testing.assert_close(final.flatten(1, 2), state)


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=interpreted)])
def test_everything_at_once(path, softplus):
    draw, T = seeded(4), 37
    case = dict(
        x=draw.normal(2, T, 4, 19),
        dt=draw.normal(2, T, 4) if softplus else draw.uniform(2, T, 4),
        A=-draw.uniform(4, low=0.1, high=2),
        B=draw.normal(2, T, 2, 7),
        C=draw.normal(2, T, 2, 7),
        D=draw.normal(4),
        dt_bias=draw.uniform(4),
        dt_softplus=softplus,
        initial_state=draw.normal(2, 4, 19, 7),
        documents=draw.integers(2, T, high=16) // 16,
    )
    check(SPEC, case, torch.float32, path)


def test_agrees_with_a_scan_at_a_real_size():
    call = dict(x=torch.randn(1, 300, 4, 32), dt=torch.randn(1, 300, 4), A=-torch.rand(4) * 4)
    call |= dict(B=torch.randn(1, 300, 1, 16), C=torch.randn(1, 300, 1, 16), D=torch.randn(4), dt_softplus=True)
    for a, b in zip(ssd(**call), SPEC.pytorch(**call), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
