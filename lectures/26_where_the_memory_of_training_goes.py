# %% [markdown]
# # Where the memory of training goes
#
# A model of 7.5 billion parameters is 15 GB in half precision, and does not train on a machine of 80 GB. Training holds two
# other things beside weights. One is as large as the model whatever it reads: gradients and the optimizer's state, eight times
# the weights, which ZeRO shares out (Rajbhandari et al. 2019, arXiv:1910.02054). The other is as long as the text: what the
# forward pass keeps for the backward pass, which one can compute again instead (Chen et al. 2016, arXiv:1604.06174), in part
# (Korthikanti et al. 2022, arXiv:2205.05198) or piece by piece (StreamBP, Luo et al. 2025, arXiv:2506.03077).
#
# Letters: Psi parameters, N ranks, T tokens, C width of the model.

# %%
import time

import lectern
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from models import Config, build_model
from models.live_bytes import LiveBytes
from optim.adamw import reference_step
from optim.parallel.zero import held_bytes

torch.set_num_threads(1)

# %% [markdown]
# ## Sixteen bytes a parameter
#
# In mixed precision a parameter is 2 bytes of weight and 2 of gradient in half precision, and for Adam 12 more in float32: the
# weight itself and two running means. Copies on N ranks hold all of it N times. Stage 1 of ZeRO shares out the state, stage 2
# the gradients too, stage 3 the weights too.

# %%
table = [held_bytes(7.5e9, 64, stage) / 1e9 for stage in range(4)]
for stage, size in enumerate(table):
    print(f"stage {stage}: {size:6.1f} GB on each of 64 ranks")
assert [round(size, 1) for size in table] == [120.0, 31.4, 16.6, 1.9]  # figure 1 of the paper

# %% [markdown]
# ## The stages by hand
#
# Ranks are entries of a list. Psi = 1,002 weights of a linear model learn from rows of which each rank has its share. A
# collective is a loop over ranks that counts the numbers a rank sends in a ring: (N - 1) / N of the whole. Psi is not divisible
# by 4, so two zeros stand behind it. All is held in float64 here, so a number is 8 bytes and Adam's state is two of them.

