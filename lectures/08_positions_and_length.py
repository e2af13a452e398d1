# %% [markdown]
# # Positions, and what happens beyond the trained length
#
# Attention is a weighted average, and an average does not know what stood where. A position encoding tells it, mostly in words
# that are learned only up to the trained length. Six encodings are trained on 64 bytes here and read 512; then one of the
# models, its weights unchanged, is made to read further in seven ways.

# %%
import math

import lectern
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from data import Batch, Loader, load, load_tokenizer, windows
from models import Config, LanguageModel, build_model
from models.probe import loss_by_position
from nn.context import Context
from nn.position import RoPE, rope_scaling
from train import build_optimizer

torch.set_num_threads(1)
SEED = 0
tokenizer = load_tokenizer("byte")
training, validation = load("python", tokenizer)
# T bytes of a training row, C width, H heads of D numbers, R = D coordinates that rope turns, in R/2 pairs
V, T, C, H = tokenizer.vocab_size, 64, 64, 4
D, LONG = C // H, 8 * T


def config(position: str, mixer: str = "gqa", layers: int = 2, **more) -> Config:
    rates = dict(optimizer="muon:lr=0.04", rest_optimizer="adamw:lr=0.02:betas=0.8+0.95", embedding_lr=0.1)
    size = dict(dim=C, heads=H, seq_len=T, vocab_size=V)
    size["embedding_scale"] = C**-0.5 if position == "sinusoidal" else 1.0  # else the sines are too small to be heard
    return Config.of(stack=f"({mixer} mlp:activation=relu2)*{layers}", position=position, **size, **rates, **more)


# %% [markdown]
# ## A bag of words
#
# Without a position encoding and without a mask, attention is **permutation equivariant**: shuffle the text, and the outputs
# are shuffled with it, nothing else. `dog bites man` is `man bites dog`. A causal mask breaks this, but only through depth. In
# one layer the last byte still sees a bag of earlier ones; in the second it sees *what each of them had seen*, and order is
# known (Kazemnejad et al. 2023, arXiv:2305.19466).

# %%
generator = torch.Generator().manual_seed(SEED)
text = torch.randint(V - 1, (1, 24), generator=generator)
shuffle = torch.cat([torch.randperm(23, generator=generator), torch.tensor([23])])  # the last byte stays the last


@torch.no_grad()
def moved(**more) -> tuple[float, float]:
    """How far shuffling the text moves the shuffled outputs of a random model, and that of the last byte alone."""
    model = build_model(config("none", **more)).double()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5, generator=generator)
    difference = (model(text[:, shuffle]) - model(text)[:, shuffle]).abs()
    return difference.max().item(), difference[:, -1].max().item()


bag, causal_one, causal_two = moved(objective="masked"), moved(layers=1), moved(layers=2)
print("largest change of an output when the text is shuffled    all bytes   the last byte")
for name, change in (("bidirectional", bag), ("causal, 1 layer", causal_one), ("causal, 2 layers", causal_two)):
    print(f"  {name:53}{change[0]:10.1e}{change[1]:16.1e}")
assert bag[0] < 1e-12 and causal_one[1] < 1e-12 < 0.01 < causal_two[1] and causal_one[0] > 0.01

# %% [markdown]
# ## RoPE: only distances count
#
# Su et al. 2021 (arXiv:2104.09864) turn pair i of the coordinates of the query and the key at position t by the angle
# t theta^(-2i/R). The product of the two then depends on how far apart they stand alone. The first pairs turn fast, the last
# hardly move. A pair that made a full turn within the trained length has shown every angle; the others keep some for later.

