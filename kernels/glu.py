"""Pointwise nonlinearities of feed-forward layers, plain and gated.

    activate:  y = f(x)            glu:  y = f(gate) * up

    silu       x sigmoid(x)                        gated: SwiGLU
    gelu       x Phi(x), Phi the normal distribution function; gated: GeGLU
    gelu_tanh  x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), an approximation of it
    sigmoid    1 / (1 + exp(-x))                   gated: GLU
    relu       max(x, 0)                           gated: ReGLU
    relu2      max(x, 0)^2
    star_relu  scale max(x, 0)^2 + bias            only plain; scale and bias are numbers or learned

Hendrycks and Gimpel 2016 (GELU, SiLU; arXiv:1606.08415); So et al. 2021 (relu2; arXiv:2109.08668); Yu et al. 2022, eq. 5
(star_relu; arXiv:2210.13452); Dauphin et al. 2016 (GLU; arXiv:1612.08083); Shazeer 2020 (the others; arXiv:2002.05202).
The kernels (kernels/glu_kernels.py) keep only the inputs for the backward pass, which computes f again.

With n numbers of b bytes out, and an f of about 10 FLOPs:
    activate   10 n FLOPs, 2 n b bytes moved; backward 20 n, 3 n b
    glu        11 n FLOPs, 3 n b bytes moved; backward 22 n, 5 n b: dy, gate and up are read, two gradients are written
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.glu_kernels import backward_kernel, blocks, by_rows, forward_kernel
from kernels.launch import Function, apply, launch, on_triton
from kernels.spec import Cost, Draw, Shape, Spec, bytes_of, require

# N rows, C columns

GATES = ("silu", "gelu", "gelu_tanh", "sigmoid", "relu")
NAMES = (*GATES, "relu2", "star_relu")
STAR = math.sqrt(0.8), -math.sqrt(0.2)  # scale and bias that give star_relu of normal numbers mean 0 and variance 1


def value_and_slope(x, activation):
    """f(x) and f'(x)."""
    sigmoid = 1 / (1 + np.exp(-x))
    if activation == "silu":
        return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
    if activation == "gelu":
        below = 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2)))
        return x * below, below + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    if activation == "gelu_tanh":
        c = math.sqrt(2 / math.pi)
        t = np.tanh(c * (x + 0.044715 * x**3))
        return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * c * (1 + 3 * 0.044715 * x**2)
    if activation == "sigmoid":
        return sigmoid, sigmoid * (1 - sigmoid)
    if activation == "relu":
        return np.maximum(x, 0), (x > 0).astype(float)
    return np.maximum(x, 0) ** 2, 2 * np.maximum(x, 0)  # relu2


def glu_reference(gate, up=None, *, activation):
    if up is None:
        gate, up = np.split(gate, 2, -1)
    return value_and_slope(gate, activation)[0] * up


def glu_reference_backward(grads, gate, up=None, *, activation):
    packed = up is None
    if packed:
        gate, up = np.split(gate, 2, -1)
    value, slope = value_and_slope(gate, activation)
    dgate, dup = grads[0] * up * slope, grads[0] * value
    return dict(gate=np.concatenate([dgate, dup], -1)) if packed else dict(gate=dgate, up=dup)


def activate_reference(x, scale=None, bias=None, *, activation):
    if activation != "star_relu":
        return value_and_slope(x, activation)[0]
    scale, bias = STAR[0] if scale is None else scale, STAR[1] if bias is None else bias
    return (scale * value_and_slope(x, "relu2")[0] + bias).reshape(x.shape)


def activate_reference_backward(grads, x, scale=None, bias=None, *, activation):
    star = activation == "star_relu"
    value, slope = value_and_slope(x, "relu2" if star else activation)
    if not star:
        return dict(x=grads[0] * slope)
    found = dict(x=(grads[0] * slope * (STAR[0] if scale is None else scale)).reshape(x.shape))
    if scale is not None:
        found["scale"] = (grads[0] * value).sum().reshape(np.shape(scale))
    if bias is not None:
        found["bias"] = grads[0].sum().reshape(np.shape(bias))
    return found


def value(x: Tensor, activation: str) -> Tensor:
    """f(x) by PyTorch, in new memory."""
    if activation == "silu":
        return F.silu(x)
    if activation == "sigmoid":
        return x.sigmoid()
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def pull_back(d: Tensor, x: Tensor, activation: str, out: Tensor) -> None:
    """out = d f'(x) by PyTorch's own kernels, in one pass; out may be d."""
    aten = torch.ops.aten
    if activation == "silu":
        aten.silu_backward.grad_input(d, x, grad_input=out)
    elif activation == "sigmoid":
        aten.sigmoid_backward.grad_input(d, x.sigmoid(), grad_input=out)
    elif activation == "relu":
        aten.threshold_backward.grad_input(d, x, 0, grad_input=out)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        aten.gelu_backward.grad_input(d, x, approximate=approximate, grad_input=out)


