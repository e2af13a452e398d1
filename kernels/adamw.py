"""One step of AdamW over many tensors at once.

    m = b1 m + (1 - b1) g            running mean of the gradient
    v = b2 v + (1 - b2) g^2          running mean of its square
    p = p - lr w p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Kingma and Ba 2015 (arXiv:1412.6980), algorithm 1; Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2. The bias
correction of v is moved out of the root: sqrt(v / c) + eps = (sqrt(v) + eps sqrt(c)) / sqrt(c), with c = 1 - b2^t.

For N numbers of b bytes with float32 means: 13 N FLOPs and (3 b + 16) N bytes moved: p, g, m, v read; p, m, v written.
A loop over the tensors would start a kernel for each; here one kernel finds its tensor in a table of addresses.
"""

import math

import numpy as np
import torch
from torch import Tensor

from kernels.launch import launch, on_triton, tl, triton
from kernels.spec import Cost, Draw, Shape, Spec, bytes_of, require

BLOCK = 2048  # numbers of one program


def reference(param, grad, mean, square, *, step, lr, beta1, beta2, eps, weight_decay):
    mean = beta1 * mean + (1 - beta1) * grad
    square = beta2 * square + (1 - beta2) * grad**2
    move = (mean / (1 - beta1**step)) / (np.sqrt(square / (1 - beta2**step)) + eps)
    return param - lr * weight_decay * param - lr * move, mean, square


@triton.jit
def adamw_kernel(
    table, rates, blocks, keep, beta1, rate1, beta2, rate2, PARAM: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr
):
    """A block of one tensor a program. table: four addresses and a size a tensor; rates: its step size and epsilon."""
    tensor = tl.load(blocks + 2 * tl.program_id(0))
    param = tl.load(table + 5 * tensor).to(tl.pointer_type(PARAM))
    grad = tl.load(table + 5 * tensor + 1).to(tl.pointer_type(GRAD))
    mean = tl.load(table + 5 * tensor + 2).to(tl.pointer_type(tl.float32))
    square = tl.load(table + 5 * tensor + 3).to(tl.pointer_type(tl.float32))
    size = tl.load(table + 5 * tensor + 4)
    at = tl.load(blocks + 2 * tl.program_id(0) + 1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(grad + at, inside, 0).to(tl.float32)
    m = beta1 * tl.load(mean + at, inside, 0) + rate1 * g
    v = beta2 * tl.load(square + at, inside, 0) + rate2 * g * g
    p = tl.load(param + at, inside, 0).to(tl.float32) * keep
    p -= tl.load(rates + 2 * tensor) * m / (tl.sqrt_rn(v) + tl.load(rates + 2 * tensor + 1))
    tl.store(mean + at, m, inside)
    tl.store(square + at, v, inside)
    tl.store(param + at, p.to(PARAM), inside)


TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16} if hasattr(tl, "float32") else {}


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[int],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step in place: params, means and squares are written, grads are not.

    Tensors of any shapes: a gradient, a mean and a square of the shape of each parameter; all params of one dtype and
    device; means and squares in float32 (float64 for float64 params), dense. steps: the number t >= 1 of this step, for
    each. ValueError where the lists do not fit each other.
    """
    for name, tensors in (("grads", grads), ("means", means), ("squares", squares), ("steps", steps)):
        require(len(tensors) == len(params), name, f"{len(params)}, as many as params, not {len(tensors)}")
    for name, tensors in (("grads", grads), ("means", means), ("squares", squares)):
        for param, tensor in zip(params, tensors, strict=True):
            require(
                tensor.shape == param.shape,
                name,
                f"the shape of its parameter, {tuple(param.shape)}, not {tuple(tensor.shape)}",
            )
    require(len({param.dtype for param in params}) <= 1, "params", "of one dtype")
    require(all(step >= 1 for step in steps), "steps", f"from 1 on, not {min(steps, default=1)}")
    if not params:
        return
    wide = torch.promote_types(params[0].dtype, torch.float32)
    for name, tensors in (("means", means), ("squares", squares)):
        require(all(t.dtype == wide for t in tensors), name, f"of {wide}")
    traced = params[0].device.type != "meta"  # there a custom operation does nothing, and its launches could not be noted
    (update if traced else in_place)(params, grads, means, squares, steps, lr, beta1, beta2, eps, weight_decay)


def in_place(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Both paths go through memory from the first number to the last: what lies otherwise goes through a copy."""
    wide = means[0].dtype
    p, m, v = ([t.contiguous() for t in tensors] for tensors in (params, means, squares))
    if on_triton(params[0]):
        start_kernel(p, [grad.contiguous() for grad in grads], m, v, steps, lr, beta1, beta2, eps, weight_decay)
    else:
        p, g = [t.to(wide) for t in p], [grad.to(wide).contiguous() for grad in grads]
        numbers = dict(lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False)
        counts = [torch.tensor(float(t), device=param.device) for param, t in zip(params, steps, strict=True)]
        torch._fused_adamw_(p, g, m, v, [], counts, **numbers)
    for originals, results in ((params, p), (means, m), (squares, v)):
        for original, result in zip(originals, results, strict=True):
            if result is not original:
                original.copy_(result)


