# %% [markdown]
# # What a state space chooses
#
# A linear state space h_t = A h_{t-1} + B x_t, y_t = C h_t can be computed in four ways, which is why it is fast; and as long
# as A, B and C are constants it treats every token alike, which is why it is weak. Mamba (Gu and Dao 2023, arXiv:2312.00752)
# lets each token choose them. What is gained, and what is lost? The names are those of the survey by Qu et al. 2024
# (arXiv:2408.01129).
#
# Letters: T tokens, N numbers of the state, d step size.

# %%
import lectern
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from data import TASKS, TaskLoader, examples
from kernels.selective_scan import selective_scan
from models import Config, LanguageModel, build_model
from models.score import answered
from nn.context import Context

torch.manual_seed(0)
torch.set_num_threads(1)
rng = np.random.default_rng(0)
T, N = 64, 4

# %% [markdown]
# ## From a differential equation to a recurrence
#
# h' = A h + B x, with x held for a time d (zero-order hold), becomes h_t = exp(dA) h_{t-1} + (dA)^-1 (exp(dA) - 1) dB x_t.
# Mamba's code takes A exactly so and for B the first term of the series, d B: Euler's rule. For small d it is the same.

# %%
A, B, C = -np.arange(1.0, N + 1), np.ones(N), rng.standard_normal(N)  # diagonal, "S4D-Real" (Gu et al. 2022, arXiv:2206.11893)
for d in (0.1, 0.01):
    held, euler = (np.exp(d * A) - 1) / A * B, d * B
    print(f"d = {d}: Euler's rule is off by {np.abs(euler / held - 1).max():.1%} at most")
assert np.abs(euler / held - 1).max() < 0.03

# %% [markdown]
# ## Constants: four ways to the same numbers
#
# 1. the recurrence, a number of steps that wait for each other;
# 2. a convolution with K_k = C exp(k d A) d B, which an FFT does in T log T;
# 3. a scan: two steps are a step, (a1, b1) then (a2, b2) is (a2 a1, a2 b1 + b2), so that halves can be done apart;
# 4. a matrix, M_ts = C exp((t - s) d A) d B below its diagonal: what attention would write down.

# %%
d, x = 0.1, rng.standard_normal(T)
a, b = np.exp(d * A), d * B


def recurrence(a: np.ndarray, added: np.ndarray) -> np.ndarray:
    """The states (T, N) of h_t = a_t h_{t-1} + added_t."""
    h, states = np.zeros(N), []
    for a_t, added_t in zip(a, added, strict=True):
        h = a_t * h + added_t
        states.append(h)
    return np.array(states)


def scan(a: np.ndarray, added: np.ndarray) -> np.ndarray:
    """The same by doubling: after each round a step reaches twice as far back."""
    a, h, reach = a.copy(), added.copy(), 1
    while reach < len(a):
        h[reach:] += a[reach:] * h[:-reach]
        a[reach:] = a[reach:] * a[:-reach]
        reach *= 2
    return h


steady, added = np.tile(a, (T, 1)), np.outer(x, b)
by_loop = recurrence(steady, added) @ C
powers = a ** np.arange(T)[:, None]  # (T, N)
K = powers @ (C * b)
by_convolution = np.fft.irfft(np.fft.rfft(x, 2 * T) * np.fft.rfft(K, 2 * T))[:T]
by_scan = scan(steady, added) @ C
distance = np.subtract.outer(np.arange(T), np.arange(T))
M_constant = np.where(distance >= 0, K[np.maximum(distance, 0)], 0)
ways = {"convolution": by_convolution, "scan": by_scan, "matrix": M_constant @ x}
for name, y in ways.items():
    print(f"{name:12} differs from the recurrence by {np.abs(y - by_loop).max():.1e}")
    assert np.abs(y - by_loop).max() < 1e-12

# %% [markdown]
# ## Choices: the convolution is gone, the other three stay
#
# When d, B and C depend on the token there is no K any more: what a token adds after k steps depends on which tokens came
# between. The recurrence, the scan and the matrix still agree, and `kernels/selective_scan.py` with them.

# %%
d_t = np.log1p(np.exp(rng.standard_normal(T)))  # softplus
B_t, C_t = rng.standard_normal((2, T, N))
a_t, added = np.exp(np.outer(d_t, A)), d_t[:, None] * x[:, None] * B_t
by_loop = (recurrence(a_t, added) * C_t).sum(1)
by_scan = (scan(a_t, added) * C_t).sum(1)
since = np.exp(np.cumsum(np.outer(d_t, A), 0)[:, None] - np.cumsum(np.outer(d_t, A), 0)[None])  # (T, T, N)
M = np.where(distance >= 0, ((C_t[:, None] * since) * (d_t[:, None] * B_t)[None]).sum(-1), 0)
as_tensor = [torch.from_numpy(v)[None] for v in (x[:, None], d_t[:, None], A[None], B_t, C_t)]
by_kernel = selective_scan(as_tensor[0], as_tensor[1], as_tensor[2][0], as_tensor[3], as_tensor[4])[0][0, :, 0].numpy()
for name, y in {"scan": by_scan, "matrix": M @ x, "kernel": by_kernel}.items():
    print(f"{name:12} differs from the recurrence by {np.abs(y - by_loop).max():.1e}")
    assert np.abs(y - by_loop).max() < 1e-9
responses = {name: [m[s + np.arange(8), s] for s in (5, 20)] for name, m in (("constants", M_constant), ("choices", M))}
for name, (early, late) in responses.items():
    print(f"{name}: a token at time 5 and one at time 20 are felt alike for 8 steps: {np.allclose(early, late)}")