# %%
PSI, N, STEPS = 1002, 4, 5
PADDED = -(-PSI // N) * N
SETTINGS = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
random = np.random.default_rng(0)
rows, start = random.normal(size=(STEPS, 8, PSI)), random.normal(size=PSI)
wanted = rows @ random.normal(size=PSI)


def gradient(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(PADDED,): of the mean square error over rows x (n, Psi)."""
    return np.pad(2 * x.T @ (x @ weights[:PSI] - y) / len(x), (0, PADDED - PSI))


def parts(whole: np.ndarray) -> list[np.ndarray]:
    return list(whole.reshape(N, -1))


def trained(stage: int) -> tuple[np.ndarray, list[int], int]:
    """The weights, numbers held by rank 0 (weights, gradients, state) at their most between layers, and numbers sent a step."""
    shards = parts(np.pad(start, (0, PADDED - PSI)))
    whole = [np.concatenate(shards) for _ in range(N)] if stage < 3 else None
    states: list[dict] = [{} for _ in range(N)]
    ring, sent = PADDED * (N - 1) // N, 0
    for x, y in zip(rows, wanted, strict=True):
        if stage == 3:  # gathered for the forward pass, dropped, gathered again for the backward pass, dropped
            sent += 2 * ring
        weights = whole or [np.concatenate(shards)] * N
        own = [gradient(weights[r], x[r::N], y[r::N]) for r in range(N)]
        if stage == 0:  # all-reduce: a reduce-scatter and an all-gather; every rank steps with everything
            mean, sent = sum(own) / N, sent + 2 * ring
            stepped = [reference_step(whole[r], mean, states[r], **SETTINGS) for r in range(N)]
            whole, states = [w for w, _ in stepped], [s for _, s in stepped]
            continue
        mine, sent = [sum(parts(g)[r] for g in own) / N for r in range(N)], sent + ring  # reduce-scatter
        stepped = [reference_step(shards[r], mine[r], states[r], **SETTINGS) for r in range(N)]
        shards, states = [w for w, _ in stepped], [s for _, s in stepped]
        if stage < 3:
            whole, sent = [np.concatenate(shards) for _ in range(N)], sent + ring  # all-gather
    state = sum(value.size for value in states[0].values() if isinstance(value, np.ndarray))
    held = [whole[0].size if whole else shards[0].size, mine[0].size if stage >= 2 else own[0].size, state]
    return (whole[0] if whole else np.concatenate(shards))[:PSI], held, sent // STEPS


print("\nstage   weights   gradients   state   sent a step   (numbers; Psi = 1,002 on 4 ranks)")
results = [trained(stage) for stage in range(4)]
for stage, (weights, held, sent) in enumerate(results):
    print(f"{stage:5} {held[0]:9,} {held[1]:11,} {held[2]:7,} {sent:13,}")
    assert np.abs(weights - results[0][0]).max() < 1e-12
share = PADDED // N
assert [held for _, held, _ in results] == [
    [PADDED, PADDED, 2 * PADDED], [PADDED, PADDED, 2 * share], [PADDED, share, 2 * share], [share, share, 2 * share],
]  # fmt: skip
assert [sent for *_, sent in results] == [passes * PADDED * (N - 1) // N for passes in (2, 2, 2, 3)]

# %% [markdown]
# Stages 1 and 2 cost nothing in traffic: an all-reduce is a reduce-scatter and an all-gather anyway. Stage 3 sends half as much
# again. `optim/parallel/zero.py` does this to a model, layer by layer, over torch.distributed; its tests count the same bytes
# on 2 and 4 processes.
#
# ## What the forward pass keeps
#
# A hybrid of Mamba-2, attention and feed-forward layers reads one text of T tokens. `LiveBytes` counts every tensor made: what
# is left after the forward pass, and the most there was at once until the backward pass was over. `checkpoint` keeps the input
# of each sublayer, `selective` the products of linear layers too; `stream` keeps the inputs, and runs a sublayer again one
# chunk of the sequence after the other.

# %%
LENGTHS = [512, 1024, 2048]
SHAPE = dict(dim=128, heads=1, depth=2, mixer="mamba2:state=16,gqa:kv_heads=1", ffn="swiglu", stem="")
STRATEGIES = ["plain", "selective", "checkpoint", "stream:chunks=2", "stream:chunks=4", "stream:chunks=8"]


def step(spec: str, T: int, *, vocab_size: int = 64, whole_logits: bool = False) -> tuple[int, int, float]:
    """Bytes kept after the forward pass, the most that were alive, and seconds of a second pass that nobody counts."""
    model = build_model(Config.of(**SHAPE, vocab_size=vocab_size, seq_len=T, backprop=spec))
    tokens = torch.randint(vocab_size, (1, T), generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # there before, so that they are not counted

    def loss() -> torch.Tensor:
        if whole_logits:
            return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten(), reduction="sum")
        return model(tokens, tokens)

    with LiveBytes() as live:
        found = loss()
        kept = live.now
        found.backward()
    began = time.perf_counter()
    loss().backward()
    return kept, live.peak, time.perf_counter() - began


def slope(column: int, runs: list[tuple]) -> float:
    """Bytes a token of length, from the longer two."""
    return (runs[-1][column] - runs[-2][column]) / (LENGTHS[-1] - LENGTHS[-2])


step("stream", 64)  # what a first call loads
measured = {spec: [step(spec, T) for T in LENGTHS] for spec in STRATEGIES}
kept, peak = ({spec: slope(column, runs) for spec, runs in measured.items()} for column in (0, 1))
seconds = {spec: runs[-1][2] / measured["checkpoint"][-1][2] for spec, runs in measured.items()}
print(f"\n{'bytes a token':18} {'kept':>8} {'peak':>8}   longest text   time   (against checkpoint)")
for spec in STRATEGIES:
    longest = peak["checkpoint"] / peak[spec]
    print(f"{spec:18} {kept[spec]:8,.0f} {peak[spec]:8,.0f} {longest:13.2f}x {seconds[spec]:5.2f}x")
assert kept["checkpoint"] < 0.5 * kept["selective"]
assert kept["selective"] < 0.7 * kept["plain"]
assert kept["stream:chunks=8"] < 1.2 * kept["checkpoint"]  # as many states at the ends of chunks whatever the length
assert peak["stream:chunks=8"] < peak["stream:chunks=2"] < peak["checkpoint"] < peak["selective"] < peak["plain"]
assert peak["checkpoint"] > 1.5 * peak["stream:chunks=8"]

# %% [markdown]
# `checkpoint` keeps an eighth of what `plain` keeps, but its peak is not an eighth: the sublayer that is being differentiated
# is there whole. `stream` takes that away. What is left are the inputs of the sublayers and, for attention, keys, values and
# their gradients. (On a CPU attention takes 128 queries at a time and holds their scores with all keys: a part of the peak that
# chunks do not cut. On a GPU a kernel holds none.)
#
# ## The logits
#
# StreamBP's authors report 2.8 to 5.5 times the length of gradient checkpointing. Most of that is not in the layers: where
# logits are made whole, each token has V of them, in float32, and as many gradients. The loss of this project has always made
# them in slices (kernels/linear_cross_entropy.py). Against checkpointing with whole logits, V = 37 C as in Qwen 3 of 8 billion
# parameters, the comparison is the paper's.

# %%
whole = slope(1, [step("checkpoint", T, vocab_size=37 * SHAPE["dim"], whole_logits=True) for T in LENGTHS])
gain = whole / peak["stream:chunks=8"]
print(f"\ncheckpoint with whole logits: {whole:,.0f} bytes a token at the peak, {gain:.1f} times those of stream:chunks=8")
assert gain > 2.5

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
shares = np.array([[2, 2, 12]] * 4) * 7.5 / np.array([[1, 1, 1], [1, 1, 64], [1, 64, 64], [64, 64, 64]])
for column, name in enumerate(("weights", "gradients", "optimizer")):
    left.bar(range(4), shares[:, column], bottom=shares[:, :column].sum(1), label=name)
left.set(xlabel="stage of ZeRO", ylabel="GB a rank", title="7.5 billion parameters on 64 ranks", xticks=range(4))
assert np.allclose(shares.sum(1), table)
left.legend()
for spec, runs in measured.items():
    right.plot(LENGTHS, [run[1] / 1e6 for run in runs], "o-", label=spec)
right.set(xlabel="tokens", ylabel="MB at the peak", title="activations of a small hybrid")
right.legend()
print("figure:", lectern.save_figure(figure, "26_where_the_memory_of_training_goes"))
