"""What every kernel file stands on: Triton where it is installed, which path an op takes, and how a kernel is started."""

import os
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # then every op takes its PyTorch path, and the kernels below it are only read
    triton = SimpleNamespace(jit=lambda function=None, **_: function or (lambda plain: plain))
    tl = SimpleNamespace(constexpr=lambda value: value)
    TRITON = False
else:
    TRITON = True

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # read when a kernel is decorated, as Triton does
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # what the kernels read and write; inside it is float32

_path = "auto"
_recorder: list | None = None
_target = "sm_90"  # what launches are recorded for


def on_triton(x: Tensor) -> bool:
    """Whether an op on x starts Triton kernels: on a GPU, for the dtypes they know. Float64 is PyTorch's everywhere."""
    if _path == "auto":
        return TRITON and x.is_cuda and x.dtype in DTYPES
    return _path == "triton"


def viewed(forward: Callable) -> Callable:
    """A forward pass that gives views of what it made."""

    def views(ctx, *args):
        outputs = forward(ctx, *args)
        if isinstance(outputs, Tensor):
            return outputs.view_as(outputs)
        return tuple(output if output is None else output.view_as(output) for output in outputs)

    return views


class Function(torch.autograd.Function):
    """A `torch.autograd.Function` that is differentiated once, and that PyTorch 2.11 compiles rightly too.

    A gradient of a gradient is refused: backward passes compute with numbers that autograd does not see. PyTorch 2.11 gives
    no gradient through a forward pass whose output an in-place operation, or a conversion that changed nothing, has touched
    (its issue 180642, mended in 2.12); a view of the output is not affected.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.backward = staticmethod(once_differentiable(cls.backward))
        if torch.__version__.startswith("2.11."):
            cls.forward = staticmethod(viewed(cls.forward))


class Forgetful:
    """The context of a forward pass that no backward pass follows."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def apply(function: type[Function], *args: Any) -> Any:
    """`function.apply`, or its forward pass alone where no gradient is asked for: a step of decoding is many small ops."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return function.apply(*args)
    return function.forward(Forgetful(), *args)


@contextmanager
def use(path: str):
    """Within it every op takes this path: `torch`, `triton` (which on a CPU needs TRITON_INTERPRET=1), or `auto`."""
    global _path
    if path not in ("auto", "torch", "triton"):
        raise ValueError(f"path: {path!r} is none of auto, torch, triton")
    before, _path = _path, path
    try:
        yield
    finally:
        _path = before


@contextmanager
def recording(target: str = "sm_90"):
    """Within it no kernel runs: the list it gives fills with (kernel, arguments, options) of every launch on a `target`."""
    global _recorder, _target
    _recorder, _target = [], target
    try:
        with use("triton"):
            yield _recorder
    finally:
        _recorder = None


def launch(kernel, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start `grid` programs of a kernel; an empty grid starts none. Options: its constants, num_warps, num_stages."""
    if _recorder is not None:
        _recorder.append((kernel, args, options))
    elif 0 not in grid:
        device = next(x.device for x in args if isinstance(x, Tensor))
        elsewhere = device.type == "cuda" and not torch.compiler.is_compiling()  # compiled code sees to it itself
        with torch.cuda.device(device) if elsewhere and device.index != torch.cuda.current_device() else nullcontext():
            kernel[grid](*args, **options)


def architecture(device: torch.device) -> str:
    """sm_80, sm_90, gfx942 …: that of the device or, where there is none, the one that launches are recorded for."""
    if device.type != "cuda":
        return _target
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def programs(device: torch.device, per_processor: int = 4) -> int:
    """How many programs fill the device, for kernels that each loop over a share of the rows."""
    if device.type != "cuda":
        return 3  # the interpreter's: few, so that each has several rows to go through
    return per_processor * torch.cuda.get_device_properties(device).multi_processor_count


def power_of_2(n: int) -> int:
    """The least power of two that is at least n (and at least 1)."""
    return 1 << max(0, n - 1).bit_length()


def row_tiles(C: int, widest: int) -> dict:
    """How a program holds rows of C numbers: 4096 numbers or a row of up to `widest`; wider rows go by tiles of 2048."""
    numbers, tile = 4096, 2048
    if INTERPRETED:  # small enough that a few short rows need every case
        numbers, widest, tile = 128, 64, 32
    block = power_of_2(C) if C <= widest else tile
    rows = max(1, numbers // block)
    return dict(ROWS=rows, BLOCK=block, TILES=-(-C // block), num_warps=4 if block <= 1024 else 8 if block <= 8192 else 16)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32. The interpreter multiplies bfloat16 wrongly, bit patterns as they are: it gets float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x in another dtype, rounded to the nearest. The interpreter cuts bfloat16 off: there the bits are rounded."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.float32).to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def tanh(x):
    """tanh(x) without overflow; near 0 its series, where 1 - 2 / (e^2x + 1) would cancel."""
    x2 = x * x
    series = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835 - x2 * (1382 / 155925))))))
    return tl.where(tl.abs(x) < 0.35, series, 1 - 2 / (tl.exp(2 * x) + 1))
