# %% [markdown]
# # Matrices and layers, shared out
#
# A model too large for one accelerator can be cut in two ways besides sharding its state. Across: every matrix is
# cut, and all ranks work on the same tokens. Shoeybi et al. 2019, "Megatron-LM" (arXiv:1909.08053), cut it so that a sublayer
# needs one sum; Korthikanti et al. 2022 (arXiv:2205.05198) cut the positions between the sublayers too, at no cost. Along: each
# rank has some of the layers, and waits. How long depends on who does what when, which is all that a schedule is.
#
# Ranks are a list here and everything is NumPy; what the project runs is nn/parallel/tensor.py and models/pipeline.py.
#
# Letters: n ranks, T tokens, C width, F neurons, H heads of width D; p ranks of a pipeline, m micro-batches, v stages a rank.

# %%
from collections import Counter

import lectern
import matplotlib.pyplot as plt
import numpy as np
import torch

from data import Loader, load, load_tokenizer
from models import Config, build_model
from models.hardware import HARDWARE, predict
from models.parts import parts_of
from models.plan import Run
from models.plan import all_reduce as all_reduce_bytes
from nn.parallel.mesh import parse_mesh
from optim import OPTIMIZERS
from optim.parallel.schedules import bubble, draw, gathers, held, make_orders, reductions, simulate, total_time

torch.set_num_threads(1)
rng = np.random.default_rng(0)
n, T, C, F, H, D = 4, 16, 32, 64, 8, 4

# %% [markdown]
# ## What ranks say to each other
#
# Each operation takes a list, what every rank has, and gives a list, what every rank gets. In a ring, a rank sends each part of
# a whole to its neighbour n - 1 times. A sum that all want is a sum of which each has a part, then a gathering of the parts.

# %%
SENT: Counter[str] = Counter()  # numbers that one rank sends


def all_gather(parts: list[np.ndarray]) -> list[np.ndarray]:
    """Of each rank (T / n, C) -> all of it (T, C) on every rank."""
    whole = np.concatenate(parts)
    SENT["all-gather"] += whole.size * (n - 1) // n
    return [whole] * n


def reduce_scatter(summands: list[np.ndarray]) -> list[np.ndarray]:
    """Of each rank a summand (T, C) -> its part (T / n, C) of the sum."""
    SENT["reduce-scatter"] += summands[0].size * (n - 1) // n
    return np.split(sum(summands), n)


def all_reduce(summands: list[np.ndarray]) -> list[np.ndarray]:
    return all_gather(reduce_scatter(summands))


numbers = [rng.integers(-9, 9, (T, C)).astype(float) for _ in range(n)]
assert all(np.array_equal(got, sum(numbers)) for got in all_reduce(numbers))
assert SENT.total() == all_reduce_bytes(T * C, n)
print(f"a sum of {T * C} numbers for all of {n} ranks: each sends {dict(SENT)}")

# %% [markdown]
# ## An MLP by columns, then by rows
#
# Y = relu(X A) B. With A cut by columns a rank has F / n neurons, and relu does not mind; with B cut by rows it multiplies
# those neurons alone. Its Y is a summand of the whole, and in the backward pass so is its dX. Nothing is sent in between. (Cut
# the other way round, by rows and then by columns, the sum would be needed before relu.)
#
# All numbers are small integers, so that sums are exact in any order and "equal" means equal.


# %%
def mlp(X: np.ndarray, A: np.ndarray, B: np.ndarray):
    """relu(X A) B (T, C), and a function from its gradient to those of (X, A, B)."""
    h = np.maximum(X @ A, 0)  # (T, F)

    def backward(dY: np.ndarray) -> tuple[np.ndarray, ...]:
        dh = (dY @ B.T) * (h > 0)
        return dh @ A.T, X.T @ dh, h.T @ dY

    return h @ B, backward


X, dY, A, B = (rng.integers(-3, 4, shape).astype(float) for shape in ((T, C), (T, C), (C, F), (F, C)))
Y, backward = mlp(X, A, B)
dX, dA, dB = backward(dY)

