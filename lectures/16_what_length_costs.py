# %% [markdown]
# # What length costs
#
# Softmax attention compares every token with every other: twice the text, four times the work. If exp(q . k) is replaced by
# q . k, the sum can be taken in another order, and the work grows as the text does; so it does for Mamba-2 and all its
# relatives (Katharopoulos et al. 2020, arXiv:2006.16236; Dao and Gu 2024, arXiv:2405.21060). Here both are measured: the time
# and the memory of training a layer on up to 16,384 tokens, and those of writing the next token after up to 65,536.
#
# Letters: T tokens, H heads of D numbers.

# %%
import time
from collections.abc import Callable

import lectern
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from kernels.attention import attention
from kernels.linear_attention import linear_attention
from models import Config, LanguageModel, build_model

torch.set_num_threads(1)
torch.manual_seed(0)

# %% [markdown]
# ## One sum in two orders
#
# Without the softmax, o_t = sum_{s <= t} (q_t . k_s) v_s is a product of three matrices and a mask. Bracketed on the left it
# has a T x T matrix in its middle; on the right a D x D one, S_t = sum_{s <= t} k_s v_s^T, which a loop carries along.

# %%
T, D = 64, 8
q, k, v = np.random.default_rng(0).standard_normal((3, T, D))
by_matrix = np.tril(q @ k.T) @ v
S, by_state = np.zeros((D, D)), []
for t in range(T):
    S += np.outer(k[t], v[t])
    by_state.append(S.T @ q[t])
error = np.abs(by_matrix - by_state).max()
print(f"T x T in the middle, or D x D: they differ by {error:.0e}")
assert error < 1e-11

# %% [markdown]
# ## Training
#
# One layer of 4 heads of 64, forward and backward. Three ways: softmax attention written out, with all its scores; the fused
# one of `kernels/attention.py`, which works in blocks and keeps none of them (FlashAttention, Dao et al. 2022,
# arXiv:2205.14135); linear attention with a decay, which works in chunks of 64. Memory is what each keeps for the backward
# pass. Time is that of the processor, so that other programs do not count.

# %%
H, D = 4, 64


def written_out(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    scores = torch.einsum("bthd,bshd->bhts", q, k) * D**-0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def fused(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)


def linear(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return linear_attention(q, k, v, g)[0]


def cost(attend: Callable[..., Tensor], T: int) -> tuple[float, int]:
    """Seconds of forward and backward for T tokens, and bytes kept between the two."""
    inputs = [torch.randn(1, T, H, D, requires_grad=True) for _ in range(3)]
    g, kept = -torch.rand(1, T, H) / 64, {}
    own = {x.untyped_storage().data_ptr() for x in inputs}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    start = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = attend(*inputs, g)
    y.sum().backward()
    return time.process_time() - start, sum(kept.values())


WAYS = {"written out": (written_out, 2048), "fused": (fused, 16384), "linear": (linear, 16384)}
LENGTHS, COSTS = [512, 1024, 2048, 4096, 8192, 16384], {}
print("\nmilliseconds and MB kept" + "".join(f"{T:>16,}" for T in LENGTHS))
for name, (attend, longest) in WAYS.items():
    cost(attend, 512)  # the first call prepares things
    rounds = [{T: cost(attend, T) for T in LENGTHS if T <= longest} for _ in range(1 if name == "fused" else 4)]
    COSTS[name] = {T: min(costs[T] for costs in rounds) for T in rounds[0]}  # what disturbs a clock passes
    print(f"{name:24}" + "".join(f"{1e3 * s:8,.0f} {b / 1e6:7,.1f}" for s, b in COSTS[name].values()))


def slope(name: str, what: int) -> float:
    """With which power of the length it grows, over the last factor of 4."""
    first, last = [values[what] for values in COSTS[name].values()][-3::2]
    return float(np.log(last / first) / np.log(4))


for name in WAYS:
    print(f"{name:12} time grows as T^{slope(name, 0):.2f}, memory as T^{slope(name, 1):.2f}")
assert slope("written out", 1) > 1.8
assert slope("fused", 0) > 1.5  # nearer to T^2 than to T
assert slope("fused", 1) < 1.1
assert slope("linear", 0) < 1.5
assert slope("linear", 1) < 1.1
assert COSTS["linear"][16384][0] < 0.5 * COSTS["fused"][16384][0]

# %% [markdown]
# Fusing saves the memory, not the work. Below a few hundred tokens softmax is no slower: its products are large and simple.
#
# ## Writing
#
# To write a token softmax attention reads the keys and values of all tokens before it; a state space reads its state. Two
# small models that differ in their mixer alone, at contexts of up to 65,536 tokens. (Attention's memory of the context is
# filled with random keys and values: what stands in it does not matter to the clock. Mamba-2 reads its context.)

# %%
CONTEXTS, STEPS = [1024, 8192, 65536], 12


def model_of(mixer: str) -> LanguageModel:
    made = Config.of(mixer=mixer, vocab_size=256, dim=128, heads=4, depth=2, stem="", ffn="none", position="none")
    return build_model(made).eval()


@torch.inference_mode()
def writing(mixer: str, context: int) -> tuple[float, int]:
    """Milliseconds a token after `context` tokens, the quickest of some steps, and bytes of the decoding state."""
    model = model_of(mixer)
    state = model.init_state(1, context + STEPS)
    if mixer == "gqa":
        for cache in state.sublayers:
            cache.keys.normal_()
            cache.values.normal_()
            cache.length = context
        state.length = context
    else:
        for part in torch.randint(256, (1, context)).split(8192, 1):
            model(part, state=state, last=True)
    seconds = []
    for _ in range(STEPS):
        start = time.process_time()
        model(torch.zeros(1, 1, dtype=torch.int64), state=state)
        seconds.append(time.process_time() - start)
    return 1e3 * min(seconds), state.bytes()


WRITING = {mixer: [writing(mixer, context) for context in CONTEXTS] for mixer in ("gqa", "mamba2")}
print("\nms and MB of state to write" + "".join(f"{c:>18,}" for c in CONTEXTS))
for mixer, found in WRITING.items():
    print(f"{mixer:27}" + "".join(f"{ms:9.2f} {b / 1e6:8.2f}" for ms, b in found))
assert len({size for _, size in WRITING["mamba2"]}) == 1  # bytes do not depend on the context
growth = {name: times[-1][0] / times[0][0] for name, times in WRITING.items()}  # of the time a token, by the clock
assert growth["mamba2"] < 0.5 * growth["gqa"]
assert WRITING["gqa"][-1][1] > 50 * WRITING["gqa"][0][1]
assert WRITING["gqa"][-1][0] > 3 * WRITING["gqa"][0][0]

# %% [markdown]
# What is paid for it is memory in the other sense: a state of one size cannot hold a text of any length. Lectures 10 and 18
# measure how much it does hold.

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
for name, found in COSTS.items():
    axes[0].loglog(list(found), [seconds for seconds, _ in found.values()], "o-", label=name)
    axes[1].loglog(list(found), [size / 1e6 for _, size in found.values()], "o-", label=name)
for mixer, found in WRITING.items():
    axes[2].loglog(CONTEXTS, [ms for ms, _ in found], "o-", label=mixer)
titles = [("seconds", "training a layer"), ("MB", "kept for the backward pass"), ("ms a token", "writing")]
for axis, (unit, title) in zip(axes, titles, strict=True):
    axis.set(xlabel="tokens", ylabel=unit, title=title)
    axis.legend()
lectern.save_figure(figure, "16_what_length_costs")
