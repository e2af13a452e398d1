"""The Triton path of kernels/glu.py: one kernel forward and one backward, for plain and for gated nonlinearities."""

from torch import Tensor

from kernels.launch import power_of_2, tl, triton

# N rows, C columns


@triton.jit
def value_of(x, NAME: tl.constexpr):
    """f(x). The tanh of gelu_tanh is written as a sigmoid, 1 + tanh(u) = 2 sigmoid(2 u), which loses nothing near 0."""
    if NAME == "silu":
        y = x * tl.sigmoid(x)
    elif NAME == "gelu":
        y = x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        y = x * tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
    elif NAME == "sigmoid":
        y = tl.sigmoid(x)
    else:
        y = tl.where(x <= 0, 0, x)  # NaN stays NaN
        if NAME == "relu2":
            y *= y
    return y


@triton.jit
def slope_of(x, NAME: tl.constexpr):
    """f'(x)."""
    if NAME == "silu":
        s = tl.sigmoid(x)
        d = s * (1 + x * (1 - s))
    elif NAME == "gelu":
        d = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(x * x * -0.5) * 0.3989422804014327
    elif NAME == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
        d = s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif NAME == "sigmoid":
        s = tl.sigmoid(x)
        d = s * (1 - s)
    elif NAME == "relu":
        d = tl.where(x <= 0, 0.0, 1.0)
    else:
        d = tl.where(x <= 0, 0, 2 * x)
    return d


@triton.jit
def block(N, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows (ROWS, 1) and columns (1, BLOCK) of this program as int64, and which numbers exist."""
    across = tl.cdiv(C, BLOCK)
    rows = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = (tl.program_id(0) % across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return rows, columns, (rows < N) & (columns < C)


@triton.jit
def forward_kernel(
    gate, up, scale, bias, y, N, C, gate_row, up_row, NAME: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """ROWS rows by BLOCK columns a program. Rows of gate and up lie gate_row and up_row numbers apart, those of y C."""
    rows, columns, inside = block(N, C, ROWS, BLOCK)
    out = value_of(tl.load(gate + rows * gate_row + columns, inside, 0).to(tl.float32), NAME)
    if up is not None:
        out *= tl.load(up + rows * up_row + columns, inside, 0).to(tl.float32)
    if scale is not None:
        out = out * tl.load(scale).to(tl.float32) + tl.load(bias).to(tl.float32)
    tl.store(y + rows * C + columns, out, inside)


@triton.jit
def backward_kernel(
    dy, gate, up, scale, dgate, dup, sums, N, C, gate_row, up_row, d_row,
    NAME: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of dgate and dup lie d_row numbers apart. sums gets each program's share of the gradients of scale and bias."""
    rows, columns, inside = block(N, C, ROWS, BLOCK)
    d = tl.load(dy + rows * C + columns, inside, 0).to(tl.float32)
    x = tl.load(gate + rows * gate_row + columns, inside, 0).to(tl.float32)
    if up is not None:
        tl.store(dup + rows * d_row + columns, d * value_of(x, NAME), inside)
        d *= tl.load(up + rows * up_row + columns, inside, 0).to(tl.float32)
    if scale is not None:
        at = sums + tl.program_id(0) * 2
        tl.store(at, tl.sum(tl.sum(d * value_of(x, NAME), 1), 0))
        tl.store(at + 1, tl.sum(tl.sum(d, 1), 0))
        d *= tl.load(scale).to(tl.float32)
    tl.store(dgate + rows * d_row + columns, d * slope_of(x, NAME), inside)


def by_rows(*tensors: Tensor) -> tuple[list[Tensor], list[int], int, int]:
    """The tensors as rows of numbers that lie together, their distances, and N and C. One row if nothing lies between."""
    if all(t.is_contiguous() for t in tensors):
        return list(tensors), [0] * len(tensors), 1, tensors[0].numel()
    C = tensors[0].shape[-1]
    made = [t.reshape(-1, C) for t in tensors]
    made = [t if t.stride(1) == 1 else t.contiguous() for t in made]
    return made, [t.stride(0) for t in made], made[0].shape[0], C


def blocks(N: int, C: int) -> tuple[tuple[int], dict]:
    """The grid, and rows and columns of a program: up to 2048 numbers together."""
    block = min(2048 if N == 1 else 1024, power_of_2(C))
    rows = min(2048 // block, power_of_2(N))
    return (-(-N // rows) * -(-C // block),), dict(ROWS=rows, BLOCK=block, num_warps=4)