SENT.clear()
made = [mlp(X, A_r, B_r) for A_r, B_r in zip(np.split(A, n, 1), np.split(B, n), strict=True)]
Y_ranks = all_reduce([y for y, _ in made])
grads = [backward(dY) for _, backward in made]
dX_ranks = all_reduce([grad[0] for grad in grads])
assert all(np.array_equal(got, Y) for got in Y_ranks)
assert all(np.array_equal(got, dX) for got in dX_ranks)
assert np.array_equal(np.concatenate([grad[1] for grad in grads], 1), dA)
assert np.array_equal(np.concatenate([grad[2] for grad in grads], 0), dB)
wrong = sum(np.maximum(X_r @ A_r, 0) for X_r, A_r in zip(np.split(X, n, 1), np.split(A, n), strict=True))
assert not np.array_equal(wrong, np.maximum(X @ A, 0))  # relu of summands is no summand of relu
MEGATRON = dict(SENT)
print(f"the MLP on {n} ranks: output and all gradients equal; each rank sent {MEGATRON}")

# %% [markdown]
# ## Attention by heads
#
# Heads do not know of each other. A rank has H / n of them: the columns of W_q, W_k and W_v that make them and the rows of W_o
# that read them. Again one sum forward and one backward.


# %%
def attention(X: np.ndarray, Wq: np.ndarray, Wk: np.ndarray, Wv: np.ndarray, Wo: np.ndarray):
    """Causal attention of as many heads as the matrices are wide; (T, C), and a function from its gradient to all others."""
    q, k, v = ((X @ W).reshape(T, -1, D).transpose(1, 0, 2) for W in (Wq, Wk, Wv))  # (heads, T, D)
    scores = np.where(np.tri(T, dtype=bool), q @ k.transpose(0, 2, 1) / np.sqrt(D), -np.inf)  # (heads, T, T)
    P = np.exp(scores - scores.max(-1, keepdims=True))
    P /= P.sum(-1, keepdims=True)
    joined = lambda u: u.transpose(1, 0, 2).reshape(T, -1)  # noqa: E731  (T, heads D)
    y = joined(P @ v)

    def backward(dY: np.ndarray) -> tuple[np.ndarray, ...]:
        dy = (dY @ Wo.T).reshape(T, -1, D).transpose(1, 0, 2)
        dP = dy @ v.transpose(0, 2, 1)
        dS = P * (dP - (dP * P).sum(-1, keepdims=True)) / np.sqrt(D)
        dq, dk, dv = map(joined, (dS @ k, dS.transpose(0, 2, 1) @ q, P.transpose(0, 2, 1) @ dy))
        return dq @ Wq.T + dk @ Wk.T + dv @ Wv.T, X.T @ dq, X.T @ dk, X.T @ dv, y.T @ dY

    return y @ Wo, backward


x, dy = rng.standard_normal((2, T, C))
W = [rng.standard_normal((C, H * D)) / np.sqrt(C) for _ in range(3)] + [rng.standard_normal((H * D, C)) / np.sqrt(H * D)]
y, backward = attention(x, *W)
wanted = backward(dy)
cut = [[np.split(M, n, axis=int(i < 3))[r] for i, M in enumerate(W)] for r in range(n)]
made = [attention(x, *own) for own in cut]
got = [backward(dy) for _, backward in made]
errors = [np.abs(all_reduce([y for y, _ in made])[0] - y).max(), np.abs(all_reduce([g[0] for g in got])[0] - wanted[0]).max()]
errors += [np.abs(np.concatenate([g[i] for g in got], int(i < 4)) - wanted[i]).max() for i in (1, 2, 3, 4)]
print(f"attention on {n} ranks differs from one by {max(errors):.0e} at most, in output and gradients")
assert max(errors) < 1e-12

# %% [markdown]
# ## The positions between, for nothing
#
# Norms, residual sums and dropout work on one token at a time, yet every rank did them for all tokens, and kept what they need
# for the backward pass. Leave each rank T / n tokens between the sublayers instead: gather before a sublayer, and scatter
# the sum behind it. That is an all-reduce taken apart, as many bytes; what is kept between is 1 / n.

