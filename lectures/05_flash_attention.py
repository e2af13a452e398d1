# %% [markdown]
# # FlashAttention from the online softmax
#
# Attention compares every query with every key: T^2 scores for T tokens. Written as three array operations, the scores
# travel to memory and back four times, and for long texts they are nearly all there is to move. FlashAttention (Dao, Fu,
# Ermon, Rudra and Ré 2022, arXiv:2205.14135) computes the same numbers without ever storing a score. It is not an
# approximation. This lecture builds it in NumPy, counts each byte it moves, and holds the count to a formula.

# %%
import time

import lectern
import matplotlib.pyplot as plt
import numpy as np
import torch

from kernels.attention import attention, merge

rng = np.random.default_rng(0)

# %% [markdown]
# ## A softmax that can be interrupted
#
# For one query with scores s and values v, attention is sum_j exp(s_j) v_j / sum_j exp(s_j). Suppose the keys arrive in
# pieces. Of what has been seen, three things are kept: the largest score m, the sum of exp(s - m), and the weighted sum
# o of the values. A piece with a larger score rescales what was there before. (Milakov and Gimelshein 2018,
# arXiv:1805.02867, for the sum; the values go along.)

# %%
def online(pieces) -> tuple[float, float, np.ndarray]:
    m, total, o = -np.inf, 0.0, 0.0
    for s, v in pieces:
        higher = max(m, s.max())
        shrink, weights = np.exp(m - higher), np.exp(s - higher)
        m, total, o = higher, total * shrink + weights.sum(), o * shrink + weights @ v
    return m, total, o


scores, values = 10 * rng.standard_normal(1000), rng.standard_normal((1000, 8))
weights = np.exp(scores - scores.max())
at_once = weights @ values / weights.sum()
for cuts in ([], [500], [1, 2, 3], sorted(rng.choice(np.arange(1, 1000), 60, replace=False))):
    m, total, o = online(zip(np.split(scores, cuts), np.split(values, cuts), strict=True))
    assert np.abs(o / total - at_once).max() < 1e-12
print("softmax over 1000 keys: in 1, 2, 4 or 61 pieces, the result is the same to 1e-12")

# %% [markdown]
# m and the sum can be one number, the log-sum-exp m + log(sum). Two finished parts then merge with weights
# exp(lse_i - lse), which is how keys are spread over many processors when decoding, or over many machines.

# %%
q, k, v = (torch.randn(1, 2, 96, 16, dtype=torch.float64) for _ in range(3))
whole, whole_lse = attention(q, k, v, causal=False, with_lse=True)
parts = [attention(q, k[:, :, part], v[:, :, part], causal=False, with_lse=True) for part in (slice(0, 17), slice(17, 96))]
merged, merged_lse = merge(*parts[0], *parts[1])
print(f"17 keys and 79 keys, merged: off by {(merged - whole).abs().max():.1e}")
assert (merged - whole).abs().max() < 1e-14 and (merged_lse - whole_lse).abs().max() < 1e-14

# %% [markdown]
# ## Two kinds of memory
#
# A GPU has much slow memory and little fast memory (an H200: 141 GB at 4.8 TB/s; 227 kB a processor). Here arrays live
# in `Slow`; whatever is worked with has to be read from it, and results have to be written to it. Both are counted.

# %%
class Slow:
    """Arrays in slow memory; every number that is read or written counts."""

    def __init__(self, **arrays: np.ndarray):
        self.arrays, self.moved = arrays, 0

    def read(self, name: str, rows=slice(None), columns=slice(None)) -> np.ndarray:
        block = self.arrays[name][rows, columns]
        self.moved += block.size
        return block

    def write(self, name: str, block: np.ndarray, rows=slice(None), columns=slice(None)) -> None:
        self.arrays[name][rows, columns] = block
        self.moved += block.size


def fresh(T: int, D: int) -> Slow:
    arrays = {name: rng.standard_normal((T, D)) for name in "qkv"}
    return Slow(**arrays, y=np.full((T, D), np.nan), lse=np.full((T, 1), np.nan))


def plain(memory: Slow, T: int, D: int) -> None:
    """One array operation after the other."""
    memory.arrays |= {name: np.empty((T, T)) for name in ("s", "p")}
    memory.write("s", memory.read("q") @ memory.read("k").T / np.sqrt(D))
    s = memory.read("s")
    e = np.exp(s - s.max(-1, keepdims=True))
    memory.write("p", e / e.sum(-1, keepdims=True))
    memory.write("y", memory.read("p") @ memory.read("v"))


