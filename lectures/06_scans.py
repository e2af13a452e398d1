# %% [markdown]
# # Scans: from a loop to a parallel prefix to matmuls
#
# A recurrent layer keeps a state and updates it at each token: h_t = a_t h_{t-1} + b_t. That is cheap, and its memory
# does not grow with the text; but it looks like a loop, one step after the other, which is what a GPU is worst at. Here
# the same numbers are computed in three ways: by the loop, by a parallel prefix as in Mamba (Gu and Dao 2023,
# arXiv:2312.00752), and by matrix products as in Mamba-2 (Dao and Gu 2024, arXiv:2405.21060). For each the arithmetic
# is counted, and the longest chain of operations that have to wait for each other.

# %%
import time

import lectern
import matplotlib.pyplot as plt
import numpy as np
import torch

from kernels.selective_scan import selective_scan
from kernels.ssd import ssd

rng = np.random.default_rng(0)

# T time, N state, P channels: the state of a head is a matrix (N, P)
T, N, P = 1024, 16, 32
a = rng.uniform(0.8, 1.0, T)  # how much is kept, chosen by the data in a real model
B, C = rng.standard_normal((2, T, N))  # where to write, what to read
x = rng.standard_normal((T, P))
b = B[:, :, None] * x[:, None, :]  # (T, N, P): what each token adds
y_expected = np.empty((T, P))

# %% [markdown]
# ## The loop
#
# Each step multiplies the state by a number, adds a matrix, and reads a vector out of it.

# %%
FLOPS, DEPTH = {}, {}


