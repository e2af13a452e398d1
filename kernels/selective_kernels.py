"""The Triton path of kernels/selective_scan.py: a program goes through the times of some channels of a row.

Backward it goes from border to border, the last first, and computes the states between two of them again.
"""

from kernels.launch import power_of_2, tl, triton

# D channels, N state, K times of a chunk


@triton.jit
def step_size(delta, at, inside, bias, SOFTPLUS: tl.constexpr):
    """d and its derivative by delta; 0 outside."""
    d = tl.load(delta + at, inside, 0).to(tl.float32) + bias
    slope = d * 0 + 1
    if SOFTPLUS:
        slope = tl.sigmoid(d)
        small = tl.exp(-tl.abs(d))
        more = 1 + small  # log(1 + small) without loss: the rounding of 1 + small cancels in the quotient
        d = tl.maximum(d, 0) + tl.where(more == 1, small, tl.log(more) * (small / tl.where(more == 1, 1, more - 1)))
    return tl.where(inside, d, 0), slope


@triton.jit
def forward_kernel(
    u, delta, A, B, C, D, z, delta_bias, initial, keep, y, borders, final, T, DS, N, blocks,
    SOFTPLUS: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """BD channels of one row of the batch a program, all times in order; y is collected and stored a chunk at a time."""
    b = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BD + tl.arange(0, BD)  # (BD,)
    n = tl.arange(0, NP)
    tile = c[:, None] * N + n[None, :]  # (BD, NP)
    inside = (c < DS)[:, None] & (n < N)[None, :]
    decay = tl.load(A + tile, inside, 0).to(tl.float32)
    h = tl.zeros((BD, NP), tl.float32)
    if initial is not None:
        h += tl.load(initial + b.to(tl.int64) * DS * N + tile, inside, 0).to(tl.float32)
    bias = tl.zeros((BD,), tl.float32)
    if delta_bias is not None:
        bias += tl.load(delta_bias + c, c < DS, 0).to(tl.float32)
    chunks = tl.cdiv(T, K)
    row = tl.arange(0, K)[:, None]
    for chunk in range(chunks):
        tl.store(borders + (b * chunks + chunk).to(tl.int64) * DS * N + tile, h, inside)
        out = tl.zeros((K, BD), tl.float32)
        for k in range(K):
            t = chunk * K + k
            many, few = tl.where(t < T, DS, 0), tl.where(t < T, N, 0)  # past the end all is masked
            at = (b * T + t).to(tl.int64) * DS + c
            d, _ = step_size(delta, at, c < many, bias, SOFTPLUS)
            x = d * tl.load(u + at, c < many, 0).to(tl.float32)
            Bt = tl.load(B + (b * T + t).to(tl.int64) * N + n, n < few, 0).to(tl.float32)
            Ct = tl.load(C + (b * T + t).to(tl.int64) * N + n, n < few, 0).to(tl.float32)
            a = tl.exp(d[:, None] * decay)  # past the end d is 0, and h stays
            if keep is not None:
                a *= tl.where(t < T, tl.load(keep + b * T + tl.minimum(t, T - 1)), 1.0)
            h = a * h + x[:, None] * Bt[None, :]
            out = tl.where(row == k, tl.sum(h * Ct[None, :], 1)[None, :], out)
        t = chunk * K + row
        at = (b * T + t).to(tl.int64) * DS + c[None, :]
        mask = (t < T) & (c < DS)[None, :]
        if D is not None:
            out += tl.load(D + c, c < DS, 0).to(tl.float32)[None, :] * tl.load(u + at, mask, 0).to(tl.float32)
        if z is not None:
            gate = tl.load(z + at, mask, 0).to(tl.float32)
            out *= gate * tl.sigmoid(gate)
        tl.store(y + at, out, mask)
    tl.store(final + b.to(tl.int64) * DS * N + tile, h, inside)


@triton.jit
def backward_kernel(
    u, delta, A, B, C, D, z, delta_bias, keep, borders, dy, dfinal, scratch,
    du, ddelta, dz, narrow, square, once, T, DS, N, blocks, share,
    SOFTPLUS: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """As forward, chunks from the last to the first: h again from the chunk's border into scratch, then times backward.

    narrow (2, B, T, blocks, N) are the shares of dB and dC, `share` numbers each; square (2, B, D, N) those of A and the
    initial state's gradient, once (2, B, D) those of D and delta_bias.
    """
    b = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    c = block * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    tile = c[:, None] * N + n[None, :]
    inside = (c < DS)[:, None] & (n < N)[None, :]
    local = tl.arange(0, BD)[:, None] * NP + n[None, :]
    scratch += tl.program_id(0).to(tl.int64) * K * BD * NP
    decay = tl.load(A + tile, inside, 0).to(tl.float32)
    bias, skip, zeros = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    if delta_bias is not None:
        bias += tl.load(delta_bias + c, c < DS, 0).to(tl.float32)
    if D is not None:
        skip += tl.load(D + c, c < DS, 0).to(tl.float32)
    dh = tl.zeros((BD, NP), tl.float32)
    if dfinal is not None:
        dh += tl.load(dfinal + b.to(tl.int64) * DS * N + tile, inside, 0).to(tl.float32)
    sum_A, sum_D, sum_bias = tl.zeros((BD, NP), tl.float32), zeros, zeros
    chunks = tl.cdiv(T, K)
    for done in range(chunks):
        chunk = chunks - 1 - done
        h = tl.load(borders + (b * chunks + chunk).to(tl.int64) * DS * N + tile, inside, 0)
        for k in range(K):
            t = chunk * K + k
            many, few = tl.where(t < T, DS, 0), tl.where(t < T, N, 0)  # past the end all is masked
            at = (b * T + t).to(tl.int64) * DS + c
            tl.store(scratch + k * BD * NP + local, h)
            d, _ = step_size(delta, at, c < many, bias, SOFTPLUS)
            x = d * tl.load(u + at, c < many, 0).to(tl.float32)
            Bt = tl.load(B + (b * T + t).to(tl.int64) * N + n, n < few, 0).to(tl.float32)
            a = tl.exp(d[:, None] * decay)
            if keep is not None:
                a *= tl.where(t < T, tl.load(keep + b * T + tl.minimum(t, T - 1)), 1.0)
            h = a * h + x[:, None] * Bt[None, :]
        tl.debug_barrier()
        for back in range(K):
            k = K - 1 - back
            t = chunk * K + k
            many, few = tl.where(t < T, DS, 0), tl.where(t < T, N, 0)  # past the end all is masked
            at = (b * T + t).to(tl.int64) * DS + c
            mask = c < many
            d, slope = step_size(delta, at, mask, bias, SOFTPLUS)
            ut = tl.load(u + at, mask, 0).to(tl.float32)
            Bt = tl.load(B + (b * T + t).to(tl.int64) * N + n, n < few, 0).to(tl.float32)
            Ct = tl.load(C + (b * T + t).to(tl.int64) * N + n, n < few, 0).to(tl.float32)
            ah = tl.exp(d[:, None] * decay)
            if keep is not None:
                ah *= tl.where(t < T, tl.load(keep + b * T + tl.minimum(t, T - 1)), 1.0)
            a = ah
            ah *= tl.load(scratch + k * BD * NP + local)
            g = tl.zeros((BD,), tl.float32)
            if dy is not None:
                g += tl.load(dy + at, mask, 0).to(tl.float32)
            h = ah + (d * ut)[:, None] * Bt[None, :]
            if z is not None:
                gate = tl.load(z + at, mask, 0).to(tl.float32)
                s = tl.sigmoid(gate)
                plain = tl.sum(h * Ct[None, :], 1) + skip * ut
                tl.store(dz + at, g * plain * s * (1 + gate * (1 - s)), mask)
                g *= gate * s
            dh += g[:, None] * Ct[None, :]
            place = ((b * T + t).to(tl.int64) * blocks + block) * N + n
            tl.store(narrow + share + place, tl.sum(h * g[:, None], 0), n < few)
            tl.store(narrow + place, tl.sum(dh * (d * ut)[:, None], 0), n < few)
            dx = tl.sum(dh * Bt[None, :], 1)
            ah *= dh
            sum_A += ah * d[:, None]
            dd = (dx * ut + tl.sum(ah * decay, 1)) * slope
            tl.store(ddelta + at, dd, mask)
            tl.store(du + at, dx * d + skip * g, mask)
            sum_D += g * ut
            sum_bias += tl.where(mask, dd, 0)
            dh *= a
        tl.debug_barrier()
    tl.store(square + b.to(tl.int64) * DS * N + tile, sum_A, inside)
    tl.store(square + (tl.num_programs(0) // blocks + b).to(tl.int64) * DS * N + tile, dh, inside)
    tl.store(once + b * DS + c, sum_D, c < DS)
    tl.store(once + (tl.num_programs(0) // blocks + b) * DS + c, sum_bias, c < DS)


def blocks_of(D: int, N: int, T: int) -> dict:
    """About 512 numbers of state a program: 32 channels at N = 16."""
    NP = power_of_2(N)
    return dict(K=32 if T > 64 else 8, BD=min(power_of_2(D), max(1, 512 // NP)), NP=NP, num_warps=2)
