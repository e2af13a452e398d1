"""What the machine at hand is good at: its device, the dtype it multiplies fastest, its peak, its memory's habits."""

import contextlib
import ctypes
import os
import sys
import time

import torch


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA (or ROCm), else Apple's MPS, else the CPU. ValueError for a device that is not there."""
    if name == "auto":
        own = os.environ.get("LOCAL_RANK", "0")  # one GPU a process under torchrun
        name = f"cuda:{own}" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """FLOP/s of large square matrix products, the best of a few: the ceiling against which a run is measured."""
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator().manual_seed(0)  # its own, so that measuring leaves the program's draws alone
    a = torch.randn(size, size, generator=generator).to(device, dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    a @ a  # the first product pays for setting up
    while time.perf_counter() < end or best == float("inf"):
        synchronise(device)
        start = time.perf_counter()
        a @ a
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where matrix products are at least a third faster in it than in float32."""
    if name != "auto":
        return getattr(torch, name)
    faster = matmul_peak(device, torch.bfloat16) > 4 / 3 * matmul_peak(device, torch.float32)
    return torch.bfloat16 if faster else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Matrix products in `dtype`, weights and sums in float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def synchronise(device: torch.device) -> None:
    """Wait for what was launched, so that a clock reads what it took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def generators() -> dict[str, torch.Tensor]:
    """The states of PyTorch's random number generators, `generators/cpu` and, where there is a GPU, `generators/cuda`."""
    states = {"generators/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["generators/cuda"] = torch.cuda.get_rng_state()
    return states


def set_generators(states: dict[str, torch.Tensor]) -> None:
    """Go on drawing where `generators` gave these."""
    torch.set_rng_state(states["generators/cpu"])
    if "generators/cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["generators/cuda"])


def tune_cpu() -> None:
    """Two habits for long numeric programs on a CPU; to be called before the first large operation.

    Numbers too small for the normal format count as zero: what an optimizer remembers of a row that is seldom used decays
    into them, and arithmetic on them is several times slower. And with glibc, freed arrays are kept for the next step:
    otherwise it maps every large array afresh, and the system fills its pages with zeros on first touch.
    """
    torch.set_flush_denormal(True)
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)
