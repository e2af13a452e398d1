# %% [markdown]
# # Where the time goes
#
# `python train.py` reads a batch, computes a loss, computes gradients, moves the weights, some ten thousand tokens a
# second. Could it be faster? To know, count what has to be done, measure what the machine can do, and compare.
#
# Three things are counted: FLOPs (additions and multiplications), bytes, seconds. The first two can be *predicted
# exactly*, from the shapes alone, and are asserted to the last digit. Seconds belong to a machine and a moment. They
# are measured, all in this one run, and asserted loosely.
#
# Letters: B rows of a batch, T tokens of a row, C width, L layers, H heads, D head dim, V vocabulary, N parameters.

# %%
import math
import statistics
import sys
import time
import timeit
from dataclasses import replace

import lectern
import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import train
from data import Loader, load, load_tokenizer, training_documents, windows
from models import Config, LanguageModel, build_model
from models.describe import activation_bytes, forward_flops, parameters
from models.machine import autocast, choose_dtype, matmul_peak, tune_cpu
from models.score import bits_per_byte
from optim import flatten_state

torch.manual_seed(0)
device, FP32 = torch.device("cpu"), torch.float32
fast = choose_dtype("auto", device)  # bfloat16 where this machine multiplies it faster
dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in (FP32, fast)}

config = Config.of()  # what train.py does without a flag
tokenizer = load_tokenizer(
    config.tokenizer, texts=lambda: (d.text for d in training_documents(config.data)), vocab_size=config.vocab_size
)
config = replace(config, vocab_size=tokenizer.vocab_size)
training, validation = load(config.data, tokenizer)
model = build_model(config)
optimizer = train.build_optimizer(config, model)
B, T = config.batch_size, config.seq_len

# %% [markdown]
# ## FLOPs, predicted
#
# A matrix product (n, k) @ (k, m) takes n k m multiplications and as many additions: 2 n k m FLOPs. So a token that
# passes through a weight matrix costs 2 for each weight. Attention also multiplies queries with keys and probabilities
# with values: 2 · 2 T D for each head and token, over the whole square. The backward pass needs two products for each
# one of the forward pass: the gradient of the input and the gradient of the weight. So, a token of training, with N the
# weights that are multiplied (embeddings are only looked up):
#
#     FLOPs = 3 * (2 N + 4 L H D T) = 6 N + 12 L H D T                  (Chowdhery et al. 2022, PaLM, appendix B)
#
# `models.describe` counts so. Held against published models, and against PaLM 540B itself: 238,300 tokens a second on
# 6144 chips of 275 TFLOP/s. The share of the peak that became model FLOPs is what that paper named MFU, and reports as
# 46.2 %.

# %%
for name, context, published in (("gpt2", 1024, 124_439_808), ("llama-8b", 2048, 8_030_261_248)):
    with torch.device("meta"):  # shapes without memory
        large = LanguageModel(Config.of(model=name))
    N = sum(m.weight.numel() for m in large.modules() if isinstance(m, nn.Linear))
    by_formula = 6 * N + 12 * large.config.depth * large.config.dim * context  # H D = C
    assert 3 * forward_flops(large, context) == by_formula * context
    assert sum(parameters(large).values()) == published
    print(f"{name:9} {published:14,} parameters, {by_formula:15,} FLOPs a token of training")

palm = 118 * (2 * 18432 * 48 * 256 + 2 * 18432 * 256 + 3 * 18432 * 4 * 18432) + 256_000 * 18432  # its parameters
mfu = 238_300 * (6 * palm + 12 * 118 * 48 * 256 * 2048) / (6144 * 275e12)
print(f"PaLM: {palm / 1e9:.2f}B parameters, model FLOPs utilisation {mfu:.1%}")
assert round(mfu, 3) == 0.462

# %% [markdown]
# ## FLOPs, counted
#
# PyTorch can count while it runs. For our default model prediction and count agree exactly, with two things to know:
#
# - Attention takes its queries in blocks of 128, and leaves out the keys that a whole block may not see. With 256 tokens
#   that is a quarter of the square.
# - The loss makes its gradients in the *forward* pass (`nn/objective/next_token.py`), so as never to hold all logits.
#   The head's two backward products are therefore counted there.
#
# We count in bfloat16, as training does: float32 attention takes a fused kernel on a CPU that PyTorch's table does not know.
#
# The optimizer multiplies too: Muon takes each (rows, columns) matrix through 5 Newton-Schulz steps of 4 m² n + 2 m³
# FLOPs, m being the smaller side and n the larger. That is once a step, whatever the batch. AdamW multiplies nothing.


