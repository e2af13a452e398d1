"""What the SPEC does not say: many tensors in one call, of any layout, and what is refused."""

import pytest
import torch

from kernels.adamw import BLOCK, adamw, stepped
from kernels.launch import use
from tests.kernels.contract import interpreted

NUMBERS = dict(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
SHAPES = ((), (0, 4), (3, 5), (2 * BLOCK + 1,), (7,))
paths = pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=interpreted)])


def tensors(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=g).to(dtype) for shape in SHAPES]


@paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tensors_are_one_call(path, dtype):
    """Each gets the step of its own count, as if it were alone; gradients may differ in dtype and are not written."""
    params, grads, means, squares = tensors(0, dtype), tensors(1), tensors(2), tensors(3)
    grads = [grad.to(torch.bfloat16) if i % 2 else grad for i, grad in enumerate(grads)]
    steps, before = [1, 2, 3, 50, 5], [grad.clone() for grad in grads]
    with use(path):
        alone = [stepped(*four, step=t, **NUMBERS) for *four, t in zip(params, grads, means, squares, steps, strict=True)]
        adamw(params, grads, means, squares, steps, **NUMBERS)
    for got, want in zip(zip(params, means, squares, strict=True), alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))


@paths
def test_the_tensor_itself_is_written_whatever_its_layout(path):
    base, grad = torch.rand(6, 4), torch.rand(3, 4).T
    param = base[::2].T  # neither axis is contiguous in base
    mean, square = torch.zeros(4, 3), torch.zeros(4, 3)
    want = stepped(param.contiguous(), grad.contiguous(), mean, square, step=1, **NUMBERS)
    untouched = base[1::2].clone()
    with use(path):
        adamw([param], [grad], [mean], [square], [1], **NUMBERS)
    for got, wanted in zip((param, mean, square), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)
    assert torch.equal(base[1::2], untouched)


def test_nothing_is_a_step_too():
    adamw([], [], [], [], [], **NUMBERS)


GOOD = dict(params=[torch.zeros(3)], grads=[torch.zeros(3)], means=[torch.zeros(3)], squares=[torch.zeros(3)], steps=[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("params", [torch.zeros(3), torch.zeros(3, dtype=torch.float64)]),
        ("grads", []),
        ("grads", [torch.zeros(4)]),
        ("means", [torch.zeros(3), torch.zeros(3)]),
        ("means", [torch.zeros(1, 3)]),
        ("means", [torch.zeros(3, dtype=torch.bfloat16)]),
        ("squares", [torch.zeros(3, dtype=torch.float64)]),
        ("squares", [torch.zeros(2)]),
        ("steps", [1, 2]),
        ("steps", [0]),
    ],
)
def test_what_does_not_fit_is_named(name, value):
    call = {**GOOD, name: value}
    if name == "params":  # two of them: of different dtypes, all else fitting
        call = {**{key: 2 * tensors for key, tensors in GOOD.items()}, name: value}
    with pytest.raises(ValueError, match=f"^{name}: "):
        adamw(**call, **NUMBERS)
