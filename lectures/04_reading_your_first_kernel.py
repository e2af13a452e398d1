# %% [markdown]
# # From softmax to RMSNorm: reading your first kernel
#
# A GPU multiplies faster than it reads. An H200 does about 400 bf16 FLOPs in the time that its memory needs for two
# bytes; so an operation that does little with each number, such as a norm, costs as much as its trips to memory. A
# kernel is a program that makes fewer trips: it reads a row once, does everything with it, and writes once.
#
# In Triton (Tillet, Kung and Cox 2019, doi:10.1145/3315508.3329973) such a program is written for a block of numbers, not for
# one number. This lecture runs its programs in Triton's interpreter, on NumPy; on a GPU the same lines are compiled.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before any is imported

import inspect

import lectern
import matplotlib.pyplot as plt
import numpy as np
import torch
import triton
import triton.language as tl

from kernels import rmsnorm
from kernels.launch import launch, use
from kernels.rmsnorm import rms_norm

generator = torch.Generator().manual_seed(0)

# %% [markdown]
# ## Softmax in NumPy, and what it costs
#
# softmax(x)_i = exp(x_i) / sum_j exp(x_j). Written with array operations, each line is a trip to memory and back.

# %%
traffic = {"read": 0, "written": 0}


def trip(function, *arrays: np.ndarray) -> np.ndarray:
    """Do it, and count the bytes that an operation of its own would move."""
    result = function(*arrays)
    traffic["read"] += sum(array.nbytes for array in arrays)
    traffic["written"] += result.nbytes
    return result


def softmax_in_trips(x: np.ndarray) -> np.ndarray:
    top = trip(lambda x: x.max(-1, keepdims=True), x)
    shifted = trip(np.subtract, x, top)
    exponentials = trip(np.exp, shifted)
    total = trip(lambda e: e.sum(-1, keepdims=True), exponentials)
    return trip(np.divide, exponentials, total)


N, C = 64, 1000
x = torch.randn(N, C, generator=generator)
wanted = softmax_in_trips(x.numpy())
moved = traffic["read"] + traffic["written"]
least = 2 * x.numel() * x.element_size()  # each number in once, out once
print(f"array operations move {moved:,} bytes; one visit would be {least:,}: {moved / least:.1f} times as many")
assert abs(wanted.sum(-1) - 1).max() < 1e-5
assert 8 * x.nbytes < moved < 1.01 * 8 * x.nbytes  # five arrays of that size are read, three written, and some columns

# %% [markdown]
# Why subtract the maximum? It changes nothing in exact arithmetic, numerator and denominator are both divided by
# exp(max), and everything in float32, whose largest number is about exp(88.7).

# %%
with np.errstate(over="ignore", invalid="ignore"):
    naive = np.exp(np.float32([100, 99])) / np.exp(np.float32([100, 99])).sum()
stable = softmax_in_trips(np.float32([[100, 99]]))[0]
print("without the maximum", naive, " with it", stable)
assert np.isnan(naive).all() and abs(stable[0] - 1 / (1 + np.exp(-1))) < 1e-6

# %% [markdown]
# ## The kernel
#
# One program a row. `tl.program_id(0)` says which; `tl.arange` makes the column numbers of a block, whose size is a
# power of two known when the kernel is compiled (`tl.constexpr`). A row is rarely as long as a power of two, so loads and
# stores carry a **mask**: outside it nothing is read, and `other` is put there.

# %%
@triton.jit
def softmax_kernel(x, y, C, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)  # (BLOCK,)
    inside = columns < C
    values = tl.load(x + row * C + columns, inside, OTHER)  # from memory, once
    exponentials = tl.exp(values - tl.max(values, 0))
    tl.store(y + row * C + columns, exponentials / tl.sum(exponentials, 0), inside)  # to memory, once


def softmax(x: torch.Tensor, other: float = -float("inf")) -> torch.Tensor:
    y = torch.full_like(x, float("nan"))  # what the kernel forgets to write stays visible
    launch(softmax_kernel, (x.shape[0],), x, y, x.shape[1], OTHER=other, BLOCK=triton.next_power_of_2(x.shape[1]))
    return y