class GLU(Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor | None, activation: str):
        ctx.packed, ctx.activation = up is None, activation
        if ctx.packed:
            gate, up = gate.chunk(2, -1)
        kept = None
        if on_triton(gate):
            y = gate.new_empty(gate.shape)
            (gates, ups), (gate_row, up_row), N, C = by_rows(gate, up)
            grid, tiles = blocks(N, C)
            launch(forward_kernel, grid, gates, ups, None, None, y, N, C, gate_row, up_row, NAME=activation, **tiles)
        else:  # a CPU keeps f(gate) sooner than it computes it twice
            kept = value(gate, activation)
            y = kept * up
        ctx.save_for_backward(gate, up, kept)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        gate, up, kept = ctx.saved_tensors
        if on_triton(gate):
            both = gate.new_empty((*gate.shape[:-1], (1 + ctx.packed) * gate.shape[-1]))
            dgate, dup = both.chunk(2, -1) if ctx.packed else (both, torch.empty_like(both))
            (gates, ups), (gate_row, up_row), N, C = by_rows(gate, up)
            grid, tiles = blocks(N, C)
            rows = gate_row, up_row, both.shape[-1]
            dy = dy.contiguous()
            launch(backward_kernel, grid, dy, gates, ups, None, dgate, dup, None, N, C, *rows, NAME=ctx.activation, **tiles)
            return both, None if ctx.packed else dup, None
        dup, dgate = dy * kept, dy * up
        pull_back(dgate, gate, ctx.activation, dgate)
        return (torch.cat((dgate, dup), -1), None, None) if ctx.packed else (dgate, dup, None)


