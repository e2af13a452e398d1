# %% [markdown]
# # A row on many processes: who sends what when no machine holds all of it
#
# A row of a million tokens does not fit where a row of a thousand did. Share its positions out: norms, feed-forward layers
# and the head work on each token alone and notice nothing. Attention does: every query reads every key. This lecture counts
# what four ways of getting queries and keys together cost, checks that all give the same, and then looks at who waits for
# whom under a causal mask.
#
# DeepSpeed Ulysses (Jacobs et al. 2023, arXiv:2309.14509), ring attention (Liu et al. 2023, arXiv:2310.01889), and both at
# once with rows made of pictures and text: LongVILA (Chen et al. 2024, arXiv:2408.10188).
#
# Letters: N positions, P processes, H heads of D numbers, C = H D; R places on a ring, U processes of each place.

# %%
import itertools
import math

import lectern
import matplotlib.pyplot as plt
import numpy as np
import torch

from kernels.attention import attention, merge, reference

H, D = 16, 4
C = H * D

# %% [markdown]
# ## Processes as a list
#
# A process is an entry of a list: its arrays are (H, N / P, D). What it sends goes through a `Wire`, which counts numbers that
# leave it. An all-gather sends one's part to every other process; an all-to-all sends a different part to each.


# %%
class Wire:
    """Counts what each process sends to others, and what it holds of others' keys and values at most."""

    def __init__(self, processes: int):
        self.sent, self.held = np.zeros(processes, int), np.zeros(processes, int)

    def send(self, x: np.ndarray, origin: int, to: int) -> np.ndarray:
        self.sent[origin] += x.size if origin != to else 0
        return x

    def gather(self, parts: list[np.ndarray], axis: int) -> list[np.ndarray]:
        """To every process all of them, one behind the other."""
        everyone = range(len(parts))
        return [np.concatenate([self.send(parts[p], p, r) for p in everyone], axis) for r in everyone]

    def exchange(self, parts: list[np.ndarray], split: int, join: int, among: list[list[int]]) -> list[np.ndarray]:
        """Within each group of processes: parts of one's array along `split` to each, those that come joined along `join`."""
        found = list(parts)
        for group in among:
            pieces = {p: np.split(parts[p], len(group), split) for p in group}
            for r, own in enumerate(group):
                found[own] = np.concatenate([self.send(pieces[p][r], p, own) for p in group], join)
        return found


def shared_out(x: np.ndarray, positions: np.ndarray) -> list[np.ndarray]:
    return [x[:, at] for at in positions]


def in_order(N: int, P: int) -> np.ndarray:
    return np.arange(N).reshape(P, -1)


def zigzag(N: int, R: int, U: int = 1) -> np.ndarray:
    """Place r of R has chunks r and 2R - 1 - r of 2R; its U processes share them in order: (R U, N / (R U))."""
    chunks = np.arange(N).reshape(2 * R, -1)
    return np.stack([np.concatenate([chunks[r], chunks[2 * R - 1 - r]]) for r in range(R)]).reshape(R * U, -1)


def one(q, k, v, **options):
    """Attention by one process, (H, n, D); `reference` is the equation in NumPy."""
    return reference(q[None], k[None], v[None], **options)


q, k, v = (np.random.default_rng(seed).standard_normal((H, 32, D)) for seed in range(3))
alone = one(q, k, v)[0]

# %% [markdown]
# ## Gather all keys and values
#
# The plain way. Each process then has its own queries and everybody's keys; a query at i sees the first i + 1 of them.


# %%
def by_gathering(q, k, v, P: int) -> tuple[np.ndarray, Wire]:
    wire, at = Wire(P), in_order(q.shape[1], P)
    keys, values = (wire.gather(shared_out(x, at), 1) for x in (k, v))
    wire.held += 2 * k.size
    y = [one(q[:, at[p]], keys[p][:, : at[p][-1] + 1], values[p][:, : at[p][-1] + 1])[0] for p in range(P)]
    return np.concatenate(y, 1), wire


# %% [markdown]
# ## Ulysses: heads instead of positions
#
# Heads never meet inside attention. So an all-to-all turns N / P positions of all heads into all positions of H / P heads,
# any attention runs there, and a second all-to-all turns back. A process sends q, k, v and y, a P-th of the row each, all but
# what it keeps: 4 N C / P (P - 1) / P numbers.