y = softmax(x)
print(f"largest difference from NumPy: {np.abs(y.numpy() - wanted).max():.1e}")
assert y.isfinite().all() and np.abs(y.numpy() - wanted).max() < 1e-7

# %% [markdown]
# What `other` is matters. With 0 in the 24 places beyond the row, each of them adds exp(0 - max) to the sum. The rows
# then add up to less than one, by little enough to be overlooked:

# %%
wrong = softmax(x, other=0.0).sum(-1)
print(f"rows sum to {wrong.min():.4f} … {wrong.max():.4f} with other = 0")
assert (wrong < 0.9999).all() and (wrong > 0.97).all()
assert (softmax(x).sum(-1) - 1).abs().max() < 1e-5
assert (softmax(x[:, :512].contiguous(), other=0.0).sum(-1) - 1).abs().max() < 1e-5  # and right at a power of two

# %% [markdown]
# That is why the house tests its kernels at odd sizes, and fills fresh memory with NaN before a kernel writes to it.
#
# ## RMSNorm, as it stands in the house
#
# Zhang and Sennrich 2019 (arXiv:1910.07467): y = x / sqrt(mean(x^2) + eps) * weight. The forward kernel has the same
# shape as softmax: numbers in, one reduction a row, numbers out. Three things are new.

# %%
source = inspect.getsource(rmsnorm.forward_kernel.fn)
print(source)
assert "ROWS" in source and "residual is not None" in source and "to(tl.float32)" in source

# %% [markdown]
# 1. **ROWS rows a program.** Rows of 64 numbers would leave most of a program idle; `rows[:, None]` and `columns[None, :]`
#    make a two-dimensional block.
# 2. **`residual is not None` is decided when the kernel is compiled.** An argument that is None becomes a constant, and
#    the lines under the `if` vanish.
# 3. **`.to(tl.float32)`.** Numbers come in as bf16 or fp16 and are summed in float32.
#
# The third is not a nicety. Squares summed in half precision go wrong as soon as the sum is large beside the next term:

# %%
def mean_square_in(dtype: torch.dtype, row: torch.Tensor) -> float:
    """mean(x^2), added up one number after the other in `dtype`."""
    total = torch.zeros((), dtype=dtype)
    for value in row.to(dtype):
        total = total + value * value
    return total.item() / len(row)


lengths = [16, 64, 256, 1024, 4096]
errors = {dtype: [] for dtype in (torch.bfloat16, torch.float16, torch.float32)}
for length in lengths:
    row = torch.randn(length, generator=generator).bfloat16()  # the same numbers for all
    exact = row.double().square().mean().item()
    for dtype, found in errors.items():
        found.append(abs(mean_square_in(dtype, row) / exact - 1))
print(f"\n{'numbers':>8}" + "".join(f"{str(dtype)[6:]:>12}" for dtype in errors))
for i, length in enumerate(lengths):
    print(f"{length:8}" + "".join(f"{found[i]:12.1e}" for found in errors.values()))
assert errors[torch.bfloat16][-1] > 0.5  # 256 + 1 is 256 in bfloat16: the sum stands still
assert max(errors[torch.float32]) < 1e-5

# %% [markdown]
# ## Three that must agree
#
# Every kernel file holds the equation three times: `reference` in NumPy and float64, the Triton kernel, and a PyTorch
# path for machines without a GPU. Here is a shape no block likes, in a layout no kernel likes (every second number).

# %%
wide = torch.randn(3, 5, 2 * 77, generator=generator)
x, weight = wide[..., ::2], torch.randn(77, generator=generator)
with use("triton"):
    from_triton = rms_norm(x, weight)
with use("torch"):
    from_pytorch = rms_norm(x, weight)
