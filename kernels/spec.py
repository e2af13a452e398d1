"""What a kernel file says of itself, from which its tests, its compile test and its benchmark are made."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """A tensor of an example call, of the example's dtype or a given one: normal numbers, or all of one sign (1 or -1); with
    `below`, integers from 0 to below - 1."""

    dims: tuple[int, ...]
    dtype: torch.dtype | None = None
    below: int | None = None
    sign: int = 0

    def tensor(self, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator | None = None) -> Tensor:
        """A tensor of random numbers; on the meta device, of none."""
        dtype = self.dtype or (torch.int64 if self.below else dtype)
        if torch.device(device).type == "meta":
            return torch.empty(self.dims, dtype=dtype, device="meta")
        if self.below:
            return torch.randint(self.below, self.dims, generator=generator, dtype=dtype, device=device)
        values = torch.randn(self.dims, generator=generator, device=device)
        return (self.sign * values.abs() if self.sign else values).to(dtype)


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes that a call cannot do without: each input read once, each output written once."""

    flops: float
    bytes: float


class Draw:
    """Choices of a test's inputs. `choose(low, high)` gives an integer between the two, both included."""

    def __init__(self, choose: Callable[[int, int], int]):
        self.integer = choose
        self.random = np.random.default_rng(choose(0, 2**31 - 1))

    def one_of(self, *options: Any) -> Any:
        return options[self.integer(0, len(options) - 1)]

    def flag(self) -> bool:
        return self.one_of(False, True)

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return np.asarray(scale * self.random.standard_normal(shape))

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        return np.asarray(self.random.uniform(low, high, shape))

    def integers(self, *shape: int, low: int = 0, high: int) -> np.ndarray:
        """int64 from low to high, both included."""
        return self.random.integers(low, high, shape, endpoint=True)


@dataclass(frozen=True)
class Spec:
    """One operation, three times.

    op(**inputs): the public function; inputs are tensors, numbers and None. One tensor or a tuple of them.
    reference(**inputs): the same equation on NumPy float64 arrays.
    reference_backward(grads, **inputs): from one gradient an output, in a tuple (None for one without), a dict
        from the names in `gradients` (those whose input is not None) to arrays. None for ops without a backward pass.
    pytorch(**inputs): the same out of PyTorch's own operations, the measure for errors and speed.
    inputs(draw): a dict of arguments for a test: float64 arrays (cast to the dtype under test), int64 arrays, others.
    gradients: inputs that get one. wide: inputs that stay float32 whatever the dtype under test.
    cost(**inputs): (forward, backward) Costs of a call on these tensors.
    gpu, cpu: example calls at real sizes, with Shapes for tensors: what is compiled, and what is timed.
    """

    op: Callable
    reference: Callable
    reference_backward: Callable | None
    pytorch: Callable
    inputs: Callable[[Draw], dict]
    gradients: tuple[str, ...]
    cost: Callable[..., tuple[Cost, Cost]]
    gpu: tuple[dict, ...]
    cpu: tuple[dict, ...]
    wide: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)

    def call(self, example: dict, dtype: torch.dtype, device: torch.device | str = "meta", seed: int = 0) -> dict:
        """The arguments of an example call; tensors of the inputs in `gradients` require one."""
        generator = None if torch.device(device).type == "meta" else torch.Generator(device).manual_seed(seed)
        call = {}
        for name, value in example.items():
            if isinstance(value, Shape):
                value = value.tensor(torch.float32 if name in self.wide else dtype, device, generator)
                value.requires_grad_(name in self.gradients and value.is_floating_point())
            elif isinstance(value, Tensor):
                value = value.to(device)
            call[name] = value
        return call


def outputs(result: Any) -> tuple:
    """What an op returned, as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def bytes_of(*tensors: Tensor | None) -> int:
    """Bytes of all these tensors together; None has none."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def require(condition: bool, name: str, message: str) -> None:
    """ValueError that begins with the argument's name, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name}: {message}")
