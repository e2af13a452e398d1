"""The PyTorch path of kernels/grouped_matmul.py: a loop over the groups, which go through all they need one after the other.

So what a group reads and writes stays in the cache. PyTorch's own grouped_mm loops too on a CPU, and takes neither float64
nor odd widths.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# M rows, K numbers of a row of x, N numbers of a row of y, G groups


def rounded(rows: int, dtype: torch.dtype) -> int:
    """As many rows or up to an eighth more (or up to 7): eight numbers between a power of two and the next.

    On a CPU, products in 16 bits are compiled for each shape they meet, which takes 30 times as long as a product. Groups
    hardly ever have as many rows as before; the few numbers that this gives are soon all compiled.
    """
    unit = max(8, 1 << max(0, rows.bit_length() - 4)) if dtype in (torch.bfloat16, torch.float16) else 1
    return -(-rows // unit) * unit


def rows_of(x: Tensor, places: Tensor | None, begin: int, end: int, limit: int) -> Tensor:
    """The rows of a group, where `places` are (as they stand, if None), and as many of the next groups', which end at `limit`,
    as make them `rounded`; rows of 0 where there are too few. With a limit of 0: rows of 0 in any case.
    """
    last = begin + rounded(end - begin, x.dtype)
    if last <= limit or last == end:
        return x[begin:last] if places is None else x.index_select(0, places[begin:last])
    rows = x.new_empty(last - begin, x.shape[1])
    if places is None:
        rows[: end - begin] = x[begin:end]
    else:
        torch.index_select(x, 0, places[begin:end], out=rows[: end - begin])
    rows[end - begin :] = 0
    return rows


def slack(rows: int) -> int:
    """How many rows beyond all of them the last group may write."""
    return max(8, rows // 8)


@torch.library.custom_op("rosetta::products", mutates_args=())
def products(x: Tensor, weight: Tensor, ends: Tensor, places: Tensor | None) -> Tensor:
    """Row m of x, or x[places[m]], times the matrix of its group: (M, N), rows beyond the groups 0."""
    M, begin = len(x) if places is None else len(places), 0
    y = x.new_empty(M + slack(M), weight.shape[1])
    for group, end in enumerate(bounds := ends.tolist()):
        if end > begin:
            rows = rows_of(x, places, begin, end, bounds[-1])
            torch.mm(rows, weight[group].T, out=y[begin : begin + len(rows)])  # rows of the next groups too, written anew
        begin = end
    y[begin:].zero_()
    return y[:M]


@products.register_fake
def _(x, weight, ends, places):
    return x.new_empty(x.shape[0] if places is None else places.shape[0], weight.shape[1])


@torch.library.custom_op("rosetta::products_backward", mutates_args=())
def products_backward(
    dy: Tensor, x: Tensor, weight: Tensor, ends: Tensor, places: Tensor | None, targets: Tensor | None,
    scale: Tensor | None, said: Tensor | None, need_x: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the rows (M, K) as they are multiplied, of weight (G, N, K) and of scale (M,).

    Row m gave `said[m]` to row targets[m] of what dy is the gradient of, `scale[m]` times.
    """
    (M, begin), (G, N, K) = (len(x) if places is None else len(places), 0), weight.shape
    drows = x.new_empty(M + slack(M) if need_x else 0, K)
    dweight = x.new_empty(G if need_weight else 0, N, K)
    dscale = x.new_zeros(0) if scale is None else torch.zeros_like(scale)
    for group, end in enumerate(bounds := ends.tolist()):
        grad = rows_of(dy, targets, begin, end, 0 if need_weight else bounds[-1])  # a sum over rows: over its own
        if scale is not None and end > begin:
            wide = grad.to(scale.dtype, copy=True)
            own = wide[: end - begin]
            dscale[begin:end] = torch.einsum("mn,mn->m", own, said[begin:end].to(wide.dtype))
            own.mul_(scale[begin:end, None])
            grad = wide.to(dy.dtype)
        if need_x and end > begin:
            torch.mm(grad, weight[group], out=drows[begin : begin + len(grad)])
        if need_weight:
            torch.mm(grad.T, rows_of(x, places, begin, end, bounds[-1]), out=dweight[group])
        begin = end
    drows[begin:].zero_()
    return drows[:M], dweight, dscale


@products_backward.register_fake
def _(dy, x, weight, ends, places, targets, scale, said, need_x, need_weight):
    M = x.shape[0] if places is None else places.shape[0]
    drows = x.new_empty(M if need_x else 0, weight.shape[2])
    dweight = x.new_empty(weight.shape[0] if need_weight else 0, *weight.shape[1:])
    return drows, dweight, x.new_empty(0) if scale is None else torch.empty_like(scale)


def inverse(permutation: Tensor) -> Tensor:
    return torch.empty_like(permutation).scatter_(0, permutation, torch.arange(len(permutation), device=permutation.device))


def combined(y: Tensor, scale: Tensor | None, scatter: Tensor | None, fan_in: int) -> Tensor:
    """(M, N) -> (M / fan_in, N): each row where `scatter` says, times its scale, and rows of one place added up, in float32."""
    back = None if scatter is None else inverse(scatter)
    if scale is None and fan_in > 1 and y.is_floating_point():
        return F.embedding_bag(back.view(-1, fan_in), y, mode="sum")  # its sums are of float32
    y = y if back is None else y.index_select(0, back)
    if scale is None:
        return y if fan_in == 1 else y.unflatten(0, (-1, fan_in)).sum(1)
    wide = torch.promote_types(y.dtype, torch.float32)
    scale = scale.to(wide) if back is None else scale.index_select(0, back).to(wide)
    return torch.bmm(scale.view(-1, 1, fan_in), y.to(wide).unflatten(0, (-1, fan_in))).squeeze(1).to(y.dtype)
