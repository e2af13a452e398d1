"""The PyTorch path of kernels/grouped_matmul.py: rows are brought into the order of their groups; a loop goes through these.

PyTorch's own grouped_mm loops too on a CPU, and takes neither float64 nor odd widths.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import Function

# M rows, K numbers of a row of x, N numbers of a row of y, G groups


def rounded(rows: int, dtype: torch.dtype) -> int:
    """As many rows or up to an eighth more (or up to 7): eight numbers between a power of two and the next.

    On a CPU, products in 16 bits are compiled for each shape they meet, which takes 30 times as long as a product. Groups
    hardly ever have as many rows as before; the few numbers that this gives are soon all compiled.
    """
    unit = max(8, 1 << max(0, rows.bit_length() - 4)) if dtype in (torch.bfloat16, torch.float16) else 1
    return -(-rows // unit) * unit


def rows_of(x: Tensor, begin: int, end: int, *, alone: bool = False) -> Tensor:
    """The rows of a group and as many of those behind as make them `rounded`; rows of 0 in their place where there are none,
    or where those of the group are to stand `alone`.
    """
    last = begin + rounded(end - begin, x.dtype)
    if last == end or not alone and last <= len(x):
        return x[begin:last]
    rows = x.new_empty(last - begin, x.shape[1])
    rows[: end - begin] = x[begin:end]
    rows[end - begin :] = 0
    return rows


def slack(rows: int) -> int:
    """How many rows beyond all of them the last group may write."""
    return max(8, rows // 8)


@torch.library.custom_op("rosetta::products", mutates_args=())
def products(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each row of x (M, K) times the matrix of its group: (M, N), rows beyond the groups 0."""
    M, begin = len(x), 0
    y = x.new_empty(M + slack(M), weight.shape[1])
    for matrix, end in zip(weight.mT.unbind(), ends.tolist(), strict=True):
        if end > begin:
            rows = rows_of(x, begin, end)
            torch.mm(rows, matrix, out=y[begin : begin + len(rows)])  # rows of the next groups too, written anew
        begin = end
    y[begin:].zero_()
    return y[:M]


@products.register_fake
def _(x, weight, ends):
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("rosetta::products_backward", mutates_args=())
def products_backward(
    dy: Tensor, x: Tensor, weight: Tensor, ends: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x (M, K) and weight (G, N, K), of no rows and no groups where they are not needed."""
    M, begin = len(x), 0
    dx = x.new_empty(M + slack(M) if need_x else 0, x.shape[1])
    dweight = torch.empty_like(weight if need_weight else weight[:0], memory_format=torch.contiguous_format)
    wide = dy.shape[1] > x.shape[1]  # of two copies, the smaller
    for group, end in enumerate(ends.tolist()):
        grad = rows_of(dy, begin, end, alone=need_weight and not wide)
        if need_x and end > begin:
            torch.mm(grad, weight[group], out=dx[begin : begin + len(grad)])
        if need_weight:  # a sum over rows: in one of the two, the narrower, those of other groups are 0
            torch.mm(grad.T, rows_of(x, begin, end, alone=wide), out=dweight[group])
        begin = end
    dx[begin:].zero_()
    return dx[:M], dweight


@products_backward.register_fake
def _(dy, x, weight, ends, need_x, need_weight):
    G, N, K = weight.shape
    return x.new_empty(x.shape[0] if need_x else 0, K), weight.new_empty(G if need_weight else 0, N, K)


def inverse(permutation: Tensor) -> Tensor:
    return torch.empty_like(permutation).scatter_(0, permutation, torch.arange(len(permutation), device=permutation.device))


def dealt(x: Tensor, places: Tensor | None, fan: int) -> Tensor:
    """(M / fan, N) -> (M, N): row m is x[places[m] // fan], where places are a permutation (the identity, if None)."""
    return x if places is None else x.index_select(0, places if fan == 1 else places // fan)


def added(y: Tensor, places: Tensor | None, fan: int) -> Tensor:
    """(M, N) -> (M / fan, N), the gradient of `dealt`: row m is added to row places[m] // fan. Sums are in float32."""
    if fan > 1 and y.is_floating_point():
        return F.embedding_bag(inverse(places).view(-1, fan), y, mode="sum")  # whose sums are
    y = y if places is None else y.index_select(0, inverse(places))
    return y if fan == 1 else y.unflatten(0, (-1, fan)).sum(1)


def gated(y: Tensor, scale: Tensor, places: Tensor | None, fan: int) -> tuple[Tensor, Tensor]:
    """`added` of rows times their scale (M,); and the rows as they were, in the order of the results: (M / fan, fan, N)."""
    back, wide = None if places is None else inverse(places), torch.promote_types(y.dtype, torch.float32)
    said = dealt(y, back, 1).unflatten(0, (-1, fan))
    return torch.bmm(dealt(scale, back, 1).to(wide).view(-1, 1, fan), said.to(wide)).squeeze(1).to(y.dtype), said


def gated_backward(dy: Tensor, said: Tensor, scale: Tensor, places: Tensor | None, fan: int) -> tuple[Tensor, Tensor]:
    """Gradients of the rows (M, N), in the order of their groups, and of scale (M,)."""
    back, wide = None if places is None else inverse(places), torch.promote_types(dy.dtype, torch.float32)
    grad = dy.to(wide)
    dscale = torch.bmm(said.to(wide), grad[:, :, None]).flatten()
    drows = (grad[:, None] * dealt(scale, back, 1).to(wide).view(-1, fan, 1)).to(dy.dtype).flatten(0, 1)
    return dealt(drows, places, 1), dealt(dscale, places, 1).to(scale.dtype)


class Dealt(Function):
    """`dealt`, with a gradient: where several products on a CPU read the same rows."""

    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor, fan: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.fan = fan
        return dealt(x, places, fan)

    @staticmethod
    def backward(ctx, drows: Tensor) -> tuple[Tensor, None, None]:
        return added(drows, *ctx.saved_tensors, ctx.fan), None, None