# %%
def counted(work) -> int:
    """FLOPs of the matrix products in `work()`."""
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, **__: 2 * math.prod(a) * b[-1]}  # PyTorch's table lacks it
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, torch.autocast("cpu", torch.bfloat16):
        work()
    return counter.get_total_flops()


inputs, targets, _ = next(Loader(training, batch_size=2, seq_len=T, seed=0))
forward = counted(lambda: model(inputs, targets))
backward = counted(lambda: model(inputs, targets).backward()) - forward
stepping = counted(optimizer.step)
optimizer.zero_grad()
predicted = 2 * (forward_flops(model, T) - T**2 * config.depth * config.dim)  # a quarter of 4 L C T^2 left out
head = 2 * T * 2 * model.head.weight.numel()
muon = 0
for group in optimizer.param_groups:
    for matrix in group["params"] if "ns_steps" in group else []:
        m, n = sorted(matrix.shape[-2:])
        muon += group["ns_steps"] * (4 * m * m * n + 2 * m**3) * (matrix.numel() // (m * n))
print(f"{'a batch of 2':12} {'predicted':>16} {'counted':>16}")
print(f"{'forward':12} {predicted + 2 * head:16,} {forward:16,}")
print(f"{'backward':12} {2 * predicted - 2 * head:16,} {backward:16,}")
print(f"{'optimizer':12} {muon:16,} {stepping:16,}")
assert (forward, backward, stepping) == (predicted + 2 * head, 2 * predicted - 2 * head, muon)

step_flops = 3 * predicted * B // 2
print(f"the optimizer adds {muon / step_flops:.1%} to a step of {B} x {T} tokens")

# %% [markdown]
# ## Bytes
#
# Weights and gradients are float32, 4 bytes each. Muon keeps one number beside each weight, AdamW two. And the forward
# pass keeps *activations*, everything the backward pass will ask for. They grow with the batch; the rest does not.

# %%
N = sum(p.numel() for p in model.parameters())
assert N == sum(parameters(model).values())
state_predicted = 0
for each in optimizer.optimizers:
    numbers = sum(p.numel() for group in each.param_groups for p in group["params"])
    state_predicted += numbers * {"Muon": 4, "AdamW": 8}[type(each).__name__]
state = sum(tensor.nbytes for tensor in flatten_state(optimizer.state_dict())[0].values())
assert state == state_predicted


def kept(rows: int, dtype: torch.dtype) -> int:
    """Bytes of what a forward pass on `rows` sequences keeps, each storage once, parameters not counted."""
    own, storages = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    tokens = torch.zeros(rows, T, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(device, dtype):
        model(tokens, tokens)
    return sum(storage.nbytes() for storage in storages.values())


one = activation_bytes(config, T, FP32)
assert kept(1, FP32) == one
sizes = {"weights": 4 * N, "gradients": 4 * N, "optimizer state": state, "activations of a row, float32": one}
for name, dtype in dtypes.items():
    first, four = kept(1, dtype), kept(4, dtype)
    sizes[f"activations of {B} rows, {name}"] = first + (B - 1) * (four - first) // 3  # each further row adds a third
for name, size in sizes.items():
    print(f"{name:34} {size / 1e6:8.1f} MB")
assert one < sizes[f"activations of {B} rows, float32"] <= B * one

# %% [markdown]
# ## What the allocator costs
#
# A step makes arrays of many megabytes and drops them, thousands of times. The C library gives each of them back to the
# system, and asks for new pages the next time; the system fills every page with zeros when it is first touched (a *page
# fault*). `tune_cpu` tells it to keep what was freed. Here is the loop of train.py with a clock between its parts, some
# steps without and some with this.

# %%
PARTS = ("loader", "forward", "backward", "optimizer")
loader = Loader(training, batch_size=B, seq_len=T, seed=0)


def step(dtype: torch.dtype) -> list[float]:
    """Seconds of the parts of a step of training."""
    times = [time.perf_counter()]
    inputs, targets, _ = next(loader)
    times.append(time.perf_counter())
    with autocast(device, dtype):
        loss = model(inputs, targets) / targets.numel()
    times.append(time.perf_counter())
    loss.backward()
    times.append(time.perf_counter())
    optimizer.step()
    optimizer.zero_grad()
    times.append(time.perf_counter())
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def faults() -> tuple[float, int]:
    """Seconds of a step, and its page faults: the least of two, after one that sets things up."""
    import resource  # not on every system

    seen = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        seconds = sum(step(fast))
        seen.append((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
    return tuple(min(column) for column in zip(*seen[1:], strict=True))


if sys.platform == "linux":
    returned = faults()
    tune_cpu()
    retained = faults()
    for name, (seconds, pages) in (("memory returned", returned), ("memory kept", retained)):
        print(f"{name:16} {1000 * seconds:7.0f} ms a step, {pages:7,} page faults")
    assert returned[1] > 5 * retained[1]
else:
    print("the C library of this system has no such setting")

# %% [markdown]
# The faults are asserted, the time is not: what a fault costs, and how many there are, differs. The C library always
# returns arrays above 32 MB. All logits of a batch would be such an array, and our loss never makes them; so what is
# left to save may be small. The times above say what it was here.
#
# ## What this machine can do
#
# Two ceilings: how fast it multiplies matrices that are large and square, and how fast it moves bytes from memory and
# back. The **arithmetic intensity** of some work is its FLOPs for each byte it must move. Work of intensity I cannot
# run faster than
#
#     min( peak, I * bandwidth )                                        the roofline (Williams, Waterman, Patterson 2009)
#
# Where the two meet, memory stops being the limit. Two cases at the ends: a matrix times a vector uses each weight
# once, half a FLOP for each byte of float32. That is decoding at batch 1. A large matrix product uses every number
# hundreds of times. Between them stand squares of growing size and the products of *our* model, at the shapes that a
# batch gives them.


# %%
def seconds(work) -> float:
    """The best time of `work()` out of 30."""
    return min(timeit.repeat(work, number=1, repeat=30))


source, target = torch.zeros(2, 2**26)  # 256 MB each: more than the caches hold
bandwidth = 2 * source.nbytes / seconds(lambda: target.copy_(source))  # read and written
peak = {name: matmul_peak(device, dtype, 0.3) for name, dtype in dtypes.items()}
print(f"copying {bandwidth / 1e9:.1f} GB/s")
for name in peak:
    meeting = peak[name] / bandwidth
    print(f"matrix products in {name} {peak[name] / 1e9:.0f} GFLOP/s; the two meet at {meeting:.0f} FLOPs a byte")
ceiling = peak[list(dtypes)[-1]]  # of the dtype train.py chooses here

matrix, vector = torch.randn(8192, 4096), torch.randn(4096)  # 134 MB of weights
points = {  # name -> (FLOPs a byte, FLOP/s)
    "matrix x vector": (0.5, 2 * matrix.numel() / seconds(lambda: matrix @ vector)),
    "a + b": (1 / 12, source.numel() / seconds(lambda: torch.add(source, target, out=target))),
}
C, head_dim = config.dim, config.dim // config.heads
shapes = {f"square {size}": (1, size, size, size) for size in (32, 64, 128, 256, 512, 1024)} | {
    "projection C -> C": (1, B * T, C, C),
    "up C -> 4C": (1, B * T, C, 4 * C),
    "down 4C -> C": (1, B * T, 4 * C, C),
    "head, 1024 tokens": (1, 1024, C, config.vocab_size),
    "scores, all heads": (B * config.heads, T, head_dim, T),
    "sums, all heads": (B * config.heads, T, T, head_dim),
}
for name, (batch, n, k, m) in shapes.items():  # batch x (n, k) @ (k, m)
    a, b = torch.randn(batch, n, k, dtype=fast).squeeze(0), torch.randn(batch, k, m, dtype=fast).squeeze(0)
    flops, moved = 2 * batch * n * k * m, fast.itemsize * batch * (n * k + k * m + n * m)
    points[name] = flops / moved, flops / seconds(lambda a=a, b=b: a @ b)

print(f"{'':18} {'FLOPs a byte':>12} {'GFLOP/s':>9} {'of the peak':>12}")
for name, (intensity, rate) in points.items():
    print(f"{name:18} {intensity:12.2f} {rate / 1e9:9.1f} {rate / ceiling:12.1%}")
for name in ("matrix x vector", "a + b"):
    intensity, rate = points[name]
    assert rate < 0.3 * peak["float32"]
    assert 0.2 < rate / (intensity * bandwidth) < 5  # the memory sets their pace
assert points["square 32"][1] < 0.5 * points["square 1024"][1]

# %% [markdown]
# Why do *small* squares fall short? They lie in the cache, so memory is not it. A product of 32 x 32 is 65,536 FLOPs, a
# fraction of a microsecond, and to call a routine, choose its kernel and fill its pipelines takes longer than that. It
# is why a model of width 64 never runs at the rate of one of width 1024, and why train.py stacks rows into a batch.
#
# ## Seconds, by part, and the share of the peak
#
# The steps again, in float32 and in the dtype train.py chooses here, in turns, so that both see the same machine.
# Medians over the steps. FLOPs of a step, over its seconds, over the peak: how much of the machine went into the
# model's own arithmetic. The peak is measured again after, and the better of both counts: a neighbour on the machine
# may have slowed one of them.

# %%
STEPS, clock = 6, {name: [] for name in dtypes}
for _ in range(STEPS):
    for name, dtype in dtypes.items():
        clock[name].append(step(dtype))
median = {name: [statistics.median(times) for times in zip(*steps[1:], strict=True)] for name, steps in clock.items()}
total = {name: sum(parts) for name, parts in median.items()}
print(f"{'milliseconds':12} " + "".join(f"{name:>10}" for name in dtypes))
for row, part in enumerate(PARTS):
    print(f"{part:12} " + "".join(f"{1000 * parts[row]:10.1f}" for parts in median.values()))
for loading, forward, backward, moving in median.values():
    assert loading < 0.05 * forward and forward + backward > moving

peak = {name: max(peak[name], matmul_peak(device, dtype, 0.3)) for name, dtype in dtypes.items()}
for name in dtypes:
    rate = step_flops / total[name]
    reached = f"{rate / 1e9:.0f} of {peak[name] / 1e9:.0f} GFLOP/s"
    print(f"{name:9} {B * T / total[name]:8,.0f} tokens/s, {reached}: {rate / peak[name]:.0%}")
    assert rate / peak[name] < 1.1
if fast != FP32:
    gain, at_most = total["float32"] / total["bfloat16"], peak["bfloat16"] / peak["float32"]
    print(f"bfloat16 makes products {at_most:.2f} times as fast and the whole step {gain:.2f} times")
    assert 0.5 < gain < 2 * at_most  # roughly: the clock of a shared machine is no judge
else:
    print("this machine multiplies bfloat16 hardly faster than float32, so train.py stays with float32")

token = total[list(dtypes)[-1]] / (B * T)
start = time.perf_counter()
with autocast(device, fast):
    bits_per_byte(model, windows(validation, batch_size=B, seq_len=T, limit=8192), tokenizer.token_bytes)
evaluated = (time.perf_counter() - start) / 8192
print(f"a token of evaluation takes {evaluated / token:.2f} of a token of training")
assert evaluated < 0.9 * token  # a forward pass without gradients, a third of the FLOPs

# %% [markdown]
# The step gains less than the products do. Norms, rotations, softmax, the optimizer's sums: all that is not a matrix
# product moves bytes at the pace of the memory, in either dtype (Amdahl 1967). The faster the products, the larger the
# share of the rest.
#
# ## What to take home
#
# - Know the FLOPs before you run: 6 N a token and a little for attention. They are exact.
# - Know the two ceilings of the machine, measured in the same minute.
# - A part below its ceiling is worth looking at. A part at its ceiling needs fewer FLOPs or fewer bytes, not better code.
# - Look for what does nothing useful: page faults, copies, tiny calls.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
for row, part in enumerate(PARTS):
    lengths = [1000 * parts[row] for parts in median.values()]
    left.barh(list(median), lengths, left=[1000 * sum(parts[:row]) for parts in median.values()], label=part)
left.set(xlabel="milliseconds a step", title=f"{B} x {T} tokens, {N / 1e6:.1f}M parameters")
left.legend()
intensities = [2**e for e in range(-4, 12)]
right.loglog(intensities, [min(ceiling, i * bandwidth) / 1e9 for i in intensities], color="0.5")
for name, (intensity, rate) in points.items():
    right.plot(intensity, rate / 1e9, "o", color="C0" if name[:6] in ("matrix", "a + b", "square") else "C1")
right.set(xlabel="FLOPs a byte", ylabel="GFLOP/s", title="Roofline of this machine (orange: our model's products)")
lectern.save_figure(figure, "03_where_the_time_goes")
