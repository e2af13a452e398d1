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
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from lectern import ROOT, save_figure
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import train
from data import Loader, load, load_tokenizer, training_documents, windows
from models import Config, LanguageModel, build_model
from models.describe import activation_bytes, forward_flops, parameters
from models.machine import autocast, choose_dtype, matmul_peak, tune_cpu
from models.score import bits_per_byte
from optim import flatten_state

tune_cpu()
torch.manual_seed(0)
device, FP32 = torch.device("cpu"), torch.float32
fast = choose_dtype("auto", device)  # bfloat16 where this machine multiplies it faster
dtypes = list(dict.fromkeys([FP32, fast]))

config = Config.of()  # what train.py does without a flag
texts = lambda: (document.text for document in training_documents(config.data))  # noqa: E731
tokenizer = load_tokenizer(config.tokenizer, texts=texts, vocab_size=config.vocab_size)
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
# with values: 2 · 2 T D for each head and token, over the whole square.
#
# The backward pass needs two products for each one of the forward pass: the gradient of the input and the gradient of
# the weight. So, a token of training, with N the weights that are multiplied (embeddings are only looked up):
#
#     FLOPs = 3 * (2 N + 4 L H D T) = 6 N + 12 L H D T                  (Chowdhery et al. 2022, PaLM, appendix B)
#
# `models.describe` counts so. Held against published models:

# %%
for name in ("gpt2", "llama-8b"):
    published = Config.of(model=name)
    with torch.device("meta"):  # shapes without memory
        large = LanguageModel(published)
    context, head_dim = 2048 if name == "llama-8b" else 1024, published.dim // published.heads
    N = sum(m.weight.numel() for m in large.modules() if isinstance(m, nn.Linear))
    by_formula = 6 * N + 12 * published.depth * published.heads * head_dim * context
    total = sum(parameters(large).values())
    print(f"{name:9} {total:14,} parameters, {by_formula:15,} FLOPs a token of training")
    assert 3 * forward_flops(large, context) == by_formula * context
    assert total == {"gpt2": 124_439_808, "llama-8b": 8_030_261_248}[name]

# %% [markdown]
# The same formula judges a machine. PaLM 540B: 238,300 tokens a second on 6144 chips of 275 TFLOP/s. The share of the
# peak that became model FLOPs is what that paper named MFU, and reports as 46.2 %:

# %%
palm = 118 * (2 * 18432 * 48 * 256 + 2 * 18432 * 256 + 3 * 18432 * 4 * 18432) + 256_000 * 18432  # its parameters
mfu = 238_300 * (6 * palm + 12 * 118 * 48 * 256 * 2048) / (6144 * 275e12)
print(f"PaLM: {palm / 1e9:.2f}B parameters, model FLOPs utilisation {mfu:.1%}")
assert round(mfu, 3) == 0.462

# %% [markdown]
# ## FLOPs, counted
#
# PyTorch can count while it runs. For our default model prediction and count agree exactly, and one thing is worth a
# look: the loss makes its gradients in the *forward* pass (`nn/objective/next_token.py`), so as never to hold all
# logits. The head's two backward products are therefore counted there.

# %%
inputs, targets, _ = next(Loader(training, batch_size=2, seq_len=T, seed=0))
with FlopCounterMode(display=False) as forward:
    loss = model(inputs, targets)
with FlopCounterMode(display=False) as backward:
    loss.backward()
predicted, head = 2 * forward_flops(model, T), 2 * T * 2 * model.head.weight.numel()
print(f"{'a batch of 2':12} {'predicted':>16} {'counted':>16}")
print(f"{'forward':12} {predicted + 2 * head:16,} {forward.get_total_flops():16,}")
print(f"{'backward':12} {2 * predicted - 2 * head:16,} {backward.get_total_flops():16,}")
assert forward.get_total_flops() == predicted + 2 * head
assert backward.get_total_flops() == 2 * predicted - 2 * head

# %% [markdown]
# The optimizer multiplies too: Muon takes each (rows, columns) matrix through 5 Newton-Schulz steps of 4 m² n + 2 m³
# FLOPs, m being the smaller side and n the larger. That is once a step, whatever the batch. AdamW multiplies no
# matrices.

# %%
with FlopCounterMode(display=False) as stepping:
    optimizer.step()