# one operation for torch.compile, which cannot look at addresses
update = torch.library.custom_op("rosetta::adamw", in_place, mutates_args=("params", "means", "squares"))


def start_kernel(params, grads, means, squares, steps, lr, beta1, beta2, eps, weight_decay) -> None:
    """Fill the tables and start one kernel for each dtype of the gradients."""
    device = params[0].device
    for dtype in dict.fromkeys(grad.dtype for grad in grads):
        table, rates, blocks = [], [], []
        for param, grad, mean, square, t in zip(params, grads, means, squares, steps, strict=True):
            if grad.dtype == dtype:
                correction = math.sqrt(1 - beta2**t)
                blocks += [(len(table), block) for block in range(-(-param.numel() // BLOCK))]
                table.append([*(x.data_ptr() for x in (param, grad, mean, square)), param.numel()])
                rates.append([lr * correction / (1 - beta1**t), eps * correction])
        kinds = ((table, torch.int64), (rates, torch.float32), (blocks or [(0, 0)], torch.int64))
        tables = [torch.tensor(rows, dtype=kind, device=device) for rows, kind in kinds]
        numbers = (1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2)
        types = dict(PARAM=TYPES[params[0].dtype], GRAD=TYPES[dtype])
        launch(adamw_kernel, (len(blocks),), *tables, *numbers, **types, BLOCK=BLOCK, num_warps=8)


def stepped(param, grad, mean, square, *, step, **numbers) -> tuple[Tensor, Tensor, Tensor]:
    """The same for one tensor, which is left as it was: (param, mean, square) after the step."""
    param, mean, square = param.clone(), mean.clone(), square.clone()
    adamw([param], [grad], [mean], [square], [step], **numbers)
    return param, mean, square


def pytorch(param, grad, mean, square, *, step, lr, beta1, beta2, eps, weight_decay):
    wide = mean.dtype
    grad = grad.to(wide)
    mean = mean.lerp(grad, 1 - beta1)
    square = (square * beta2).addcmul(grad, grad, value=1 - beta2)
    denominator = (square.sqrt() / math.sqrt(1 - beta2**step)).add(eps)
    moved = (param.to(wide) * (1 - lr * weight_decay)).addcdiv(mean, denominator, value=-lr / (1 - beta1**step))
    return moved.to(param.dtype), mean, square


def inputs(draw: Draw) -> dict:
    shape = draw.one_of((), (0,), (7,), (3, 5), (BLOCK + 70,))
    first = draw.flag()  # before the first step both means are zero
    return dict(
        param=draw.normal(*shape),
        grad=draw.normal(*shape, scale=draw.one_of(1.0, 1e-4, 0.0)),
        mean=draw.normal(*shape, scale=0.0 if first else 1.0),
        square=draw.uniform(*shape, high=0.0 if first else 1.0),
        step=1 if first else draw.integer(2, 1000),
        lr=draw.one_of(1e-3, 0.1, 0.0),
        beta1=draw.one_of(0.0, 0.9),
        beta2=draw.one_of(0.95, 0.999),
        eps=draw.one_of(1e-8, 1e-3),
        weight_decay=draw.one_of(0.0, 0.1),
    )


def cost(param, grad, mean, square, **_) -> tuple[Cost, Cost]:
    return Cost(13 * param.numel(), bytes_of(param, param, grad, mean, mean, square, square)), Cost(0, 0)


NUMBERS = dict(step=10, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)

SPEC = Spec(
    op=stepped,
    reference=reference,
    reference_backward=None,
    pytorch=pytorch,
    inputs=inputs,
    gradients=(),
    wide=("mean", "square"),
    cost=cost,
    gpu=(dict(**{name: Shape((4096, 16384)) for name in ("param", "grad", "mean", "square")}, **NUMBERS),),
    cpu=(dict(**{name: Shape((4096, 1024)) for name in ("param", "grad", "mean", "square")}, **NUMBERS),),
)