# %%
SENT.clear()
X_parts = np.split(X, n)
rows = all_gather(X_parts)
made = [mlp(X_r, A_r, B_r) for X_r, A_r, B_r in zip(rows, np.split(A, n, 1), np.split(B, n), strict=True)]
Y_parts = reduce_scatter([y for y, _ in made])
dY_rows = all_gather(np.split(dY, n))  # the backward pass of the scattering
dX_parts = reduce_scatter([backward(dY_r)[0] for (_, backward), dY_r in zip(made, dY_rows, strict=True)])
assert np.array_equal(np.concatenate(Y_parts), Y)
assert np.array_equal(np.concatenate(dX_parts), dX)
assert dict(SENT) == MEGATRON
print(f"with positions shared out: the same numbers, as many sent; between sublayers {X_parts[0].size} of {X.size} are kept")

# %% [markdown]
# Two such pairs a sublayer, forward and backward, and the next product waits for each: tensor parallelism wants the fastest
# wires. A plan (models/plan.py; `python -m models.describe --mesh tp=16`) for a model of 1.2 billion parameters on H100s, which
# stand eight in a node; the figures are upper bounds.

# %%
config, RATES = Config.of(model="llama-1b", seq_len=4096, mixer="gqa:kv_heads=16"), {}
for tp in (1, 2, 4, 8, 16):
    sizes = parse_mesh(f"tp={tp}")
    RATES[tp] = predict(parts_of(config, sizes), Run(sizes, config.dim, config.seq_len), HARDWARE["h100"])[1]
print("predicted share of the FLOPs: " + ", ".join(f"{rate:.0%} at tp={tp}" for tp, rate in RATES.items()))
assert RATES[1] > RATES[8] > 2 * RATES[16]  # 16 ranks are two nodes

# %% [markdown]
# ## Layers in a row
#
# p ranks have p parts of the layers; a step's batch is cut into m micro-batches, so that there is work for more than one rank
# at a time. Four schedules (optim/parallel/schedules.py), a backward pass taking two forward passes:


# %%
p, m, v = 4, 8, 2
TIMES = {}
print("schedule         idle / work   activations held   gathers   sums of gradients")
for name in ("gpipe", "1f1b", "interleaved", "looped"):
    chunks = v if name in ("interleaved", "looped") else 1
    orders = make_orders(name, p, m, chunks)
    TIMES[name] = spans = simulate(orders, 1 / chunks, 2 / chunks)
    memory = [held(order) / chunks for order in orders]  # in units of a rank's layers
    print(f"{name:16}{bubble(spans):12.4f}   {memory!s:24}{gathers(orders[-1]):4}{reductions(orders[-1]):12}")
    assert abs(bubble(spans) - (p - 1) / (m * chunks)) < 1e-12
    assert max(memory) == {"gpipe": m, "1f1b": p, "interleaved": 5.5, "looped": m}[name]

# %% [markdown]
# 1F1B idles as long as GPipe and holds p micro-batches, not m. Stages in v pieces, dealt out like cards, make the bubble v
# times shorter (Narayanan et al. 2021, arXiv:2104.04473), for v times as many messages. The looped schedule has that too. It
# holds all micro-batches; but a rank is done with one piece before it turns to the next, and so weights that are sharded among
# replicas are gathered twice a step, and gradients reduced once, for each piece. That is layered gradient accumulation, and
# layers dealt out are modular pipeline parallelism: Lamy-Poirier 2021 (arXiv:2106.02679). On a single rank with 6 layers:

# %%
(layered,) = make_orders("looped", 1, m, 6)
plain = [action for i in range(m) for action in (*layered[i : 6 * m : m], *[a for a in layered[6 * m :] if a.micro_batch == i])]
print(f"of each layer: {gathers(plain) // 6} gathers and {reductions(plain) // 6} sums micro-batch by micro-batch, "
      f"{gathers(layered) // 6} and {reductions(layered) // 6} layer by layer")  # fmt: skip
assert (gathers(plain), reductions(plain)) == (6 * 2 * m, 6 * m)
assert (gathers(layered), reductions(layered)) == (6 * 2, 6)
assert total_time(simulate([plain])) == total_time(simulate([layered]))

