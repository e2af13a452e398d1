# %% [markdown]
# # Monarch matrices: N^1.5 instead of N^2
#
# A layer mixes along two axes, the sequence and the width, and by attention and by an MLP both cost the square of the
# axis. Monarch Mixer (Fu et al. 2023, arXiv:2310.12109) puts into both places a matrix that is a product of two
# block-diagonal matrices with fixed permutations around them: P B2 P B1 P. The Fourier transform is one; a convolution is two.
#
# Letters: N numbers, b = sqrt(N) blocks of b x b, T tokens, K filter.

# %%
import time

import lectern
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from data import TASKS, Loader, TaskLoader, examples, load, load_tokenizer, windows
from models import Config, build_model
from models.score import answered, bits_per_byte
from nn.monarch import MonarchLinear, causal_convolution, circular_convolution, monarch_dft, monarch_multiply

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## The Fourier transform is a Monarch matrix
#
# Cooley and Tukey's step: deal 64 numbers out to 8 blocks, transform each block (8 x 8), turn the results, deal them out
# again, transform again. Turning each number is folded into the first blocks.

# %%
N = 64
x = torch.randn(N, dtype=torch.complex128)
factors = monarch_dft(N)
error = np.abs(monarch_multiply(x, *factors).numpy() - np.fft.fft(x.numpy())).max()
stored = sum(B.numel() for B in factors)
print(f"two factors of 8 blocks: {stored:,} numbers in place of {N * N:,}; off by {error:.0e} from numpy.fft")
assert error < 1e-12
assert (stored, N * N) == (1024, 4096)

# %% [markdown]
# ## What it costs
#
# Multiplications of one vector with an N x N matrix, counted by PyTorch as they happen, and the time for 64 vectors.

# %%
FLOPS, TIMES = {"dense": {}, "Monarch": {}}, {"dense": {}, "Monarch": {}}


def layer(kind: str, N: int) -> torch.nn.Module:
    return MonarchLinear(N, N) if kind == "Monarch" else torch.nn.Linear(N, N, bias=False)


@torch.no_grad()
def seconds(module: torch.nn.Module, x: torch.Tensor) -> float:
    """The shortest of five runs."""
    found = []
    for _ in range(5):
        start = time.perf_counter()
        module(x)
        found.append(time.perf_counter() - start)
    return min(found)


for N in (1024, 2048, 4096, 8192, 16384):
    for kind in FLOPS:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:  # no numbers: 16384 x 16384 would be a gigabyte
            layer(kind, N)(torch.empty(1, N))
        FLOPS[kind][N] = counter.get_total_flops()
        if kind == "Monarch" or N <= 4096:
            TIMES[kind][N] = seconds(layer(kind, N), torch.randn(64, N))
    measured = ", ".join(f"{kind} {1000 * times[N]:.2f}" for kind, times in TIMES.items() if N in times)
    print(f"N = {N:6,}: FLOPs dense {FLOPS['dense'][N]:>13,}, Monarch {FLOPS['Monarch'][N]:>10,}; milliseconds {measured}")
SLOPES = {kind: np.polyfit(np.log([*flops]), np.log([*flops.values()]), 1)[0] for kind, flops in FLOPS.items()}
gained = TIMES["dense"][4096] / TIMES["Monarch"][4096]
print(f"FLOPs grow like N^{SLOPES['dense']:.2f} and N^{SLOPES['Monarch']:.2f}; at 4,096 Monarch is {gained:.0f} times as fast")
assert abs(SLOPES["dense"] - 2) < 0.01
assert abs(SLOPES["Monarch"] - 1.5) < 0.02
assert gained > 3

# %% [markdown]
# 32 times fewer FLOPs do not make it 32 times as fast: small blocks leave much of the arithmetic idle, and permuting costs too.
#
# ## The causal form
#
# M^-1 (M k o M u) with the Fourier transform for M is a convolution on a circle: its end reaches its start, and the first
# word would be told the last. But the columns of M are the powers of N points, so that M u are the values of a polynomial with
# coefficients u, and the whole is a product of polynomials. Keep their degrees below N, take 2 N points, and nothing wraps.

# %%
N = 32
u, k = torch.randn(2, N, dtype=torch.float64)
on_a_circle = torch.autograd.functional.jacobian(lambda u: circular_convolution(u, k, N), u)
causal = torch.autograd.functional.jacobian(lambda u: causal_convolution(u, k), u)
later = {name: J.triu(1).abs().max().item() for name, J in (("circle", on_a_circle), ("causal", causal))}
error = np.abs(causal_convolution(u, k).numpy() - np.convolve(u, k)[:N]).max()
print(f"largest gradient of a y_t to a later u_s: {later['circle']:.2f} on the circle, {later['causal']:.0e} with zeros")
print(f"off from numpy.convolve by {error:.0e}")
assert later["causal"] < 1e-12 and later["circle"] > 1
assert error < 1e-12