# %%
q, k = torch.randn(2, 1, 8, 1, D, generator=generator, dtype=torch.float64)
places = [Context(torch.zeros(1, 8), torch.arange(start, start + 8)) for start in (0, 1000)]
here, there = (torch.einsum("bqhd,bkhd->qk", *(RoPE().rotate(u, place) for u in (q, k))) for place in places)
assert torch.allclose(here, there, atol=1e-9)
plain = RoPE().frequencies(D)  # (R/2,) radians a position
turns = plain * (T - 1) / (2 * math.pi)
WAYS = "linear", "ntk", "yarn", "llama3", "angle_dist"
divided = {way: plain / RoPE(scaling=way, factor=8, original=T).frequencies(D) for way in WAYS}
print("\nturns of each pair, and by what its frequency is divided for 8 times the length")
print("pair        in 64  in 512" + " ".join(f"{way:>10}" for way in WAYS))
for i in range(D // 2):
    row = " ".join(f"{by[i]:10.2f}" for by in divided.values())
    print(f"{i:4}{turns[i]:13.3f}{plain[i] * (LONG - 1) / (2 * math.pi):8.2f}{row}")
assert (turns >= 1).sum() == 3  # of 8 pairs have turned fully in the trained length
assert (divided["linear"] == 8).all() and divided["ntk"][0] == 1 and math.isclose(divided["ntk"][-1], 8)

# %% [markdown]
# ## Six encodings, trained on 64 bytes
#
# `learned` adds a vector for each position to the embedding (Gehring et al. 2017, arXiv:1705.03122), `sinusoidal` fixed sines
# (Vaswani et al. 2017, arXiv:1706.03762). `alibi` takes slope * distance from a score, each head with its slope (Press et al.
# 2021, arXiv:2108.12409); `t5` adds a learned number for each range of distances (Raffel et al. 2019, arXiv:1910.10683).
#
# Two layers, the same batches for all. The table shows bits per byte in the trained length, and up to 2, 4 and 8 times it. Some
# stretches of text are harder than others: the last row is the RoPE model that forgets all and begins anew every 64 bytes.

# %%
STEPS, ROWS = 130, 16
judged = list(windows(validation, batch_size=4, seq_len=LONG, limit=48 * LONG))
SPANS = (0, T), (T, 2 * T), (2 * T, 4 * T), (4 * T, 8 * T)
bits, curves = {}, {}  # name -> bits per byte at 1, 2, 4, 8 times the trained length; name -> at each position


def learn(position: str, mixer: str = "gqa") -> LanguageModel:
    model = build_model(config(position, mixer), seed=SEED)
    optimizer, loader = build_optimizer(model.config, model), Loader(training, batch_size=ROWS, seq_len=T, seed=SEED)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * (1 - step / STEPS)
        inputs, targets, _ = next(loader)
        (model(inputs, targets) / targets.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def carried(start: LanguageModel, position: str, mixer: str = "gqa") -> LanguageModel:
    model = build_model(config(position, mixer))
    model.load_state_dict(start.state_dict())
    return model


def judge(name: str, model: LanguageModel, length: int = LONG, restarts: int = 1) -> None:
    parts = []  # the model sees a length, forgets it, sees the next
    for start in range(0, length * restarts, length):
        texts = [Batch(*(u[:, start : start + length].contiguous() for u in batch)) for batch in judged]
        parts.append(loss_by_position(model, texts) / math.log(2))  # a byte is a token
    curves[name] = torch.cat(parts)  # (length * restarts,)
    bits[name] = [curves[name][a:b].mean().item() for a, b in SPANS if b <= len(curves[name])]
    print(f"  {name:34}" + "".join(f"{value:9.2f}" for value in bits[name]))


def rise(name: str) -> float:
    """By how much the bits grow from the trained length to the last half, beyond what the text itself does."""
    text = bits["rope, restarted every 64 bytes"]
    return (bits[name][3] - bits[name][0]) - (text[3] - text[0])


HEAD = f"\n  {'bits per byte at positions':34}" + "".join(f"{f'{a}-{b}':>9}" for a, b in SPANS)
print(HEAD)
models = {}
for name in ("none", "learned", "sinusoidal", "rope", "alibi", "t5"):
    models[name] = learn(name)
    judge(name, models[name], models[name].position.max_len or LONG)
judge("rope, restarted every 64 bytes", models["rope"], length=T, restarts=8)
try:
    refused = models["learned"](judged[0].inputs)
except ValueError as error:
    refused = str(error)
print(f"  learned, beyond: {refused}")
assert f"ends at {T}" in refused and min(rise("rope"), rise("sinusoidal"), rise("t5")) > 0.7 and abs(rise("alibi")) < 0.2
assert min(bits["rope"][0], bits["t5"][0]) < bits["none"][0] - 0.2

# %% [markdown]
# Encodings that turn or add something the model never met break. ALiBi has nothing new to say further out but "even less".
# Without positions little was learned in so short a training, and little can break. **T5's** last ranges begin beyond a
# distance of 64. Never trained, they stand at the zero they began with; the trained ones nearby are far below it. So what is
# too far away to have been learned gets *more* attention. Give those ranges the number of a trained one:

# %%
repaired = carried(models["t5"], "t5")
table = repaired.position.table.weight.data  # (ranges, H)
last = int(repaired.position.bucket(-torch.arange(T), causal=True).max())
near = table[last - 9 : last + 1].mean()
print(f"  ranges met in training: {last + 1} of {len(table)}; mean of the last ten of them {near:.2f}")
assert (table[last + 1 :] == 0).all() and len(table) > last + 1 and near < -0.5
table[last:] = table[last - 1].clone()  # the last range met was met seldom: it gets that number, too
judge("t5, untrained ranges filled", repaired)
assert bits["t5, untrained ranges filled"][3] < bits["t5"][3] - 0.5

# %% [markdown]
# ## The same RoPE model, stretched without training
#
# Its weights fit into each of these:
#
# - linear: all angles divided by 8 (Chen et al. 2023, arXiv:2306.15595). None is new, but neighbours are nearer than ever.
# - ntk, yarn (Peng et al. 2023, arXiv:2309.00071), llama3 (Grattafiori et al. 2024, arXiv:2407.21783): fast pairs kept.
# - angle_dist: each pair kept or divided as disturbs its distribution of angles less (Wu et al. 2024, arXiv:2410.01490).
# - window: a byte sees the 64 up to itself.
# - dca: **dual chunk attention** (An et al. 2024, arXiv:2402.17463). A key counts from the start of its chunk of s bytes,
#   and so does the query for its own chunk. For the chunk before, it counts on, at most to c - 1 = 63; for earlier ones it is
#   at c - 1. Near distances are exact, none exceeds c - 1. First as distances, with the paper's c = 10 and s = 6.


# %%
def dca_distances(length: int, s: int, c: int) -> Tensor:
    """(length, length): the distance at which query i sees key j, -1 for later keys."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    apart = i // s - j // s
    query = torch.where(apart == 0, i % s, torch.where(apart == 1, (s + i % s).clamp(max=c - 1), c - 1))
    return torch.where(j <= i, query - j % s, -1)


small, ours = dca_distances(13, 6, 10), dca_distances(LONG, 48, T)
print("\n" + "\n".join(" ".join(f"{d:2}" if d >= 0 else " ." for d in row) for row in small.tolist()))
assert (small[6:12, 0] == torch.tensor([6, 7, 8, 9, 9, 9])).all() and ours.max() == T - 1
assert all((ours.diagonal(-distance) == distance).all() for distance in range(T - 48 + 1))

print(HEAD)
for way in WAYS:
    judge(f"{way}, factor 8", carried(models["rope"], f"rope:scaling={way}:factor=8:original={T}"))
window, dca = (carried(models["rope"], "rope", mixer) for mixer in (f"gqa:window={T}", f"dca:chunk=48:original={T}"))
judge("window 64", window)
judge("dca, chunks of 48", dca)
assert max(rise("window 64"), rise("dca, chunks of 48")) < 0.4 < 0.7 < rise("rope")
by_linear, by_ntk, *others = (bits[f"{way}, factor 8"] for way in WAYS)
assert bits["rope"][0] < by_ntk[0] and all(by_ntk[0] < other[0] < by_linear[0] - 0.2 for other in others)
assert others[0][3] < bits["rope"][3] - 0.3  # yarn
assert all(by_ntk[2] < other[2] - 0.1 for other in others) and by_ntk[3] > by_ntk[2] + 0.4

# %% [markdown]
# Every stretch costs something in the trained length; most of the papers train a little afterwards. Compare with the divisors
# above: what keeps the fast pairs keeps the near bytes. ntk holds to four times the length and not to eight: its middle pairs
# are divided by less than 8. By this measure a window is no worse than dual chunks: models as small as these learn nearly all
# from near bytes. But what lies behind it is gone, beyond 2 * 63 bytes through two layers. With dual chunks it is not.

# %%
read, reach = judged[0].inputs[:1], 2 * (T - 1)
other = torch.cat([(read[:, :1] + 1) % 256, read[:, 1:]], 1)
with torch.no_grad():
    moves = [(model(read) - model(other))[0, reach + 1 :].abs().max().item() for model in (window, dca)]
print(f"\nbyte 0 changed: outputs beyond position {reach} move by {moves[0]:.1e} with window, {moves[1]:.1e} with dca")
assert moves[0] == 0 and moves[1] > 1e-3

# %% [markdown]
# ## Is it the softmax?
#
# The more keys, the flatter a softmax over them. Gao et al. 2025 (arXiv:2501.13428) scale the scores by the logarithm of n, the
# number of keys seen, and put softplus in the place of exp (LSSA): weights ~ softplus(log D log n / sqrt(D) q . k). LSSAR
# sharpens them at inference, relu(n A - offset)^power, normalised again; its loss stays nearly constant to 16 times the
# trained length. Softmax with the log n scale shows what is the scale's share. All with RoPE.

# %%
SOFTPLUS = "normalised:normaliser=softplus:length_scale=true"
print(HEAD)
judge("softmax (rope above)", carried(models["rope"], "rope", "normalised:normaliser=softmax"))
judge("softmax, log n scale", learn("rope", SOFTPLUS.replace("softplus", "softmax")))
lssa = learn("rope", SOFTPLUS)
judge("softplus, log n scale (LSSA)", lssa)
for options in ("power=3", "power=15"):
    judge(f"LSSAR, {options}", carried(lssa, "rope", f"{SOFTPLUS}:{options}"))
assert abs(bits["softmax (rope above)"][3] - bits["rope"][3]) < 0.01
assert min(rise("softmax, log n scale"), rise("softplus, log n scale (LSSA)"), rise("LSSAR, power=3")) > 0.7
assert bits["softplus, log n scale (LSSA)"][0] < bits["LSSAR, power=3"][0] < bits["LSSAR, power=15"][0] - 0.1

# %% [markdown]
# At this size the paper's effect does **not** show: all rise by more than 0.7 bits at 8 times the length. Angles never met are
# the larger trouble, and no normaliser cures it. Re-weighting costs bits in the trained length; with a power of 3 it takes back
# a small part of the rise.
#
# ## How much a stretch disturbs the angles
#
# angle_dist needs no model. Cut the turn into 360 parts, count the angles of each pair in the trained and in the longer text;
# the disturbance is the divergence of the two, summed over pairs. For Llama 2 (R = 128, 4096 positions) the paper's abstract
# states up to 72 % less than dividing all at twice the length, 32 % at four. (64 positions fill few parts: above it is rough.)

# %%
llama = RoPE().frequencies(128)
before = rope_scaling.angle_shares(llama, 4096)
for factor, published in ((2, 0.72), (4, 0.32)):
    mixed, sums = rope_scaling.angle_dist(llama, factor, original=4096), []
    for stretched in (rope_scaling.linear(llama, factor), mixed):
        sums.append(rope_scaling.disturbance(before, rope_scaling.angle_shares(stretched, 4096 * factor)).sum().item())
    cut, kept = 1 - sums[1] / sums[0], int((mixed == llama).sum())
    print(f"  {factor} times: linear {sums[0]:.2f}, angle_dist {sums[1]:.2f}, {cut:.0%} less; {kept} of 64 pairs kept")
    assert abs(cut - published) < 0.01

figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
for name in ("sinusoidal", "t5", "alibi", "rope", "linear, factor 8", "ntk, factor 8", "window 64", "dca, chunks of 48"):
    axis.plot(range(8, LONG, 16), curves[name].view(-1, 16).mean(1), "--" if " " in name else "-", label=name)
axis.axvline(T, color="k", linestyle=":")
axis.set(xlabel="position (dotted: trained length; dashed: the rope model, not trained further)", ylabel="bits per byte")
axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
lectern.save_figure(figure, "08_positions_and_length")