# %%
def by_ulysses(q, k, v, P: int) -> tuple[np.ndarray, Wire]:
    wire, at, everyone = Wire(P), in_order(q.shape[1], P), [list(range(P))]
    mine = [wire.exchange(shared_out(x, at), split=0, join=1, among=everyone) for x in (q, k, v)]  # (H / P, N, D) each
    wire.held += mine[1][0].size * 2
    y = [one(*(x[p] for x in mine))[0] for p in range(P)]
    return np.concatenate(wire.exchange(y, split=1, join=0, among=everyone), 1), wire


found, wire = by_ulysses(q, k, v, P=4)
print(f"Ulysses, P = 4, H = {H}, N = 32: differs from one process by {abs(found - alone).max()}")
assert np.array_equal(found, alone)  # not one bit: the same attention over the same numbers
assert (wire.sent == 4 * (32 * C // 4) * 3 // 4).all()

# %% [markdown]
# ## The ring: keys and values go round
#
# Each process attends to its own part, then passes keys and values to the next and gets those of the one before. Softmax over
# several parts is merged by the parts' log-sum-exp: with w_i = exp(lse_i - lse), y = sum of w_i y_i.
#
# The backward pass knows y_i's share too. dy_i = w_i dy, and lse_i matters for all shares: dlse_i = w_i (dy . (y_i - y)). Here
# against autograd through the merge of two parts.

# %%
torch.manual_seed(0)
x = [torch.randn(1, 2, 6, D, dtype=torch.float64) for _ in range(5)]  # queries, two parts of keys and values
parts = [attention(x[0], x[i], x[i + 1], causal=False, with_lse=True) for i in (1, 3)]
for y_i, lse_i in parts:
    y_i.requires_grad_()
    lse_i.requires_grad_()
y, lse = merge(*parts[0], *parts[1])
dy = torch.randn_like(y)
y.backward(dy)
for y_i, lse_i in parts:
    w = torch.exp(lse_i - lse)
    assert torch.allclose(y_i.grad, w[..., None] * dy, atol=1e-14)
    assert torch.allclose(lse_i.grad, w * (dy * (y_i - y)).sum(-1), atol=1e-14)
together = attention(x[0], torch.cat([x[1], x[3]], 2), torch.cat([x[2], x[4]], 2), causal=False)
assert torch.allclose(y, together, atol=1e-14)
print(f"two parts merged differ from one attention by {(y - together).abs().max():.0e}")

# %% [markdown]
# In nn/parallel/ring.py that is one `autograd.Function`: its backward pass sends keys and values round once more, works y_i and
# lse_i out again, and lets the gradients of keys and values travel behind them, so that nobody ever holds more than two parts.
#
# On lists, with Ulysses inside each of R places (U = 1: a ring alone). A place has chunks r and 2R - 1 - r of 2R; why, comes
# below. A chunk of queries against one of keys is either all visible, or the causal triangle, or nothing.


# %%
def by_ring(q, k, v, R: int, U: int = 1, work: np.ndarray | None = None) -> tuple[np.ndarray, Wire]:
    """`work` (R, R): filled with the pairs of query and key that a place computes at each step."""
    N, P = q.shape[1], R * U
    wire, at = Wire(P), zigzag(N, R, U)
    places = [list(range(r * U, r * U + U)) for r in range(R)]
    qs, ks, vs = (wire.exchange(shared_out(x, at), split=0, join=1, among=places) for x in (q, k, v))  # (H / U, N / R, D)
    own = at.reshape(R, -1)
    y, lse = [np.zeros_like(x) for x in qs], [np.full(x.shape[:2], -np.inf) for x in qs]
    for step in range(R):
        for p in range(P):
            here, there = p // U, (p // U - step) % R
            for i, j in itertools.product(range(2), range(2)):
                mine, theirs = (slice(n * N // (2 * R), (n + 1) * N // (2 * R)) for n in (i, j))
                a, b = own[here][mine], own[there][theirs]
                if b[0] > a[0]:
                    continue  # all of these keys come later
                part = one(qs[p][:, mine], ks[p][:, theirs], vs[p][:, theirs], causal=a[0] == b[0], with_lse=True)
                (y_i,), (lse_i,) = part
                before, total = lse[p][:, mine], np.logaddexp(lse[p][:, mine], lse_i)
                y[p][:, mine] = np.exp(before - total)[..., None] * y[p][:, mine] + np.exp(lse_i - total)[..., None] * y_i
                lse[p][:, mine] = total
                if work is not None and p % U == 0:
                    work[here, step] += (b[None] <= a[:, None]).sum()
            wire.held[p] = 2 * (ks[p].size + vs[p].size)  # a part that is read and one that arrives
        if step < R - 1:
            ks, vs = ([wire.send(x[p - U], (p - U) % P, p) for p in range(P)] for x in (ks, vs))
    y = np.concatenate(wire.exchange(y, split=1, join=0, among=places), 1)
    return y[:, at.flatten().argsort()], wire


for R, U in ((2, 1), (4, 1), (2, 2), (2, 4), (4, 2)):
    found, _ = by_ring(q, k, v, R, U)
    print(f"ring of {R}, Ulysses of {U}: differs from one process by {abs(found - alone).max():.0e}")
    assert abs(found - alone).max() < 1e-14
assert abs(by_gathering(q, k, v, 4)[0] - alone).max() < 1e-14

# %% [markdown]
# ## What each sends
#
# Counted, not computed: numbers that a process sends in one attention layer, forward. First N grows with P, as it does when
# one adds machines to read longer rows; then the row stays and P grows. Beside them Megatron's way of sharing positions
# (Korthikanti et al. 2022, arXiv:2205.05198), which shares out heads and neurons and so gathers the activations of the whole
# row before attention and before the ffn and sums them after both: 4 N C, the figure that Ulysses is compared with.


# %%
def by_megatron(N: int, P: int) -> Wire:
    wire = Wire(P)
    for _ in range(4):  # a gather, or its transpose, which sends as much
        wire.gather([np.empty((N // P, C))] * P, 0)
    return wire


def square(P: int) -> tuple[int, int]:
    U = 2 ** (int(math.log2(P)) // 2)
    return P // U, U


WAYS = {
    "gather k, v": lambda x, P: by_gathering(*x, P)[1],
    "ring": lambda x, P: by_ring(*x, P)[1],
    "ring x Ulysses": lambda x, P: by_ring(*x, *square(P))[1],
    "Ulysses": lambda x, P: by_ulysses(*x, P)[1],
    "Megatron": lambda x, P: by_megatron(x[0].shape[1], P),
}
PROCESSES = (2, 4, 8, 16)
SENT = {}
for kind, length in (("N = 8 P", lambda P: 8 * P), ("N = 128", lambda P: 128)):
    print(f"\n{kind:16}" + "".join(f"{f'P = {P}':>9}" for P in PROCESSES) + "   numbers sent by each process")
    for name, way in WAYS.items():
        counts = []
        for P in PROCESSES:
            rows = [np.random.default_rng(seed).standard_normal((H, length(P), D)) for seed in range(3)]
            wire = way(rows, P)
            assert (wire.sent == wire.sent[0]).all()  # nobody more than another
            counts.append(int(wire.sent[0]))
        SENT[kind, name] = counts
        print(f"{name:16}" + "".join(f"{count:9,}" for count in counts))

for kind, N in (("N = 8 P", [8 * P for P in PROCESSES]), ("N = 128", [128] * 4)):
    for i, P in enumerate(PROCESSES):
        R, U = square(P)
        assert SENT[kind, "Ulysses"][i] == 4 * (N[i] * C // P) * (P - 1) // P
        assert SENT[kind, "ring"][i] == SENT[kind, "gather k, v"][i] == 2 * N[i] * C * (P - 1) // P  # (P - 1) / P of all k, v
        assert SENT[kind, "ring x Ulysses"][i] == 4 * (N[i] * C // P) * (U - 1) // U + 2 * N[i] * C // U * (R - 1) // R
        assert SENT[kind, "Megatron"][i] == 4 * N[i] * C * (P - 1) // P
growth = {name: SENT["N = 8 P", name][-1] / SENT["N = 8 P", name][0] for name in WAYS}
print("\nfrom 2 to 16 processes, and a row 8 times as long, each sends: ", {name: round(x, 1) for name, x in growth.items()})
assert growth["Ulysses"] < 2 < growth["ring x Ulysses"] < 8 < growth["ring"] == growth["Megatron"]
fixed = {name: SENT["N = 128", name][-1] / SENT["N = 128", name][0] for name in WAYS}
assert fixed["Ulysses"] < 1 / 4 < 1 < fixed["ring"] < 2

# %% [markdown]
# Ulysses sends as much per process however long the row, up to the factor (P - 1) / P, that is at most twice; the others grow
# with the row. But P cannot exceed H, the number of heads, and an all-to-all wants a network on which everyone reaches
# everyone; a ring needs a wire to the next, and its messages hide behind the work. Hence both: exchange inside a machine, ring
# between machines. LongVILA reports 2.1 to 5.7 times the speed of rings alone, Ulysses' authors 2.5 times that of Megatron with
# rows 4 times as long; those are times on their networks, and a list has none.
#
# Why not gather? It sends what the ring sends. But then everyone holds the keys and values of the whole row:

# %%
rows = [np.random.default_rng(seed).standard_normal((H, 128, D)) for seed in range(3)]
HELD = {name: [int(way(rows, P).held.max()) for P in PROCESSES] for name, way in list(WAYS.items())[:-1]}
print(f"{'N = 128':16}" + "".join(f"{f'P = {P}':>9}" for P in PROCESSES) + "   keys and values held by a process at once")
for name, counts in HELD.items():
    print(f"{name:16}" + "".join(f"{count:9,}" for count in counts))
assert len(set(HELD["gather k, v"])) == 1
assert all(HELD["ring"][i] == 2 * HELD["Ulysses"][i] == 4 * 128 * C // P for i, P in enumerate(PROCESSES))

# %% [markdown]
# ## Keys that heads share
#
# With grouped-query attention K heads of keys serve H of queries. The ring then sends K / H as much. Ulysses still exchanges
# all queries and outputs, and where K < P sends every key head P / K times. As shares of N C, for H = 64 and K = 8:

# %%
heads, kv_heads, CROSSING = 64, 8, {}
print("P             ring   Ulysses")
for P in (2, 4, 8, 16, 32, 64):
    sent = 2 * kv_heads / heads, (2 + 2 * math.lcm(kv_heads, P) / heads) / P  # both times (P - 1) / P
    CROSSING[P] = sent[0] / sent[1]
    print(f"{P:2}   " + "".join(f"{share * (P - 1) / P:10.3f}" for share in sent))
assert CROSSING[4] < 0.5 and CROSSING[64] > 2

# %% [markdown]
# ## Who waits for whom
#
# On a ring all take a step together, so each step lasts as long as its longest. Under a causal mask and in order, the first
# place has no work after the first step, and at every step some place has a whole block. In zig-zag each has an early chunk,
# which few keys concern, and a late one, which almost all do.

# %%
R, N = 8, 128
work = np.zeros((R, R), int)
by_ring(*rows, R, work=work)
ordered = np.zeros_like(work)
for place, step in itertools.product(range(R), range(R)):
    a, b = (in_order(N, R)[place], in_order(N, R)[(place - step) % R])
    ordered[place, step] = (b[None] <= a[:, None]).sum()
assert work.sum() == ordered.sum() == N * (N + 1) // 2  # each pair once, in either layout
print("pairs of query and key, in thousands: of each place, and as long as the steps last")
for name, pairs in (("in order", ordered), ("zig-zag", work)):
    print(f"{name:9}" + "".join(f"{n / 1000:6.2f}" for n in pairs.sum(1)) + f"   steps {pairs.max(0).sum() / 1000:.2f}")
assert len(set(work.sum(1))) == 1 and (work == work[0]).all()  # at each step too
assert ordered.max(0).sum() / work.max(0).sum() == (R - 0.5 + 0.5 * R / N) / (R / 2 + 0.5 * R / N)
assert ordered.max(0).sum() > 1.8 * work.max(0).sum()

# %% [markdown]
# ## Frames of a film
#
# LongVILA's rows are films: a vision encoder makes some tokens of each frame, a language model reads them with the text. Films
# are unequally long, so a film a process leaves most of them idle. Stage 1 deals out the frames of all films evenly to the
# encoder, stage 2 the tokens of the whole row, text and all, evenly to the language model; what fills up the row counts in no
# loss. Here a frame is a block of random vectors and the encoder a matrix: only the sharing is real.

# %%
P, TOKENS, PIXELS = 8, 4, 12
random = np.random.default_rng(0)
frames = [random.standard_normal((int(n), TOKENS, PIXELS)) for n in (3, 41, 1, 17, 90, 8, 2, 30)]  # 8 films
encoder = random.standard_normal((PIXELS, C))
naive = [len(film) for film in frames]  # a film a process
dealt = np.array_split(np.concatenate(frames), P)  # stage 1
encoded = np.concatenate([part @ encoder for part in dealt])  # gathered again, in order
print(f"frames of a process, at most: {max(naive)} with a film each; {max(map(len, dealt))} dealt out, of {sum(naive)} in all")
assert max(map(len, dealt)) - min(map(len, dealt)) <= 1 and max(naive) > 3 * max(map(len, dealt))

row, targets, start = [], [], 0
for film in frames:  # the tokens of a film, then twelve of text about it
    row += [encoded[start : start + len(film)].reshape(-1, C), random.standard_normal((12, C))]
    targets += [np.full(len(film) * TOKENS, -100), random.integers(50, size=12)]
    start += len(film)
row, targets = np.concatenate(row), np.concatenate(targets)
N = -(-len(row) // (2 * P)) * 2 * P  # filled up to what zig-zag shares evenly
row, targets = np.pad(row, ((0, N - len(row)), (0, 0))), np.pad(targets, (0, N - len(targets)), constant_values=-100)
at = zigzag(N, 4, 2)  # stage 2: a ring of 4 with 2 processes each
counted = [(targets[own] >= 0).sum() for own in at]
print(f"tokens of a process: {at.shape[1]} each of {N}; of which are in the loss: {[int(n) for n in counted]}")
assert sum(counted) == (targets >= 0).sum() == 12 * len(frames)
head = random.standard_normal((C, 50))


def loss_of(x: np.ndarray, y: np.ndarray) -> float:
    logits = x @ head
    logits -= np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) + logits.max(-1, keepdims=True)
    return -logits[np.arange(len(y)), np.maximum(y, 0)][y >= 0].sum()


whole, parts = loss_of(row, targets), [loss_of(row[own], targets[own]) for own in at]
assert abs(sum(parts) / whole - 1) < 1e-12

# %% [markdown]
# The targets are where the text is, so processes have unequal shares of the loss: their SUM is divided by the count of all,
# never the mean of their means, which here would be another number. That is what the ignored label takes care of:

# %%
means = np.mean([part / n for part, n in zip(parts, counted, strict=True) if n])
print(f"loss a token: {whole / sum(counted):.4f}; the mean of the processes' means would be {means:.4f}")
assert abs(means - whole / sum(counted)) > 1e-3

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
for name in WAYS:
    line = "--" if name == "ring" else "-"  # it lies on the first
    axes[0].loglog(PROCESSES, SENT["N = 8 P", name], line, marker="o", base=2, label=name)
axes[0].set(xlabel="processes P, N = 8 P", ylabel="numbers sent by each", title="what a longer row costs each process")
axes[0].legend()
for axis, (name, pairs) in zip(axes[1:], (("in order", ordered), ("zig-zag", work)), strict=True):
    image = axis.imshow(pairs, vmin=0, vmax=ordered.max(), cmap="viridis")
    axis.set(xlabel="step", ylabel="place", title=f"pairs of query and key, {name}")
figure.colorbar(image, ax=axes[2])
lectern.save_figure(figure, "28_a_row_on_many_processes")

# %% [markdown]
# ## With processes
#
# `share_sequence(model, group, ring=R)` in nn/parallel/mixers.py does this to a model: attention as above, Mamba-2 with the
# channels of its own heads over the whole row, any other mixer by gathering. tests/nn/sequence_processes.py lets four
# processes do it: losses and gradients are those of one to 1e-9 in float64, and they send the bytes that were counted here.