# %% [markdown]
# ## Along the width: an MLP of Monarch matrices
#
# Three stacks differ in their MLPs: a dense one of width 256, a Monarch one of that width, and a dense one so
# narrow that it has exactly as many parameters as the Monarch one.

# %%
RATES = dict(optimizer="muon:lr=0.02", rest_optimizer="adamw:lr=0.01:betas=0.8+0.95", embedding_lr=0.05)
tokenizer = load_tokenizer("byte")
training, validation = load("python", tokenizer)
FIELDS = dict(dim=64, depth=2, heads=2, stem="", tie=False, norm="rmsnorm")


def text():
    for inputs, targets, _ in Loader(training, batch_size=16, seq_len=64, seed=0):
        yield inputs, targets


BITS, SIZES = {}, {}
for name, ffn in {
    "dense, width 256": "mlp:width=256", "Monarch, width 256": "monarch:width=256", "dense, width 40": "mlp:width=40",
}.items():  # fmt: skip
    shape = dict(vocab_size=tokenizer.vocab_size, seq_len=64, mixer="conv:width=4:expand=1", position="none")
    model = build_model(Config.of(**FIELDS, **shape, ffn=ffn, **RATES))
    lectern.learn(model, text(), steps=170)
    SIZES[name] = sum(p.numel() for s in model.stack if not s.is_mixer for p in s.parameters())
    BITS[name] = bits_per_byte(model, windows(validation, batch_size=64, seq_len=64, limit=32768), tokenizer.token_bytes)
    print(f"{name:20}{SIZES[name]:8,} parameters in the MLPs, {BITS[name]:.3f} bits per byte")
assert SIZES["Monarch, width 256"] == SIZES["dense, width 40"]
assert BITS["dense, width 256"] < BITS["Monarch, width 256"] - 0.01
assert abs(BITS["Monarch, width 256"] - BITS["dense, width 40"]) < 0.08

# %% [markdown]
# With a sixth of the parameters the Monarch MLP is no better than a narrow dense one, and worse than a dense one of its
# width. The paper's claim, BERT's quality with up to 27 % fewer parameters (four blocks, widths of 768 and more, billions of
# tokens), does not show at this size: what can be said here is that nothing is lost against equal parameters.
#
# ## Along the sequence: a gated long convolution, and what it cannot do
#
# `longconv` multiplies what came before with a filter and the result with a gate: filters know distances, not contents. In
# associative recall a key comes again after a number of tokens that differs from row to row, and asks for the value
# that followed it. Attention compares; the convolution would need a filter for each distance at once.

# %%
TASK = TASKS["mqar"](length=32, pairs=4, keys=32, values=32)
print(TASK.spell(TASK.batch(1, seed=0)[0][0]))
RIGHT = {}
for mixer, position in (("gqa", "rope"), ("longconv:length=32", "none")):
    shape = dict(vocab_size=TASK.vocab_size, seq_len=32, mixer=mixer, ffn="mlp:width=128", position=position)
    model = build_model(Config.of(**FIELDS, **shape, **RATES))
    lectern.learn(model, TaskLoader(TASK, batch_size=32, seed=0), steps=250, warmup=0.1)
    RIGHT[mixer.partition(":")[0]] = share = answered(model, examples(TASK, batch_size=64, count=256))["accuracy"]
    print(f"{mixer.partition(':')[0]:10}{share:5.0%} of the answers right (a guess among the row's values: {TASK.chance:.0%})")
assert RIGHT["gqa"] > 0.95
assert RIGHT["longconv"] < 0.5

# %% [markdown]
# The convolution has found out which values stand in the row and guesses among them. That is where gated convolutions lag
# (Arora et al. 2023, "Zoology", arXiv:2312.04927), and why later models put a few layers of attention back.

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
for kind in FLOPS:
    axes[0].loglog([*FLOPS[kind]], [*FLOPS[kind].values()], "o-", label=f"{kind}: slope {SLOPES[kind]:.2f}")
    axes[1].loglog([*TIMES[kind]], [1000 * s for s in TIMES[kind].values()], "o-", label=kind)
axes[0].set(xlabel="N", ylabel="FLOPs a vector", title="counted")
axes[1].set(xlabel="N", ylabel="milliseconds for 64 vectors", title="measured")
axes[2].bar([*RIGHT], [*RIGHT.values()], 0.5)
axes[2].axhline(TASK.chance, color="gray", linestyle=":", label="a guess among the row's values")
axes[2].set(ylabel="answers right", ylim=(0, 1.05), title="associative recall")
for axis in axes:
    axis.legend()
lectern.save_figure(figure, "17_monarch_matrices")
