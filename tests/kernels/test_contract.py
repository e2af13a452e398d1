"""Every kernel file is what its SPEC says: see contract.py for how each claim is judged."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kernels import SPECS
from kernels.launch import use
from kernels.spec import Draw, outputs
from tests.kernels.contract import (
    LAYOUTS,
    arguments,
    check,
    check_finite_differences,
    check_reference,
    evaluate,
    interpreted,
    seeded,
)

each = pytest.mark.parametrize("name", SPECS)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def quick(examples: int):
    options = dict(deadline=None, derandomize=True, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))
    return settings(max_examples=examples, **options)


def draw_from(data) -> Draw:
    return Draw(lambda low, high: data.draw(st.integers(low, high)))


@each
@pytest.mark.parametrize("dtype", DTYPES)
@interpreted
def test_triton(name, dtype):
    """Every layout with a seeded draw, then what hypothesis finds."""

    @quick(4)
    @given(st.data(), st.sampled_from(LAYOUTS))
    def run(data, layout):
        check(SPECS[name], SPECS[name].inputs(draw_from(data)), DTYPES[dtype], "triton", layout)

    if DTYPES[dtype] in SPECS[name].dtypes:
        for seed, layout in enumerate(LAYOUTS * 2):
            check(SPECS[name], SPECS[name].inputs(seeded(seed)), DTYPES[dtype], "triton", layout)
        run()


@each
@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_pytorch_path(name, dtype):
    @quick(15)
    @given(st.data(), st.sampled_from(LAYOUTS))
    def run(data, layout):
        check(SPECS[name], SPECS[name].inputs(draw_from(data)), getattr(torch, dtype), "torch", layout)

    run()


@each
@pytest.mark.parametrize("dtype", DTYPES)
@interpreted
def test_both_paths_give_the_same_dtypes(name, dtype):
    """An output is of the dtype of the inputs or, where it is a sum, of float32, on either path."""
    spec, dtype = SPECS[name], DTYPES[dtype]
    for seed in range(4 if dtype in spec.dtypes else 0):
        call = arguments(spec, spec.inputs(seeded(200 + seed)), dtype)
        dtypes = {}
        for path in ("torch", "triton"):
            with use(path), torch.no_grad():
                dtypes[path] = [result.dtype for result in outputs(spec.op(**call)) if result is not None]
        assert dtypes["torch"] == dtypes["triton"] and set(dtypes["torch"]) <= {dtype, torch.float32}, dtypes


@each
def test_gradients_are_differentiated_once(name):
    """A gradient of a gradient would be wrong, so it is refused."""
    spec = SPECS[name]
    call = arguments(spec, spec.inputs(seeded(0)), torch.float64)
    inputs = [call[n] for n in spec.gradients if isinstance(call.get(n), torch.Tensor) and call[n].numel()]
    results = [r for r in outputs(spec.op(**call)) if r is not None and r.requires_grad]
    if not inputs or not results:
        return
    first = torch.autograd.grad(sum(r.square().sum() for r in results), inputs, create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.square().sum() for g in first if g is not None).backward()


@each
def test_the_reference_is_pytorchs_equation(name):
    for seed in range(20):
        check_reference(SPECS[name], SPECS[name].inputs(seeded(seed)))


@each
def test_finite_differences(name):
    if SPECS[name].reference_backward is None:
        assert not SPECS[name].gradients
    for seed in range(8):
        if SPECS[name].gradients:
            check_finite_differences(SPECS[name], SPECS[name].inputs(seeded(seed)))


@each
def test_gradcheck(name):
    """PyTorch's own finite differences of the PyTorch path, in float64."""
    spec = SPECS[name]
    for seed in range(4 if spec.gradients else 0):
        call = arguments(spec, spec.inputs(seeded(100 + seed)), torch.float64)
        names = [n for n in spec.gradients if call.get(n) is not None]

        def function(*values, call=call, names=names):
            results = spec.op(**{**call, **dict(zip(names, values, strict=True))})
            results = results if isinstance(results, tuple) else (results,)
            return tuple(r for r in results if r is not None and r.requires_grad)

        if sum(call[n].numel() for n in names):
            assert torch.autograd.gradcheck(function, tuple(call[n] for n in names), fast_mode=True)


@each
def test_compile_traces_it_whole(name):
    """torch.compile(fullgraph=True), forward and backward, gives what eager gives."""
    spec = SPECS[name]
    cases = [spec.inputs(seeded(seed)) for seed in range(30)]
    cases.sort(key=lambda case: sum(getattr(value, "size", 0) for value in case.values()))
    for case in cases[-3:]:
        torch._dynamo.reset()
        compiled = torch.compile(spec.op, fullgraph=True, backend="aot_eager")
        with use("torch"):
            eager, _ = evaluate(spec.op, spec, arguments(spec, case, torch.float32))
            traced, _ = evaluate(compiled, spec, arguments(spec, case, torch.float32))
        for key in eager:
            torch.testing.assert_close(traced[key], eager[key], rtol=1e-5, atol=1e-6)


@each
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_gpu(name, dtype):
    """The same property with the compiled kernels."""
    for seed in range(30):
        check(SPECS[name], SPECS[name].inputs(seeded(seed)), DTYPES[dtype], "triton", LAYOUTS[seed % 4], "cuda")