optimizer.zero_grad()
muon = 0
for group in optimizer.param_groups:
    for matrix in group["params"] if "ns_steps" in group else []:
        m, n = sorted(matrix.shape[-2:])
        muon += group["ns_steps"] * (4 * m * m * n + 2 * m**3) * (matrix.numel() // (m * n))
step_flops = 3 * forward_flops(model, T) * B
print(f"optimizer: {muon:,} predicted, {stepping.get_total_flops():,} counted")
print(f"that is {muon / step_flops:.1%} on top of a step of {B} x {T} tokens")
assert stepping.get_total_flops() == muon

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
state_counted = sum(tensor.nbytes for tensor in flatten_state(optimizer.state_dict())[0].values())
assert state_counted == state_predicted


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
rows = {dtype: [kept(n, dtype) for n in (1, 4)] for dtype in dtypes}
per_row = {dtype: (four - first) / 3 for dtype, (first, four) in rows.items()}  # what each further row adds
print(f"{'weights':34} {4 * N / 1e6:8.1f} MB")
print(f"{'gradients':34} {4 * N / 1e6:8.1f} MB")
print(f"{'optimizer state':34} {state_counted / 1e6:8.1f} MB")
print(f"{'activations of a row, float32':34} {one / 1e6:8.1f} MB predicted, {rows[FP32][0] / 1e6:.1f} counted")
for dtype in rows:
    name = f"activations of {B} rows, {dtype}".replace("torch.", "")
    print(f"{name:34} {(rows[dtype][0] + (B - 1) * per_row[dtype]) / 1e6:8.1f} MB")
assert 0 < per_row[FP32] <= one

# %% [markdown]
# ## What this machine can do
#
# Two ceilings. How fast it multiplies matrices that are large and square, and how fast it moves bytes from memory and
# back.


# %%
def seconds(work, least: float = 0.05) -> float:
    """The best time of `work()`, tried for a while."""
    work()
    best, end = float("inf"), time.perf_counter() + least
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


peak = {dtype: matmul_peak(device, dtype, 0.3) for dtype in dtypes}
source = torch.zeros(2**26)  # 256 MB: more than the caches hold
target = source.clone()
bandwidth = 2 * source.nbytes / seconds(lambda: target.copy_(source), 0.3)  # read and written
for dtype in peak:
    print(f"matrix products in {str(dtype).removeprefix('torch.'):9} {peak[dtype] / 1e9:7.0f} GFLOP/s")
print(f"copying {bandwidth / 1e9:27.1f} GB/s")
for dtype in peak:
    print(f"they meet at {peak[dtype] / bandwidth:.0f} FLOPs a byte in {str(dtype).removeprefix('torch.')}")

# %% [markdown]
# The **arithmetic intensity** of some work is its FLOPs for each byte it must move. Work of intensity I cannot run
# faster than
#
#     min( peak, I * bandwidth )                                        the roofline (Williams, Waterman, Patterson 2009)
#
# Below the meeting point the memory is the limit, and the multipliers wait. Two cases at the ends: a matrix times a
# vector uses each weight once, half a FLOP for each byte of float32. That is decoding at batch 1. A large matrix
# product uses every number hundreds of times.

# %%
points = {}  # name -> (FLOPs a byte, FLOP/s)


def measure(name: str, flops: float, bytes_moved: float, work) -> float:
    points[name] = flops / bytes_moved, flops / seconds(work)
    return points[name][1]


tall, vector = torch.randn(8192, 4096), torch.randn(4096)  # 134 MB of weights
measure("matrix x vector", 2 * tall.numel(), tall.nbytes, lambda: tall @ vector)
measure("a + b", source.numel(), 3 * source.nbytes, lambda: torch.add(source, target, out=target))
for size in (32, 64, 128, 256, 512, 1024):
    a = torch.randn(size, size, dtype=fast)
    measure(f"square {size}", 2 * size**3, 3 * a.nbytes, lambda a=a: a @ a)

print(f"{'':18} {'FLOPs a byte':>12} {'GFLOP/s':>9} {'of the peak':>12}")
for name, (intensity, rate) in points.items():
    print(f"{name:18} {intensity:12.2f} {rate / 1e9:9.1f} {rate / peak[fast]:12.1%}")
for name in ("matrix x vector", "a + b"):
    intensity, rate = points[name]
    assert rate < 0.3 * peak[FP32]
    assert 0.2 < rate / (intensity * bandwidth) < 5  # the memory sets their pace
assert points["square 32"][1] < 0.5 * points["square 1024"][1]

# %% [markdown]
# Why do *small* squares fall short? They lie in the cache, so memory is not it. A product of 32 x 32 is 65,536 FLOPs, a
# fraction of a microsecond, and to call a routine, choose its kernel and fill its pipelines takes longer than that.
# Small work is all overhead. It is why a model of width 64 never runs at the rate of one of width 1024, and why
# train.py stacks rows into a batch.
#
# Now the products of *our* model, at the shapes that a batch gives them:

# %%
heads, dim = config.heads, config.dim
head_dim = dim // heads
shapes = {
    "projection C -> C": (1, B * T, dim, dim),
    "up C -> 4C": (1, B * T, dim, 4 * dim),
    "down 4C -> C": (1, B * T, 4 * dim, dim),
    "head, 1024 tokens": (1, 1024, dim, config.vocab_size),
    "scores, all heads": (B * heads, T, head_dim, T),
    "sums, all heads": (B * heads, T, T, head_dim),
}
print(f"{'':20} {'shape':>26} {'GFLOP/s':>9} {'of the peak':>12}")
for name, (batch, n, k, m) in shapes.items():
    a, b = torch.randn(batch, n, k, dtype=fast), torch.randn(batch, k, m, dtype=fast)
    moved = 2 * batch * (n * k + k * m + n * m)
    rate = measure(name, 2 * batch * n * k * m, moved, (lambda a=a[0], b=b[0]: a @ b) if batch == 1 else lambda a=a, b=b: a @ b)
    shape = f"{batch} x ({n} x {k}) @ ({k} x {m})" if batch > 1 else f"({n} x {k}) @ ({k} x {m})"
    print(f"{name:20} {shape:>26} {rate / 1e9:9.0f} {rate / peak[fast]:12.0%}")

# %% [markdown]
# ## Seconds, by part
#
# The loop of train.py with a clock between its parts, in float32 and in the dtype it chooses here, in turns, so that
# both see the same machine. Medians over the steps.

# %%
loader = Loader(training, batch_size=B, seq_len=T, seed=0)
clock = {dtype: defaultdict(list) for dtype in peak}


def one_step(dtype: torch.dtype) -> None:
    parts, start = clock[dtype], time.perf_counter()
    last = start

    def lap(part: str) -> None:
        nonlocal last
        now = time.perf_counter()
        parts[part].append(now - last)
        last = now

    inputs, targets, _ = next(loader)
    lap("loader")
    with autocast(device, dtype):
        loss = model(inputs, targets) / targets.numel()
    lap("forward")
    loss.backward()
    loss.item()
    lap("backward")
    optimizer.step()
    optimizer.zero_grad()
    lap("optimizer")
    parts["step"].append(time.perf_counter() - start)


STEPS = 7
for _ in range(STEPS + 1):
    for dtype in clock:
        one_step(dtype)
for parts in clock.values():
    for times in parts.values():
        times.pop(0)  # the first step also sets things up

median = {dtype: {part: statistics.median(times) for part, times in parts.items()} for dtype, parts in clock.items()}
print(f"{'milliseconds':12} " + "".join(f"{str(dtype).removeprefix('torch.'):>10}" for dtype in median))
for part in median[FP32]:
    print(f"{part:12} " + "".join(f"{1000 * median[dtype][part]:10.1f}" for dtype in median))

now = median[fast]
for parts in clock.values():  # the parts are the whole
    sums = [sum(times) for times in zip(*(parts[part] for part in parts if part != "step"), strict=True)]
    assert all(0.95 < total / step <= 1 for total, step in zip(sums, parts["step"], strict=True))
assert now["loader"] < 0.05 * now["step"]
assert now["forward"] + now["backward"] > 0.5 * now["step"]

# %% [markdown]
# ## The share of the peak
#
# FLOPs of a step, over its seconds, over the peak: how much of the machine went into the model's own arithmetic. The
# peak is measured again now, and the better of both counts: a neighbour on the machine may have slowed one of them.

# %%
peak = {dtype: max(peak[dtype], matmul_peak(device, dtype, 0.3)) for dtype in peak}
share = {dtype: step_flops / median[dtype]["step"] / peak[dtype] for dtype in peak}
for dtype in peak:
    step, name = median[dtype]["step"], str(dtype).removeprefix("torch.")
    reached = f"{step_flops / step / 1e9:5.0f} of {peak[dtype] / 1e9:5.0f} GFLOP/s"
    print(f"{name:9} {B * T / step:8,.0f} tokens/s, {reached}: {share[dtype]:.0%}")
    assert 0.05 < share[dtype] < 1.1
if fast != FP32:
    gain, at_most = median[FP32]["step"] / median[fast]["step"], peak[fast] / peak[FP32]
    print(f"bfloat16 makes products {at_most:.2f} times as fast and the whole step {gain:.2f} times")
    assert 1 < gain < 1.3 * at_most
else:
    print("this machine multiplies bfloat16 no faster than float32, so train.py stays with float32")

# %% [markdown]
# The step gains less than the products do. Norms, rotations, softmax, the optimizer's sums: all that is not a matrix
# product moves bytes at the pace of the memory, in either dtype (Amdahl 1967). The faster the products, the larger the
# share of the rest.
#
# ## Evaluation
#
# A forward pass without gradients, a third of the FLOPs of training.

# %%
start = time.perf_counter()
with autocast(device, fast):
    bits_per_byte(model, windows(validation, batch_size=B, seq_len=T, limit=8192), tokenizer.token_bytes)
token = (time.perf_counter() - start) / 8192
print(f"a token of evaluation takes {token / (now['step'] / (B * T)):.2f} of a token of training")
if config.eval_every:
    spent = token * config.eval_tokens / (config.eval_every * now["step"])
    print(f"{config.eval_tokens:,} tokens every {config.eval_every} steps: {spent:.1%} on top of the training")
assert token < 0.9 * now["step"] / (B * T)

# %% [markdown]
# ## What the allocator costs
#
# A step makes arrays of many megabytes and drops them, thousands of times. The C library gives each of them back to the
# system, and asks for new pages the next time; the system fills every page with zeros when it is first touched (a *page
# fault*). `tune_cpu` tells it to keep what was freed. The same steps in two fresh processes, with and without:

# %%
STEPS_CODE = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
import torch
import train
from models import Config, build_model
from models.machine import autocast, tune_cpu
if sys.argv[2] == "kept":
    tune_cpu()
config = Config.of()
model = build_model(config)
optimizer = train.build_optimizer(config, model)
tokens = torch.randint(config.vocab_size, (config.batch_size, config.seq_len))
dtype, steps = getattr(torch, sys.argv[3]), []
for step in range(6):
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    with autocast(torch.device("cpu"), dtype):
        model(tokens, tokens).backward()
    optimizer.step()
    optimizer.zero_grad()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    steps.append((seconds, after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt))
print(*map(min, zip(*steps[2:])))
"""


def fresh_process(memory: str) -> list[float]:
    """Seconds, seconds inside the system and page faults of the best step, of a process of its own."""
    words = [sys.executable, "-c", STEPS_CODE, str(ROOT), memory, str(fast).removeprefix("torch.")]
    return [float(number) for number in subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()]


if sys.platform == "linux":
    returned, kept_memory = fresh_process("returned"), fresh_process("kept")
    for name, (step, inside, faults) in (("memory returned", returned), ("memory kept", kept_memory)):
        print(f"{name:16} {1000 * step:7.0f} ms a step, {1000 * inside:5.0f} ms inside the system, {faults:7,.0f} page faults")
    assert returned[2] > 5 * kept_memory[2]
    print(f"the default allocator makes a step {returned[0] / kept_memory[0]:.2f} times as long")
else:
    print("the C library of this system has no such setting")

# %% [markdown]
# The faults are asserted, the time is not: what a fault costs, and how many there are, differs. The C library always
# returns arrays above 32 MB. All logits of a batch would be such an array, and our loss never makes them; so what is
# left to save may be small. The times above say what it was here.

# %% [markdown]
# ## What to take home
#
# - Know the FLOPs before you run: 6 N a token and a little for attention. They are exact.
# - Know the two ceilings of the machine, measured in the same minute.
# - A part below its ceiling is worth looking at. A part at its ceiling needs fewer FLOPs or fewer bytes, not better code.
# - Look for what does nothing useful: page faults, copies, tiny calls.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
for row, dtype in enumerate(median):
    begin = 0.0
    for colour, part in enumerate(("loader", "forward", "backward", "optimizer")):
        length = 1000 * median[dtype][part]
        left.barh(row, length, left=begin, color=f"C{colour}", label=part if row == 0 else None)
        begin += length
left.set_yticks(range(len(median)), [str(dtype).removeprefix("torch.") for dtype in median])
left.set(xlabel="milliseconds a step", title=f"{B} x {T} tokens, {N / 1e6:.1f}M parameters")
left.legend()
intensities = [2**e for e in range(-4, 12)]
right.loglog(intensities, [min(peak[fast], i * bandwidth) / 1e9 for i in intensities], color="0.5")
for name, (intensity, rate) in points.items():
    right.plot(intensity, rate / 1e9, "o", color="C1" if name in shapes else "C0")
    if name not in shapes:
        right.annotate(name, (intensity, rate / 1e9), fontsize=8, xytext=(5, -10), textcoords="offset points")
right.set(xlabel="FLOPs a byte", ylabel="GFLOP/s", title="Roofline of this machine (orange: our model's products)")
save_figure(figure, "03_where_the_time_goes")
