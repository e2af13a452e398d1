"""What the SPEC does not say: the masks of the papers, all blocks = full attention, work in proportion, what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels.block_sparse_attention import bigbird_mask, block_sparse_attention, forward_by_rows, longformer_mask
from kernels.launch import use
from tests.kernels.contract import interpreted


def tensors(T=96, heads=2, D=8, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, T, D, generator=g, dtype=torch.float64).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("causal", [True, False])
def test_all_blocks_are_full_attention(causal):
    q, k, v = tensors()
    y = block_sparse_attention(q, k, v, torch.ones(1, 6, 6, dtype=torch.bool), block=16, causal=causal)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, is_causal=causal), rtol=1e-12, atol=1e-12)


def test_longformer_sees_a_window_and_the_global_blocks():
    mask = longformer_mask(7 * 16 - 3, 16, window=1, global_blocks=2)
    assert mask.shape == (1, 7, 7)
    for i in range(7):
        for j in range(7):
            assert mask[0, i, j] == (abs(i - j) <= 1 or i < 2 or j < 2)


def test_bigbird_adds_random_blocks_that_differ_by_head_and_row():
    plain = longformer_mask(40 * 16, 16, window=1, global_blocks=1)
    mask = bigbird_mask(40 * 16, 16, window=1, global_blocks=1, random_blocks=3, heads=4, seed=1)
    assert mask.shape == (4, 40, 40) and (mask | ~plain).all()  # nothing of Longformer's is lost
    added = (mask & ~plain).sum(-1)
    assert (added[:, 1:] == 3).all() and (added[:, 0] == 0).all()  # the global row sees all already
    assert not torch.equal(mask[0], mask[1])
    assert torch.equal(mask, bigbird_mask(40 * 16, 16, window=1, global_blocks=1, random_blocks=3, heads=4, seed=1))
    assert not torch.equal(mask, bigbird_mask(40 * 16, 16, window=1, global_blocks=1, random_blocks=3, heads=4, seed=2))


def test_a_block_that_is_not_looked_at_does_not_matter():
    q, k, v = tensors()
    mask = longformer_mask(96, 16, window=1)
    before = block_sparse_attention(q, k, v, mask, block=16)
    k[:, :, 80:], v[:, :, 80:] = 100, float("nan")
    after = block_sparse_attention(q, k, v, mask, block=16)
    assert torch.equal(before[:, :, :64], after[:, :, :64]) and after[:, :, 64:].isnan().all()


def test_the_work_is_that_of_the_active_blocks():
    """Products of the PyTorch path, counted: 2 (D + Dv) b^2 a block."""
    q, k, v = tensors(T=640, D=8)
    mask = bigbird_mask(640, 16, random_blocks=2)
    with FlopCounterMode(display=False) as counted:
        forward_by_rows._init_fn(q, k, v, mask, 16, False, 1.0)
    assert counted.get_total_flops() == 2 * 16 * 16**2 * int(mask.sum()) * 4  # 2 rows of 2 heads
    assert mask.sum() < 0.2 * mask.numel()


def test_heads_with_masks_of_their_own_share_keys():
    """Head h has mask h, and reads key head h // G: as if the keys were repeated."""
    q, k, v = tensors(heads=4)
    k, v = k[:, :2], v[:, :2]
    mask = torch.rand(4, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    y = block_sparse_attention(q, k, v, mask, block=16)
    for h in range(4):
        alone = block_sparse_attention(q[:, h : h + 1], k[:, h // 2, None], v[:, h // 2, None], mask[h : h + 1], block=16)
        torch.testing.assert_close(y[:, h : h + 1], alone, rtol=1e-12, atol=1e-12)


GOOD = dict(zip("qkv", tensors(), strict=True)) | dict(mask=torch.ones(1, 6, 6, dtype=torch.bool), block=16)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q", torch.zeros(2, 96, 8)),
        ("q", torch.zeros(2, 2, 96, 300, dtype=torch.float64)),
        ("k", torch.zeros(2, 2, 96, 8)),
        ("k", torch.zeros(2, 2, 96, 9, dtype=torch.float64)),
        ("k", torch.zeros(2, 0, 96, 8, dtype=torch.float64)),
        ("v", torch.zeros(2, 2, 95, 8, dtype=torch.float64)),
        ("v", torch.zeros(2, 2, 96, 300, dtype=torch.float64)),
        ("block", 20),
        ("block", 32),
        ("mask", torch.ones(1, 6, 6)),
        ("mask", torch.ones(3, 6, 6, dtype=torch.bool)),
        ("mask", torch.ones(6, 6, dtype=torch.bool)),
        ("scale", 0.0),
    ],
)
def test_what_does_not_fit_is_named(name, value):
    wanted = "mask" if (name, value) == ("block", 32) else name  # that block would fit another mask
    with pytest.raises(ValueError, match=f"^{wanted}: "):
        block_sparse_attention(**{**GOOD, name: value})


def test_more_queries_than_tokens_cannot_be_causal():
    call = {**GOOD, "k": GOOD["k"][:, :, :80], "v": GOOD["v"][:, :, :80], "mask": GOOD["mask"][:, :, :5]}
    block_sparse_attention(**call)
    with pytest.raises(ValueError, match="^causal: "):
        block_sparse_attention(**call, causal=True)


@pytest.mark.parametrize("call", [dict(window=-1), dict(random_blocks=-1)])
def test_masks_name_what_does_not_fit(call):
    with pytest.raises(ValueError, match=f"^{next(iter(call))}: "):
        bigbird_mask(64, 16, **call)


@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=interpreted)])
def test_a_single_token(path):
    """It sees itself alone: the output is its value, and no query or key can change that."""
    q, k, v, dy = (torch.randn(2, 2, 1, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with use(path):
        y = block_sparse_attention(q, k, v, torch.ones(1, 1, 1, dtype=torch.bool), block=16, causal=True)
        dq, dk, dv = torch.autograd.grad(y, (q, k, v), dy)
    torch.testing.assert_close(y, v)
    torch.testing.assert_close(dv, dy)
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5
