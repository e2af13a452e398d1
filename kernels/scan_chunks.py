"""The PyTorch path of kernels/selective_scan.py: chunks of the scan that stay in a core's cache."""

import torch
from torch import Tensor

# T time, B batch, D channels, N state, K times of a chunk


def chunk_length(rows: int) -> int:
    """K of the PyTorch path: chunks of about 260 thousand numbers, which stay in a core's cache."""
    return max(16, min(64, 262144 // max(1, rows)))


def decays(d: Tensor, A: Tensor, keep: Tensor | None, out: Tensor) -> None:
    torch.mul(d.unsqueeze(2), A, out=out).exp_()
    if keep is not None:
        out.mul_(keep[..., None, None])


@torch.library.custom_op("rosetta::selective_scan", mutates_args=())
def scan(
    x: Tensor, d: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_n C h for time-first x = d u and d (T, B, D), A (N, D), B and C (T, B, N), initial (B, N, D), keep (T, B).

    Channels are innermost, so that every product is one vectorised pass over a chunk in the cache; only the recurrence
    itself goes step by step, one fused multiply-add in place each. Returns y, h at the chunks' borders, and the last h.
    """
    (T, batch, D), N = x.shape, A.shape[0]
    K = chunk_length(batch * N * D)
    y, h_last = x.new_empty(T, batch, D), initial.clone()
    borders = x.new_empty(-(-T // K), batch, N, D)
    a, h = x.new_empty(K, batch, N, D), x.new_empty(K, batch, N, D)
    each = list(zip(a.unbind(0), h.unbind(0), strict=True))
    for i, border in enumerate(borders.unbind(0)):
        now = slice(i * K, min(T, i * K + K))
        K_now = now.stop - now.start
        border.copy_(h_last)
        decays(d[now], A, None if keep is None else keep[now], a[:K_now])
        torch.mul(x[now].unsqueeze(2), B[now].unsqueeze(3), out=h[:K_now])
        h_last = border
        for a_t, h_t in each[:K_now]:
            h_last = h_t.addcmul_(a_t, h_last)
        torch.bmm(C[now].flatten(0, 1).unsqueeze(1), h[:K_now].flatten(0, 1), out=y[now].view(-1, 1, D))
    return y, borders, h_last.clone()


@scan.register_fake
def _(x, d, A, B, C, initial, keep):
    K = chunk_length(x.shape[1] * A.numel())
    return torch.empty_like(x), x.new_empty(-(-x.shape[0] // K), *initial.shape), torch.empty_like(initial)


@torch.library.custom_op("rosetta::selective_scan_backward", mutates_args=())
def scan_backward(
    dy: Tensor, dfinal: Tensor, x: Tensor, d: Tensor, A: Tensor, B: Tensor, C: Tensor, borders: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, d (as it decays), A, B, C and the initial state; arguments as for the forward pass."""
    (T, batch, D), N = x.shape, A.shape[0]
    K = chunk_length(batch * N * D)
    dx, dd, dA, carry = torch.empty_like(x), torch.empty_like(x), torch.zeros_like(A), dfinal.clone()
    dB, dC = torch.empty_like(B), torch.empty_like(C)
    a, g, product, h = (x.new_empty(K + more, batch, N, D) for more in (0, 0, 0, 1))
    each_a, each_g, each_h = a.unbind(0), g.unbind(0), h.unbind(0)
    for i in reversed(range(borders.shape[0])):
        now = slice(i * K, min(T, i * K + K))
        L = now.stop - now.start
        a_now, g_now, made = a[:L], g[:L], product[:L]
        decays(d[now], A, None if keep is None else keep[now], a_now)
        x_now, d_now, dy_now = x[now].unsqueeze(2), d[now].unsqueeze(2), dy[now].unsqueeze(2)
        torch.mul(x_now, B[now].unsqueeze(3), out=h[1 : L + 1])
        h[0].copy_(borders[i])
        for t in range(L):
            each_h[t + 1].addcmul_(each_a[t], each_h[t])
        torch.sum(torch.mul(h[1 : L + 1], dy_now, out=made), -1, out=dC[now])
        torch.mul(dy_now, C[now].unsqueeze(3), out=g_now)
        each_g[L - 1].add_(carry)
        for t in range(L - 1, 0, -1):
            each_g[t - 1].addcmul_(each_a[t], each_g[t])
        torch.mul(each_a[0], each_g[0], out=carry)
        torch.sum(torch.mul(g_now, x_now, out=made), -1, out=dB[now])
        torch.bmm(B[now].flatten(0, 1).unsqueeze(1), g_now.flatten(0, 1), out=dx[now].view(-1, 1, D))
        a_now.mul_(h[:L]).mul_(g_now)
        dA += torch.mul(a_now, d_now, out=made).sum((0, 1))
        torch.sum(a_now.mul_(A), 2, out=dd[now])
    return dx, dd, dA, dB, dC, carry


@scan_backward.register_fake
def _(dy, dfinal, x, d, A, B, C, borders, keep):
    return tuple(torch.empty_like(like) for like in (x, x, A, B, C, dfinal))


def time_first(*tensors: Tensor | None, dtype: torch.dtype) -> list[Tensor | None]:
    return [None if x is None else x.to(dtype).transpose(0, 1).contiguous() for x in tensors]