assert np.allclose(*responses["constants"]) and not np.allclose(*responses["choices"])

# %% [markdown]
# ## Theorem 1: with one number of state it is a gate
#
# N = 1, A = -1, B = 1, d = softplus(z) and a true zero-order hold: exp(-softplus(z)) = 1 - sigmoid(z), so that
# h_t = (1 - g_t) h_{t-1} + g_t x_t with g = sigmoid(z), the gate of a recurrent network. A large step forgets and takes in;
# a step of zero keeps, and lets the token pass unseen.

# %%
z = rng.standard_normal(T)
gate, d_t = 1 / (1 + np.exp(-z)), np.log1p(np.exp(z))
h = g = 0.0
for t in range(T):
    h = np.exp(-d_t[t]) * h + (1 - np.exp(-d_t[t])) * x[t]
    g = (1 - gate[t]) * g + gate[t] * x[t]
    assert abs(h - g) < 1e-14
print("the gate and the state space agree to 1e-14")
kept = np.exp(-np.logaddexp(0, np.array([-20.0, 20.0])))  # of the state, after a step of almost 0 and after a long one
assert kept[0] > 1 - 1e-8
assert kept[1] < 1e-8

# %% [markdown]
# ## Selective copying
#
# Three of six symbols stand scattered among noise; at the end they are asked for in their order. Which places hold them changes
# from row to row, so only what the tokens are can tell. S4D and Mamba are the same block here (`nn/ssm/s4d.py`,
# `nn/ssm/mamba.py`), two of them, with the same short convolution; the first has constants where the other chooses.

# %%
TASK = TASKS["selective_copying"](length=48, symbols=6, count=3)
print("\n" + TASK.spell(TASK.batch(1, seed=0)[0][0]))
RATES = dict(optimizer="muon:lr=0.02", rest_optimizer="adamw:lr=0.01:betas=0.8+0.95", embedding_lr=0.05)
FIELDS = dict(vocab_size=8, dim=64, depth=2, stem="", seq_len=48, position="none", tie=False, ffn="none", norm="rmsnorm")
shown, wanted = TASK.batch(32, seed=2)
assert (TASK.oracle(shown) == wanted)[wanted >= 0].all()  # it can be known
MODELS, RIGHT = {}, {}
for mixer in ("s4d", "mamba"):
    model = MODELS[mixer] = build_model(Config.of(**FIELDS, mixer=f"{mixer}:state=8", **RATES))
    lectern.learn(model, TaskLoader(TASK, batch_size=32, seed=0), steps=700, warmup=0.1)
    for length in (48, 96, 192):
        longer = TASKS["selective_copying"](length=length, symbols=6, count=3)
        RIGHT[mixer, length] = answered(model, examples(longer, batch_size=64, count=256))["complete"]
    shares = ", ".join(f"{RIGHT[mixer, length]:.0%} at {length}" for length in (48, 96, 192))
    print(f"{mixer:6}{sum(p.numel() for p in model.parameters()):8,} parameters; all three right in {shares} tokens")
assert RIGHT["mamba", 48] > 0.95
assert RIGHT["mamba", 192] > 0.8
assert RIGHT["s4d", 48] < 0.9
assert RIGHT["s4d", 192] < 0.2

# %% [markdown]
# The selective model has it all right, also in texts four times as long as any it was trained on: noise that it passes over
# leaves no trace. The constant one learned the distances of one length. (In the paper, at 4,096 tokens and 16 symbols to
# remember, Mamba's block gets 99.8 % of the symbols right, and 56.4 % with S4 inside.)
#
# What did Mamba choose? The step sizes of its layers, at symbols and at noise:

# %%


@torch.no_grad()
def steps(model: LanguageModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Of each layer the step sizes (B, T, E) of tokens (B, T)."""
    context, x, found = Context(tokens, torch.arange(tokens.shape[1])), model.embedding(tokens), []
    for sublayer in model.stack:
        layer, seen = sublayer.layer, []
        hook = layer.dt.register_forward_hook(lambda module, given, made, seen=seen: seen.append(made))
        x = sublayer(x, context)
        hook.remove()
        found.append(F.softplus(seen[0] + layer.dt_bias))
    return found


tokens = TASK.batch(64, seed=1)[0]
told = tokens[:, : TASK.length - TASK.count]
CHOSEN = []
for layer, d in enumerate(steps(MODELS["mamba"], tokens), 1):
    d = d[:, : told.shape[1]]
    contrast = d[told != TASK.noise].mean(0) / d[told == TASK.noise].mean(0)  # (E,)
    CHOSEN.append(contrast)
    longer, shorter = ((ratio > 1.5).float().mean() for ratio in (contrast, 1 / contrast))
    print(f"layer {layer}: steps at symbols are 1.5 times those at noise in {longer:.0%} of channels, 1/1.5 in {shorter:.0%}")
assert max((contrast.log2().abs() > np.log2(1.5)).float().mean() for contrast in CHOSEN) > 0.1

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for mixer in MODELS:
    axes[0].plot((48, 96, 192), [RIGHT[mixer, length] for length in (48, 96, 192)], "o-", label=mixer)
axes[0].set(xlabel="tokens (trained at 48)", ylabel="all three right", ylim=(-0.02, 1.05), title="selective copying")
axes[0].legend()
for layer, contrast in enumerate(CHOSEN, 1):
    axes[1].hist(contrast.log2(), bins=40, alpha=0.6, label=f"layer {layer}")
axes[1].set(xlabel="log2 of the step at symbols over that at noise", ylabel="channels", title="what Mamba chose")
axes[1].legend()
lectern.save_figure(figure, "13_what_a_state_space_chooses")