def loop(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Every state h_t (T, N, P)."""
    h, states = np.zeros(b.shape[1:]), np.empty_like(b)
    for t in range(len(a)):
        h = a[t] * h + b[t]
        states[t] = h
    return states


states = loop(a, b)
y_expected = np.einsum("tn,tnp->tp", C, states)
FLOPS["loop"], DEPTH["loop"] = 2 * T * N * P, T
print(f"loop: {FLOPS['loop']:,} FLOPs for the states, a chain of {T} steps")

# %% [markdown]
# ## A parallel prefix
#
# One step is the function h -> a h + b. Two steps in a row are again such a function:
#
#     a2 (a1 h + b1) + b2 = (a2 a1) h + (a2 b1 + b2)
#
# So pairs (a, b) can be combined, and the combination is associative: it does not matter which neighbours are combined
# first. Sums have this property, and everything known about prefix sums applies (Blelloch 1990, "Prefix sums and their
# applications").

# %%
def combine(first, second):
    (a1, b1), (a2, b2) = first, second
    return a2 * a1, a2[..., None, None] * b1 + b2


def piece(i):
    return a[i : i + 1], b[i : i + 1]


left = combine(combine(piece(0), piece(1)), piece(2))
right = combine(piece(0), combine(piece(1), piece(2)))
assert all(np.allclose(p, q, rtol=1e-14) for p, q in zip(left, right, strict=True))
assert np.allclose(left[1][0], states[2], rtol=1e-12)  # and combining the first three gives the third state


def doubling(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, int, int]:
    """In each round every place combines with the one 1, 2, 4, … before it: log2 T rounds. States, combinations, rounds."""
    combined, rounds, reach = 0, 0, 1
    while reach < len(a):
        later = combine((a[:-reach], b[:-reach]), (a[reach:], b[reach:]))
        a, b = np.concatenate([a[:reach], later[0]]), np.concatenate([b[:reach], later[1]])
        combined, rounds, reach = combined + len(later[0]), rounds + 1, 2 * reach
    return b, combined, rounds


def tree(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Combine neighbours, solve the half-length problem, fill in every second place: fewer combinations, more rounds."""
    if len(a) == 1:
        return b, 0, 0
    pairs = combine((a[0::2], b[0::2]), (a[1::2], b[1::2]))
    odd, combined, rounds = tree(*pairs)
    found = np.empty_like(b)
    found[1::2], found[0] = odd, b[0]
    found[2::2] = a[2::2, None, None] * odd[:-1] + b[2::2]
    return found, combined + len(a) // 2 + len(a) // 2 - 1, rounds + 2


for name, function in (("doubling", doubling), ("tree", tree)):
    found, combined, rounds = function(a, b)
    assert np.abs(found - states).max() < 1e-11
    FLOPS[name], DEPTH[name] = combined * (2 * N * P + 1), rounds
    print(f"{name}: {FLOPS[name]:,} FLOPs, a chain of {rounds} rounds")
assert DEPTH["doubling"] == np.log2(T) and DEPTH["tree"] == 2 * np.log2(T)
assert FLOPS["doubling"] > 8 * FLOPS["loop"]  # log2 T - 1 + 1/T times as many combinations …
assert FLOPS["tree"] < 2.1 * FLOPS["loop"]  # … or about twice as many

# %% [markdown]
# The chain is no longer a thousand steps but ten or twenty, at the price of twice the arithmetic or more. All of it is
# still elementwise: no matrix product, none of the units that do nine tenths of a GPU's arithmetic.
#
# ## Matrix products
#
# Write the sum out: y_i = sum over j <= i of (a_i … a_{j+1}) (C_i . B_j) x_j. That is attention without a softmax, with a
# mask that decays: Y = (L * C B^T) X, where L_ij = a_i … a_{j+1}. It takes T^2 products; but it is two matrix products. The
# logarithms of a, summed, give all of L at once.

# %%
def decay(log_a: np.ndarray) -> np.ndarray:
    """L (…, Q, Q): the product of a over j+1 … i below the diagonal, 1 on it, 0 above."""
    total = np.cumsum(log_a, -1)
    exponent = total[..., :, None] - total[..., None, :]
    return np.exp(np.where(np.tri(log_a.shape[-1], dtype=bool), exponent, -np.inf))


y = (decay(np.log(a)) * (C @ B.T)) @ x
assert np.abs(y - y_expected).max() < 1e-10
FLOPS["all at once"], DEPTH["all at once"] = 2 * T * T * (N + P), 2
print(f"all at once: {FLOPS['all at once']:,} FLOPs, a chain of 2 matrix products")

# %% [markdown]
# The best of both: chunks of Q tokens. Within a chunk, by matrix products; what a chunk leaves behind is one state, and a
# short loop over the chunks hands it on.

# %%
def chunked(a: np.ndarray, B: np.ndarray, C: np.ndarray, x: np.ndarray, Q: int) -> np.ndarray:
    chunks = len(a) // Q
    log_a = np.log(a).reshape(chunks, Q)
    B, C, x = (array.reshape(chunks, Q, -1) for array in (B, C, x))
    total = np.cumsum(log_a, -1)  # (chunks, Q)
    y = (decay(log_a) * (C @ B.mT)) @ x  # within each chunk
    to_end = np.exp(total[:, -1:] - total)  # what is left of a token at the end of its chunk
    left = (B * to_end[..., None]).mT @ x  # (chunks, N, P)
    h = np.zeros(left.shape[1:])
    for c in range(chunks):
        y[c] += (C[c] * np.exp(total[c])[:, None]) @ h  # what the chunks before left
        h = np.exp(total[c, -1]) * h + left[c]
    return y.reshape(-1, y.shape[-1])


for Q in (16, 64, 256):
    assert np.abs(chunked(a, B, C, x, Q) - y_expected).max() < 1e-10
    FLOPS[f"chunks of {Q}"] = 2 * T * Q * (N + P) + 4 * T * N * P
    DEPTH[f"chunks of {Q}"] = T // Q + 3

# %% [markdown]
# The same numbers each time. Which way is fastest depends on who computes. NumPy's matrix products run on all that the
# processor has; elementwise arithmetic waits for memory.

# %%
def milliseconds(function) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def read(states: np.ndarray) -> np.ndarray:
    return np.einsum("tn,tnp->tp", C, states)


TIMES = {
    "loop": milliseconds(lambda: read(loop(a, b))),
    "doubling": milliseconds(lambda: read(doubling(a, b)[0])),
    "tree": milliseconds(lambda: read(tree(a, b)[0])),
    "all at once": milliseconds(lambda: (decay(np.log(a)) * (C @ B.T)) @ x),
    **{f"chunks of {Q}": milliseconds(lambda Q=Q: chunked(a, B, C, x, Q)) for Q in (16, 64, 256)},
}
print(f"\nT {T}, N {N}, P {P}\n{'way':16}{'FLOPs':>13}{'chain':>7}{'ms here':>9}")
for way in TIMES:
    print(f"{way:16}{FLOPS[way]:13,}{DEPTH[way]:7}{TIMES[way]:9.2f}")
assert min(TIMES[f"chunks of {Q}"] for Q in (16, 64)) < min(TIMES["loop"], TIMES["doubling"], TIMES["all at once"])
assert FLOPS["chunks of 64"] > FLOPS["loop"]  # faster, with more arithmetic

# %% [markdown]
# ## Why Mamba-2 gave something up
#
# Mamba's decay is not one number a token but one for every channel and state, a (T, P, N). The combination of pairs works
# as before. The product C_i . B_j no longer separates from the decay, there would be one matrix L for every channel and
# state: no matrix product. Mamba-2 makes the decay one number a head, and gets its matrices. (Section 6 of its paper: the
# state can then be much larger at the same speed, 64 to 256 instead of 16.)
#
# The house's kernels are these two: `kernels/selective_scan.py`, a loop over time in registers, many channels side by
# side; `kernels/ssd.py`, the chunks above.

# %%
u, delta = torch.from_numpy(x)[None], torch.from_numpy(rng.uniform(0.01, 0.5, (1, T, P)))
A = -torch.from_numpy(rng.uniform(0.5, 4.0, (P, N)))
rows = dict(B=torch.from_numpy(B)[None], C=torch.from_numpy(C)[None])
y, final = selective_scan(u, delta, A, **rows)
per_channel = np.exp(delta[0, :, :, None].numpy() * A.numpy())  # (T, P, N)
added = (delta * u)[0, :, :, None].numpy() * B[:, None, :]
h = np.zeros((P, N))
for t in range(T):
    h = per_channel[t] * h + added[t]
    assert np.abs(C[t] @ h.T - y[0, t].numpy()).max() < 1e-10
assert np.abs(final[0].numpy() - h).max() < 1e-10

log_decay = torch.from_numpy(np.log(a))[None, :, None]  # dt A of one head, with A = -1
y, _ = ssd(torch.from_numpy(x)[None, :, None] / -log_decay[..., None], -log_decay, torch.tensor([-1.0]).double(),
           rows["B"][:, :, None], rows["C"][:, :, None])  # fmt: skip
print(f"\nkernels/ssd.py differs from the loop by {np.abs(y[0, :, 0].numpy() - y_expected).max():.1e}")
assert np.abs(y[0, :, 0].numpy() - y_expected).max() < 1e-9

# %%
figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
for way in TIMES:
    axes.loglog(DEPTH[way], FLOPS[way], "o")
    axes.annotate(f"{way}, {TIMES[way]:.1f} ms", (DEPTH[way], FLOPS[way]), xytext=(6, 4), textcoords="offset points")
axes.set(xlabel="longest chain of steps", ylabel="FLOPs", title="One recurrence, computed in many ways", xlim=(1, 8000))
lectern.save_figure(figure, "06_scans")