def flash(memory: Slow, T: int, D: int, block: int, causal: bool = False) -> int:
    """A block of queries stays; the blocks of keys and values pass by. Returns the number of scores worked out."""
    scored = 0
    for start in range(0, T, block):
        rows = slice(start, start + block)
        q = memory.read("q", rows)  # (block, D)
        m, total, o = np.full((len(q), 1), -np.inf), np.zeros((len(q), 1)), np.zeros((len(q), D))
        for first in range(0, start + block if causal else T, block):
            columns = slice(first, first + block)
            k, v = memory.read("k", columns), memory.read("v", columns)
            s = q @ k.T / np.sqrt(D)  # (block, block): it exists only here
            if causal and first == start:
                s = np.where(np.tri(*s.shape, dtype=bool), s, -np.inf)
            scored += s.size
            higher = np.maximum(m, s.max(-1, keepdims=True))
            shrink, p = np.exp(m - higher), np.exp(s - higher)
            m, total, o = higher, total * shrink + p.sum(-1, keepdims=True), o * shrink + p @ v
        memory.write("y", o / total, rows)
        memory.write("lse", m + np.log(total), rows)
    return scored


T, D, BLOCK = 1024, 64, 128
memory = fresh(T, D)
plain(memory, T, D)
plain_moved, expected = memory.moved, memory.arrays["y"].copy()
assert plain_moved == 4 * T * D + 4 * T * T  # q, k, v, y once; the scores and the probabilities out and in