# %% [markdown]
# Layer by layer needs the modular placement: with contiguous layers, a rank would finish all micro-batches before the next
# began. Time of the forward passes, that of a layer being 1, by the paper's formulas and by simulation:

# %%
for L, p_, m_ in ((8, 4, 4), (16, 4, 8), (16, 4, 4)):
    time = {}
    ways = ("looped", L // p_, "modular"), ("gpipe", 1, "modular"), ("looped", L // p_, "contiguous")
    for name, chunks, placement in ways:
        orders = [[action for action in order if action.kind == "F"] for order in make_orders(name, p_, m_, chunks, placement)]
        time[name, placement] = total_time(simulate(orders, L / p_ / chunks))
    modular, blocks, waiting = time.values()
    print(f"{L:2} layers, {p_} ranks, {m_} micro-batches: modular {modular:.0f}, contiguous {blocks:.0f}, "
          f"contiguous and layer by layer {waiting:.0f}")  # fmt: skip
    assert modular == m_ * L / p_ + p_ - 1
    assert blocks == (m_ + p_ - 1) * L / p_
    assert waiting > blocks > modular

# %% [markdown]
# ## Larger batches
#
# More replicas want larger batches, and so do pipelines, whose bubble is 1 / m. MegaScale (Jiang et al. 2024, arXiv:2402.15627)
# takes LAMB for a batch four times as large, and finds the loss that AdamW reached on as many tokens. LAMB (You et al. 2019,
# arXiv:1904.00962; optim/lamb.py) makes each step as long, beside its parameter, as the next one's. Here a model of 49,000
# parameters reads 154,000 bytes of Python in batches of 8 or of 32 rows; the rates were the best of several each.

# %%
training, validation = load("python", load_tokenizer("byte"))
seen = next(iter(Loader(validation, batch_size=256, seq_len=32, seed=1)))
WAYS = {"AdamW": ("adamw", 0.004, 8), "AdamW, 4 x batch": ("adamw", 0.006, 32), "LAMB, 4 x batch": ("lamb", 0.06, 32)}
LOSS = {}
for way, (name, lr, batch) in WAYS.items():
    sizes = dict(vocab_size=257, dim=32, depth=2, heads=2, seq_len=32, stem="")
    config = Config.of(**sizes, mixer="gqa", ffn="swiglu", norm="rmsnorm", init="gpt2")
    model, steps = build_model(config), 4800 // batch
    optimizer = OPTIMIZERS[name](model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step, (inputs, targets, *_) in zip(range(steps), Loader(training, batch_size=batch, seq_len=32, seed=0), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * min(1, 10 * (step + 1) / steps) * (1 - step / steps)
        (model(inputs, targets) / targets.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        LOSS[way] = float(model(*seen[:2]) / seen[1].numel())
    print(f"{way:18}{steps:5} steps of {batch:2} rows: {LOSS[way]:.3f} nats a byte")
assert LOSS["LAMB, 4 x batch"] < LOSS["AdamW, 4 x batch"] - 0.15
assert LOSS["LAMB, 4 x batch"] < LOSS["AdamW"] + 0.1

# %% [markdown]
# LAMB wins back nearly all that the large batch cost AdamW (with the seeds 1 and 2 too). On six times as many tokens the
# three come to 1.67, 1.72 and 1.70 nats: it does not quite reach AdamW at a quarter of its batch, as it does in the paper, but
# is much nearer to it than AdamW at the same batch.

# %%
figure, axes = plt.subplots(5, 1, figsize=(11, 10), layout="constrained", height_ratios=(1, 1, 1, 1, 1.2))
for axis, (name, spans) in zip(axes, TIMES.items(), strict=False):
    draw(axis, spans, f"{name}: idle {bubble(spans):.3f} of the work")
    axis.set_xlim(0, 34)
axes[4].plot([*RATES], [*RATES.values()], "o-")
axes[4].set(
    xscale="log", xticks=[*RATES], xticklabels=[*RATES], xlabel="ranks of tp", ylabel="share of FLOPs, at most", ylim=(0, 1)
)
lectern.save_figure(figure, "27_matrices_and_layers_shared_out")