exact = rmsnorm.reference(x.double().numpy(), weight.double().numpy())
for name, found in (("Triton", from_triton), ("PyTorch", from_pytorch)):
    print(f"{name:8} differs from NumPy by {np.abs(found.numpy() - exact).max():.1e}")
    assert np.abs(found.numpy() - exact).max() < 2e-6

# %% [markdown]
# ## Backward
#
# With r = 1 / sqrt(mean(x^2) + eps), y_i = x_i r w_i, and every y depends on every x of its row through r:
#
#     dx_i = r g_i - x_i r^3 mean_j(g_j x_j)        g = dy w
#
# A formula is believed when it agrees with the slope of the function itself, found by going a little to both sides.

# %%
dy, direction = np.random.default_rng(0).standard_normal((2, 3, 5, 77))
x64, w64, h = x.double().numpy(), weight.double().numpy(), 1e-5
slope = (dy * (rmsnorm.reference(x64 + h * direction, w64) - rmsnorm.reference(x64 - h * direction, w64))).sum() / (2 * h)
formula = (rmsnorm.reference_backward((dy,), x64, w64)["x"] * direction).sum()
print(f"\nslope {slope:.8f}, formula {formula:.8f}")
assert abs(slope - formula) < 1e-6 * abs(slope)

leaf = x.detach().clone().requires_grad_()
with use("triton"):
    rms_norm(leaf, weight).backward(torch.from_numpy(dy).float())
assert np.abs(leaf.grad.numpy() - rmsnorm.reference_backward((dy,), x64, w64)["x"]).max() < 1e-5

# %% [markdown]
# The norm removes the length of x, so no gradient can point along x (as long as eps is small): an exact property, and
# one a wrong formula does not have.

# %%
along = (leaf.grad * leaf).sum(-1) / (leaf.grad.norm(dim=-1) * leaf.norm(dim=-1))
print(f"cosine between x and its gradient: at most {along.abs().max():.1e}")
assert along.abs().max() < 1e-5

# %% [markdown]
# ## What fusing saves
#
# A transformer adds before it normalises: h = x + f(x), then norm(h). As two kernels: 3 arrays moved by the addition, 2 by
# the norm. As one: x and f(x) in, h and y out. And with the norm as four array operations, of which each reads and writes:

# %%
big = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
alone, fused = rmsnorm.SPEC.cost(x=big)[0], rmsnorm.SPEC.cost(x=big, residual=big)[0]
addition = 3 * big.nbytes
ways = {
    "array operations": addition + (2 + 1 + 2 + 2) * big.nbytes,  # square, mean, times r, times weight
    "addition, norm": addition + alone.bytes,
    "fused": fused.bytes,
}
bandwidth = 4.8e12  # bytes a second: the H200's data sheet
print(f"\n{'for 4096 x 4096 in bf16':24}{'MB moved':>9}{'µs at 4.8 TB/s':>16}")
for way, count in ways.items():
    print(f"{way:24}{count / 1e6:9.0f}{count / bandwidth * 1e6:16.0f}")
assert fused.bytes * 5 == (addition + alone.bytes) * 4
assert alone.flops / alone.bytes < 2  # FLOPs a byte; the H200 would need about 200 to be kept busy

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for dtype, found in errors.items():
    left.loglog(lengths, np.maximum(found, 1e-9), "o-", label=f"summed in {str(dtype)[6:]}")
left.set(xlabel="numbers in a row", ylabel="relative error of the mean square", title="Why float32 inside")
left.legend()
right.bar(list(ways), [count / 1e6 for count in ways.values()])
right.set(ylabel="MB moved, 4096 x 4096 in bf16", title="Why fuse")
lectern.save_figure(figure, "04_reading_your_first_kernel")

# %% [markdown]
# Now open `kernels/rmsnorm.py` and read it from top to bottom; you have seen all of it. Then change one sign or one
# mask in it, and run `python -m pytest tests/kernels -k rmsnorm`. `python -m tests.mutate kernels/rmsnorm.py` does that
# with every operator, constant and mask of the file in turn, and counts what the tests notice.