memory.moved = 0
flash(memory, T, D, BLOCK)
flash_moved = memory.moved
assert np.abs(memory.arrays["y"] - expected).max() < 1e-13
assert flash_moved == 2 * T * D + T + (T // BLOCK) * 2 * T * D  # q and y once, lse; keys and values once a block of queries
print(f"\nT {T}, D {D}: numbers moved {plain_moved:,} and {flash_moved:,}, a factor of {plain_moved / flash_moved:.1f}")

# %% [markdown]
# Both formulas hold to the last number. Keys and values are read T / block times, so a larger block moves less; but a
# block of queries, one of keys and values, the result and the scores must fit into fast memory. With a fast memory of M
# numbers the block is about M / 4D, and the traffic 8 T^2 D^2 / M: the paper's theorem 2. Plain attention moves T^2
# numbers however large M is. The gain is M / D^2, up to a factor.

# %%
print(f"\n{'block':>6}{'fast memory':>13}{'moved':>13}{'plain / this':>14}")
blocks, moved = [16, 32, 64, 128, 256], []
for block in blocks:
    memory.moved = 0
    flash(memory, T, D, block)
    moved.append(memory.moved)
    needed = block * 4 * D + block * block
    print(f"{block:6}{needed:13,}{memory.moved:13,}{plain_moved / memory.moved:14.1f}")
    assert memory.moved == 2 * T * D + T + (T // block) * 2 * T * D
ratios = [a / b for a, b in zip(moved, moved[1:], strict=False)]
assert all(1.6 < ratio < 2.0 for ratio in ratios)  # twice the block, nearly half the traffic

# %% [markdown]
# ## Causal: half of the blocks are never looked at
#
# A query sees no key after itself. Blocks above the diagonal are skipped, blocks below need no mask; only those on the
# diagonal do. Of n^2 blocks n (n + 1) / 2 are left.

# %%
n = T // BLOCK
memory.moved = 0
scored = flash(memory, T, D, BLOCK, causal=True)
assert scored == n * (n + 1) // 2 * BLOCK**2
assert memory.moved == 2 * T * D + T + n * (n + 1) // 2 * 2 * BLOCK * D
arrays = {name: torch.from_numpy(memory.arrays[name])[None, None] for name in "qkv"}
y, lse = attention(**arrays, causal=True, with_lse=True)
off = np.abs(y[0, 0].numpy() - memory.arrays["y"]).max()
print(f"\ncausal: {scored / T**2:.0%} of the scores; off from kernels/attention.py by {off:.1e}")
assert off < 1e-13
assert np.abs(lse[0, 0].numpy() - memory.arrays["lse"][:, 0]).max() < 1e-13

# %% [markdown]
# ## Backward without the scores
#
# The gradients need the probabilities again: p_ij = exp(s_ij - lse_i), one product and one exponential from q, k and the
# stored log-sum-exp. And softmax's own gradient needs, for each query, one number:
#
#     ds_ij = p_ij (dp_ij - delta_i)        dp = dy v^T        delta_i = sum_j p_ij dp_ij = dy_i . y_i
#
# The sum over all keys equals a product of two vectors that are at hand: nothing has to be kept but y and lse.

# %%
dy = rng.standard_normal((T, D))
q, k, v = (memory.arrays[name] for name in "qkv")
s = np.where(np.tri(T, dtype=bool), q @ k.T / np.sqrt(D), -np.inf)
p = np.exp(s - memory.arrays["lse"])  # worked out again
dp = dy @ v.T
delta = (dy * memory.arrays["y"]).sum(-1, keepdims=True)
assert np.abs(delta - (p * dp).sum(-1, keepdims=True)).max() < 1e-12
ds = p * (dp - delta) / np.sqrt(D)
by_hand = dict(q=ds @ k, k=ds.T @ q, v=p.T @ dy)

leaves = {name: array.clone().requires_grad_() for name, array in arrays.items()}
attention(**leaves, causal=True).backward(torch.from_numpy(dy)[None, None])
for name, gradient in by_hand.items():
    assert np.abs(leaves[name].grad[0, 0].numpy() - gradient).max() < 1e-11
print("gradients by hand equal those of kernels/attention.py to 1e-11")

# %% [markdown]
# What is kept for the backward pass: q, k, v, y and lse, 4 T D + T numbers, against T^2 probabilities a head. Memory
# grows with the length, not with its square; the arithmetic grows by a quarter (one product of five more).
#
# ## On this machine
#
# A CPU has caches instead of fast memory, and nobody tells it what to keep where. The house's CPU path takes blocks of
# queries against all keys they see, and works the probabilities out again when there is more than one block.

# %%
print(f"\n{'T':>6}{'plain ms':>10}{'ours ms':>9}{'kept by plain':>15}{'by ours':>9}   numbers a head")
lengths, kept = [256, 512, 1024, 2048], []
for T in lengths:
    leaves = [torch.randn(1, 4, T, 64).requires_grad_() for _ in range(3)]
    mask = torch.full((T, T), -torch.inf).triu(1)

    def by_rows(q, k, v, mask=mask):
        return (q @ k.mT / 8 + mask).softmax(-1) @ v

    spent, stored = [], []
    for function in (by_rows, lambda q, k, v: attention(q, k, v, causal=True)):
        times = []
        for _ in range(3):
            sizes: dict[int, int] = {}

            def note(tensor, sizes=sizes):
                sizes[tensor.data_ptr()] = tensor.numel()
                return tensor

            start = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                function(*leaves).sum().backward()
            times.append(time.perf_counter() - start)
        spent.append(min(times) * 1e3)
        stored.append(sum(sizes.values()) // 4)
    kept.append(stored)
    print(f"{T:6}{spent[0]:10.1f}{spent[1]:9.1f}{stored[0]:15,}{stored[1]:9,}")
assert kept[-1][0] / kept[-2][0] > 3  # by the square of the length
assert kept[-1][1] / kept[-2][1] < 2.5  # by the length
assert kept[-1][1] <= 5 * lengths[-1] * 64

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
left.loglog(blocks, moved, "o-", label="FlashAttention")
left.axhline(plain_moved, color="gray", label="plain")
left.set(xlabel="block", ylabel="numbers moved, T 1024, D 64", title="A larger block moves less")
left.legend()
right.loglog(lengths, [a for a, _ in kept], "o-", color="gray", label="plain")
right.loglog(lengths, [b for _, b in kept], "o-", label="kernels/attention.py")
right.set(xlabel="T", ylabel="numbers kept for the backward pass, a head", title="Memory linear in the length")
right.legend()
lectern.save_figure(figure, "05_flash_attention")

# %% [markdown]
# `kernels/attention.py` is this with the rest of the world: windows, packed documents, prefixes and padding are all one
# idea there, an interval of keys that each query sees. Its Triton kernels skip the blocks outside every interval, mask
# those on a border, and run the rest without a mask, as in the causal case above.
