"""The contract of a kernel file, as functions of its SPEC: used by the tests and by the mutation check.

How exact is exact enough: against the reference in float64 the largest error of an output may be twice that of PyTorch's
own operations in the same dtype, plus one rounding of the largest number in it, plus what the reference itself changes by
when its inputs are off by one rounding of float32 (the conditioning of the problem, which no arithmetic can beat).
PyTorch's error is the largest over the inputs and a few sets close to them: of a handful of numbers one may be exact by luck.
"""

import os
import random
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.launch import TRITON, use
from kernels.spec import Draw, Spec, outputs

interpreted = pytest.mark.skipif(not TRITON or os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
LAYOUTS = ("contiguous", "strided", "offset", "transposed")


def seeded(seed: int) -> Draw:
    """A Draw without hypothesis."""
    return Draw(random.Random(seed).randint)


@contextmanager
def poisoned():
    """Within it memory that nobody wrote to holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another place of memory: with gaps, after a gap, or with the axes in reverse order."""
    if x.ndim == 0 or layout == "contiguous":
        return x.clone(memory_format=torch.contiguous_format)
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, -7)], dim=-1)[..., 0]
    if layout == "offset":
        return torch.cat([x.new_full((1, *x.shape[1:]), -7), x])[1:]
    return x.permute(*range(x.ndim)[::-1]).clone(memory_format=torch.contiguous_format).permute(*range(x.ndim)[::-1])


def arguments(spec: Spec, case: dict, dtype: torch.dtype, layout: str = "contiguous", device: str = "cpu") -> dict:
    """The case as tensors: floats in `dtype` (float32 at least for the wide ones), integers as int64."""
    made = {}
    for name, value in case.items():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
            if value.is_floating_point():
                value = value.to(torch.promote_types(dtype, torch.float32) if name in spec.wide else dtype)
            value = laid_out(value.to(device), layout).requires_grad_(name in spec.gradients)
        made[name] = value
    return made


def as_numpy(call: dict) -> dict:
    def convert(value):
        if not isinstance(value, Tensor):
            return value
        value = value.detach().cpu()
        return (value.double() if value.is_floating_point() else value).numpy()

    return {name: convert(value) for name, value in call.items()}


def gradients_for(results: tuple, seed: int = 5) -> tuple:
    """Random gradients, one for each output that takes part in differentiation."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype)
        if r is not None and r.requires_grad
        else None
        for r in results
    )


def evaluate(function: Callable, spec: Spec, call: dict) -> tuple[dict, tuple]:
    """Outputs and gradients of a function on tensors, by name (`gradient of x`); and what was fed back."""
    results = outputs(function(**call))
    found = {f"output {i}": r.detach() for i, r in enumerate(results) if r is not None}
    given = gradients_for(results)
    names = [name for name in spec.gradients if isinstance(call.get(name), Tensor)]
    pairs = [(r, g.to(r.device)) for r, g in zip(results, given, strict=True) if g is not None]
    if names and pairs:
        wanted = [call[name] for name in names]
        grads = torch.autograd.grad([r for r, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        for name, grad in zip(names, grads, strict=True):
            assert grad is not None, f"{name} got no gradient"
            assert grad.dtype == call[name].dtype and grad.shape == call[name].shape, name
            found[f"gradient of {name}"] = grad
    return {name: value.cpu() for name, value in found.items()}, given


def expected(spec: Spec, arrays: dict, given: tuple) -> dict:
    """The same names as `evaluate` gives, from the reference."""
    found = {f"output {i}": np.asarray(r) for i, r in enumerate(outputs(spec.reference(**arrays))) if r is not None}
    if spec.reference_backward is not None:
        fed = tuple(None if g is None else g.double().numpy() for g in given)
        for name, grad in spec.reference_backward(fed, **arrays).items():
            found[f"gradient of {name}"] = grad
    return found


def shaken(arrays: dict, by: float, seed: int) -> dict:
    """Each number of the float arrays up or down by this share of it."""
    noise = np.random.default_rng(seed)

    def shake(value):
        is_float = isinstance(value, np.ndarray) and value.dtype == np.float64
        return np.asarray(value * (1 + by * noise.choice((-1.0, 1.0), value.shape))) if is_float else value

    return {name: shake(value) for name, value in arrays.items()}


def largest(x: np.ndarray) -> float:
    return float(np.abs(x).max()) if x.size else 0.0


def check(spec: Spec, case: dict, dtype: torch.dtype, path: str, layout: str = "contiguous", device: str = "cpu") -> None:
    """The op on this path equals the reference, forward and backward, within the tolerance that the top of this file states."""
    call = arguments(spec, case, dtype, layout, device)
    arrays = as_numpy(call)
    with use(path), poisoned():
        got, given = evaluate(spec.op, spec, call)
    want = expected(spec, arrays, given)
    assert got.keys() == want.keys(), (sorted(got), sorted(want))
    theirs = dict.fromkeys(want, 0.0)
    for near in (case, *(shaken(case, 1e-3, seed) for seed in range(3))):
        call = arguments(spec, near, dtype, device=device)
        found, fed = evaluate(spec.pytorch, spec, call)
        exact = expected(spec, as_numpy(call), fed)
        theirs = {name: max(theirs[name], error_of(found[name], exact[name])) for name in want}
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    moved = [expected(spec, shaken(arrays, eps, seed), given) for seed in range(3)]
    for name in want:
        assert tuple(got[name].shape) == want[name].shape, (name, got[name].shape, want[name].shape)
        error, rounding = error_of(got[name], want[name]), torch.finfo(got[name].dtype).eps
        conditioning = max(largest(m[name] - want[name]) for m in moved)
        allowed = 2 * theirs[name] + rounding * largest(want[name]) + conditioning
        assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g} ({path}, {dtype}, {layout})"


def error_of(found: Tensor, exact: np.ndarray) -> float:
    return largest(found.double().numpy() - exact)


def check_reference(spec: Spec, case: dict) -> None:
    """The reference is PyTorch's equation too, to the last digits of float64: a wrong one would widen every tolerance."""
    call = arguments(spec, case, torch.float64)
    found, given = evaluate(spec.pytorch, spec, call)
    for name, exact in expected(spec, as_numpy(call), given).items():
        error = error_of(found[name], exact)
        assert error <= 1e-9 * (1 + largest(exact)), f"{name}: the reference is off PyTorch's by {error:.3g}"


def check_finite_differences(spec: Spec, case: dict) -> None:
    """reference_backward against central differences of the reference, along a random direction of each input."""
    arrays = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in case.items()}
    noise = np.random.default_rng(7)
    base = outputs(spec.reference(**arrays))
    given = tuple(None if r is None else noise.standard_normal(np.shape(r)) for r in base)
    grads = spec.reference_backward(given, **arrays)
    for name in spec.gradients:
        value = arrays.get(name)
        if value is None:
            continue
        direction = noise.standard_normal(value.shape)
        step = 1e-5 * max(1e-3, largest(value))

        def along(t, name=name, value=value, direction=direction):
            results = outputs(spec.reference(**{**arrays, name: value + t * direction}))
            return sum(float((g * r).sum()) for g, r in zip(given, results, strict=True) if g is not None)

        slope = (8 * (along(step) - along(-step)) - (along(2 * step) - along(-2 * step))) / (12 * step)  # fourth order
        said = float((grads[name] * direction).sum())
        size = float(np.abs(grads[name] * direction).sum()) + abs(slope)
        assert abs(slope - said) <= 1e-6 * size + 1e-9, f"gradient of {name}: {said}, by finite differences {slope}"