class Activation(Function):
    """f(x); with scale and bias, of one number each, scale f(x) + bias, where f is relu2."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor | None, bias: Tensor | None, activation: str):
        ctx.activation, ctx.positive = activation, False
        if on_triton(x):
            kept = x.contiguous()
            y, n = torch.empty_like(kept), x.numel()
            grid, tiles = blocks(1, n)
            launch(forward_kernel, grid, kept, None, scale, bias, y, 1, n, 0, 0, NAME=activation, **tiles)
        elif activation == "relu2":
            kept = F.relu(x)
            ctx.positive = scale is not None or x.element_size() < 4  # then a CPU keeps this sooner than it computes it twice
            if scale is not None:
                y = torch.addcmul(bias.to(x.dtype), kept * scale, kept).to(x.dtype)  # of no axes it would take that of scale
            else:
                y = kept * kept if ctx.positive else kept.mul_(kept)
            kept = kept if ctx.positive else x
        else:
            kept, y = x, value(x, activation)
        ctx.save_for_backward(kept, scale, bias)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, scale, bias = ctx.saved_tensors
        dscale = dbias = None
        if on_triton(x):
            dx, n = torch.empty_like(x), x.numel()
            grid, tiles = blocks(1, n)
            sums = None if scale is None else x.new_empty(*grid, 2, dtype=torch.float32)
            dy, name = dy.contiguous(), ctx.activation
            launch(backward_kernel, grid, dy, x, None, scale, dx, None, sums, 1, n, 0, 0, 0, NAME=name, **tiles)
            if scale is not None:
                dscale, dbias = sums.sum(0)
        elif ctx.activation == "relu2":
            positive = x if ctx.positive else F.relu(x)
            if scale is not None:
                wide = torch.promote_types(x.dtype, torch.float32)
                dscale, dbias = positive.to(wide).square().mul_(dy).sum(), dy.sum(dtype=wide)
                dy = dy * scale
            dx = torch.addcmul(x.new_zeros(()), positive, dy, value=2)
        else:
            dx = torch.empty_like(x)
            pull_back(dy, x, ctx.activation, dx)
        if scale is not None:
            dscale, dbias = dscale.to(scale.dtype), dbias.to(bias.dtype)
        return dx, dscale, dbias, None


def glu(gate: Tensor, up: Tensor | None = None, *, activation: str) -> Tensor:
    """f(gate) * up, where f is silu (SwiGLU), gelu or gelu_tanh (GeGLU), relu (ReGLU) or sigmoid (GLU).

    gate and up (…, F), of one dtype; their rows may lie apart, as the halves of one tensor do. Without up, gate is the
    two packed, (…, 2F). Returns (…, F) in their dtype. ValueError for an argument that does not fit.
    """
    require(gate.ndim > 0 and gate.is_floating_point(), "gate", f"floating point of at least one axis, not {gate.dtype}")
    if up is None:
        require(gate.shape[-1] % 2 == 0, "gate", f"two halves without up, but its rows have {gate.shape[-1]} numbers")
    else:
        require(up.shape == gate.shape, "up", f"the shape of gate, {tuple(gate.shape)}, not {tuple(up.shape)}")
        require(up.dtype == gate.dtype, "up", f"the dtype of gate, {gate.dtype}, not {up.dtype}")
    require(activation in GATES, "activation", f"one of {', '.join(GATES)}, not {activation!r}")
    return apply(GLU, gate, up, activation)


def activate(x: Tensor, scale: Tensor | float | None = None, bias: Tensor | float | None = None, *, activation: str) -> Tensor:
    """f(x), where f is silu, gelu, gelu_tanh, sigmoid, relu, relu2 or star_relu.

    x of any shape. scale and bias are for star_relu alone: numbers, or tensors of one number that get a gradient; by
    default those that give mean 0 and variance 1 to star_relu of normal numbers. Returns the shape and dtype of x.
    ValueError for an argument that does not fit.
    """
    require(x.is_floating_point(), "x", f"floating point, not {x.dtype}")
    require(activation in NAMES, "activation", f"one of {', '.join(NAMES)}, not {activation!r}")
    star = activation == "star_relu"
    for name, given in (("scale", scale), ("bias", bias)):
        require(star or given is None, name, f"for star_relu alone, not for {activation}")
        require(not isinstance(given, Tensor) or given.numel() == 1, name, "one number")
    if star:
        scale, bias = (as_scalar(d if given is None else given, x) for given, d in zip((scale, bias), STAR, strict=True))
    return apply(Activation, x, scale, bias, "relu2" if star else activation)


def as_scalar(number: Tensor | float, x: Tensor) -> Tensor:
    """A tensor of no axes beside x."""
    if isinstance(number, Tensor):
        return number.reshape(())
    return torch.full((), number, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def glu_pytorch(gate, up=None, *, activation):
    if up is None:
        gate, up = gate.chunk(2, -1)
    return activate_pytorch(gate, activation=activation) * up


def activate_pytorch(x, scale=None, bias=None, *, activation):
    if activation == "star_relu":
        y = F.relu(x) ** 2 * (STAR[0] if scale is None else scale) + (STAR[1] if bias is None else bias)
        return y.reshape(x.shape)
    if activation == "relu2":
        return F.relu(x) ** 2
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return getattr(F, activation)(x)


def with_a_gap(x: np.ndarray) -> np.ndarray:
    """Moved away from zero, where relu has no slope that finite differences could find."""
    return np.asarray(x + 1e-3 * np.sign(x))


def glu_inputs(draw: Draw) -> dict:
    shape = draw.one_of((), (0,), (1,), (2, 3), (7,)) + (draw.one_of(1, 6, 33, 1030, 2050),)
    packed, scale = draw.flag(), draw.one_of(1.0, 1e-2, 8.0)
    return dict(
        gate=with_a_gap(draw.normal(*shape[:-1], shape[-1] * (1 + packed), scale=scale)),
        up=None if packed else draw.normal(*shape, scale=scale),
        activation=draw.one_of(*GATES),
    )


def activate_inputs(draw: Draw) -> dict:
    activation = draw.one_of(*NAMES, "star_relu", "star_relu")
    shape = draw.one_of((), (0,), (1,), (2, 3, 5), (40, 60), (5, 1025))
    learned = activation == "star_relu" and draw.flag()
    return dict(
        x=with_a_gap(draw.normal(*shape, scale=draw.one_of(1.0, 1e-2, 8.0))),
        scale=draw.normal(1) if learned else None,
        bias=draw.normal(1) if learned and draw.flag() else None,
        activation=activation,
    )


def glu_cost(gate, up=None, **_) -> tuple[Cost, Cost]:
    read, n = bytes_of(gate, up), gate.numel() // (1 if up is not None else 2)
    return Cost(11 * n, 1.5 * read), Cost(22 * n, 2.5 * read)


def activate_cost(x, *_, **__) -> tuple[Cost, Cost]:
    return Cost(10 * x.numel(), 2 * bytes_of(x)), Cost(20 * x.numel(), 3 * bytes_of(x))


SPEC = Spec(
    op=glu,
    reference=glu_reference,
    reference_backward=glu_reference_backward,
    pytorch=glu_pytorch,
    inputs=glu_inputs,
    gradients=("gate", "up"),
    cost=glu_cost,
    gpu=(
        dict(gate=Shape((16384, 11008)), up=Shape((16384, 11008)), activation="silu"),
        dict(gate=Shape((16384, 5632)), activation="gelu"),
        dict(gate=Shape((16384, 5632)), activation="gelu_tanh"),
    ),
    cpu=(
        dict(gate=Shape((4096, 704)), up=Shape((4096, 704)), activation="silu"),
        dict(gate=Shape((4096, 1408)), activation="gelu"),
    ),
)

ACTIVATE_SPEC = Spec(
    op=activate,
    reference=activate_reference,
    reference_backward=activate_reference_backward,
    pytorch=activate_pytorch,
    inputs=activate_inputs,
    gradients=("x", "scale", "bias"),
    cost=activate_cost,
    gpu=(
        dict(x=Shape((16384, 16384)), activation="relu2"),
        dict(x=Shape((16384, 16384)), activation="gelu"),
        dict(x=Shape((16384, 16384)), scale=Shape((1,)), bias=Shape((1,)), activation="star_relu"),
    ),
    cpu=(dict(x=Shape((4096, 1024)), activation="relu2"), dict(x=Shape((4096, 1024)), activation="gelu")),
    wide=("scale", "bias"),
)
