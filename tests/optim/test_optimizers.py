"""The contract of every optimizer, by discovery; then what AdamW, LAMB and Muon are held to by name."""

import copy
import inspect
import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.newton_schulz import newton_schulz
from optim import OPTIMIZERS, AdamW, Lamb, Muon, flatten_state, unflatten_state

every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
SHAPES = [(3, 5), (8, 8), (7, 2), (1, 6), (3, 5), (5, 3), (0, 4), (2, 5, 3), (), (11,)]


def shapes(optimizer):
    return [shape for shape in SHAPES if optimizer.ndims is None or len(shape) in optimizer.ndims]


def make_params(optimizer, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shape_list = shapes(optimizer)
    return [torch.nn.Parameter(torch.randn(s, generator=rng, dtype=torch.float64).to(dtype)) for s in shape_list]


def random_grads(params, seed):
    rng = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=rng, dtype=torch.float64).to(param.dtype)


def run(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        random_grads(params, seed=1000 + step)
        optimizer.step()


class Reference:
    """Steps a list of arrays by the `reference_step` of an optimizer's module, with the live values of a group."""

    def __init__(self, optimizer, params):
        self.step_fn = sys.modules[optimizer.__module__].reference_step
        self.keys = [k for k, p in inspect.signature(self.step_fn).parameters.items() if p.kind is p.KEYWORD_ONLY]
        self.arrays = [p.detach().double().numpy().copy() for p in params]
        self.states = [{} for _ in params]

    def step(self, params, group):
        for i, param in enumerate(params):
            if param.grad is not None:
                hyper, grad = {k: group[k] for k in self.keys}, param.grad.double().numpy()
                self.arrays[i], self.states[i] = self.step_fn(self.arrays[i], grad, self.states[i], **hyper)


def assert_equal(params, others):
    for param, other in zip(params, others, strict=True):
        assert torch.equal(param, other)


@every_optimizer
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_steps_equal_the_reference(optimizer, dtype, tolerance):
    params = make_params(optimizer, dtype)
    built, reference = optimizer(params, lr=0.05, weight_decay=0.1, **optimizer.exact), Reference(optimizer, params)
    for step in range(25):
        random_grads(params, seed=step)
        for param in params[::2]:
            param.grad = param.grad if step % 3 else None  # steps are counted by parameter
        for group in built.param_groups:
            group["lr"] = group["base_lr"] * (1 + step) / 25
        built.step()
        reference.step(params, built.param_groups[0])
    for param, array in zip(params, reference.arrays, strict=True):
        np.testing.assert_allclose(param.detach().double().numpy(), array, rtol=tolerance, atol=tolerance)


@every_optimizer
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_shape_equals_the_reference(optimizer, data):
    ndim = data.draw(st.sampled_from(optimizer.ndims or (0, 1, 2, 3, 4)))
    shape = data.draw(st.lists(st.integers(0, 6), min_size=ndim, max_size=ndim))
    seed, scale = data.draw(st.integers(0, 2**32)), data.draw(st.sampled_from([0.0, 1e-6, 1.0, 1e6]))
    rng = torch.Generator().manual_seed(seed)
    param = torch.nn.Parameter(torch.randn(shape, generator=rng, dtype=torch.float64))
    param.data = param.data.transpose(0, -1) if ndim > 1 else param.data  # strided
    built, reference = optimizer([param], **optimizer.exact), Reference(optimizer, [param])
    for _ in range(3):
        param.grad = scale * torch.randn(param.shape, generator=rng, dtype=torch.float64)
        built.step()
        reference.step([param], built.param_groups[0])
    np.testing.assert_allclose(param.detach().numpy(), reference.arrays[0], rtol=1e-10, atol=1e-10)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_updated_in_float32(optimizer, dtype):
    params = make_params(optimizer, dtype)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    built, wide_built = optimizer(params, lr=0.05), optimizer(wide, lr=0.05)
    for step in range(5):
        random_grads(params, seed=step)
        for param, other in zip(params, wide, strict=True):
            other.grad = param.grad.float()
            other.data.copy_(param.data)
        built.step()
        wide_built.step()
        assert_equal(params, [p.to(dtype) for p in wide])
    tensors = [v for state in built.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert tensors and all(tensor.dtype == torch.float32 for tensor in tensors)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_state_dict_through_json_continues_bit_for_bit(optimizer, dtype):
    params = make_params(optimizer, dtype)
    built = optimizer(params, lr=0.03)
    run(built, params[:-1], 3)  # the last has no state yet
    tensors, tree = flatten_state(built.state_dict())
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    rebuilt = optimizer(others, lr=0.5)
    rebuilt.load_state_dict(unflatten_state(saved, json.loads(json.dumps(tree))))
    before = {name: tensor.clone() for name, tensor in saved.items()}
    run(built, params, 4, start=3)
    run(rebuilt, others, 4, start=3)
    assert_equal(params, others)
    assert all(torch.equal(saved[name], before[name]) for name in saved), "the loaded state shares memory"
    assert rebuilt.param_groups[0]["lr"] == rebuilt.param_groups[0]["base_lr"] == 0.03


@every_optimizer
def test_groups_are_honoured(optimizer):
    params = make_params(optimizer)
    names = [name for name in ("lr", "weight_decay") if name in optimizer(params).defaults]
    groups = [{"params": [p], **{name: 0.01 * (i + 1) for name in names}} for i, p in enumerate(params)]
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    alone = [optimizer([p], **{name: 0.01 * (i + 1) for name in names}) for i, p in enumerate(others)]
    built = optimizer(groups, lr=0.9)
    assert [group["base_lr"] for group in built.param_groups] == [0.01 * (i + 1) for i in range(len(params))]
    for step in range(3):
        random_grads(params, seed=step)
        random_grads(others, seed=step)
        built.step()
        for each in alone:
            each.step()
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other)


@every_optimizer
def test_missing_gradients_are_skipped(optimizer):
    params = make_params(optimizer)
    before = [p.detach().clone() for p in params]
    built = optimizer(params)
    built.step()
    random_grads(params[1:], seed=0)
    built.step()
    assert torch.equal(params[0], before[0]) and params[0] not in built.state
    assert not torch.equal(params[1], before[1])


@every_optimizer
def test_gradients_are_not_written_to_and_the_closure_is_heard(optimizer):
    params = make_params(optimizer)
    random_grads(params, seed=0)
    before = [p.grad.clone() for p in params]
    assert optimizer(params).step(lambda: torch.tensor(3.0)) == 3.0
    assert_equal([p.grad for p in params], before)


@every_optimizer
def test_bad_input_is_one_line_that_names_it(optimizer):
    param = torch.nn.Parameter(torch.zeros(3, 4))
    for name in ("lr", "weight_decay"):
        for bad in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"^{name} must be [^\n]*$"):
                optimizer([param], **{name: bad})
    with pytest.raises(ValueError, match="^lr must"):
        optimizer([{"params": [param], "lr": -1.0}])
    with pytest.raises(ValueError, match="^parameter blocks.0.w must"):
        optimizer([("blocks.0.w", torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.complex64)))])
    param.grad = torch.zeros(3, 4).to_sparse()
    with pytest.raises(ValueError, match="^gradient of parameter w must be dense"):
        optimizer([("w", param)]).step()


@every_optimizer
def test_a_state_that_does_not_fit_changes_nothing(optimizer):
    params = make_params(optimizer)
    built = optimizer(params, lr=0.03)
    run(built, params, 2)
    good = copy.deepcopy(built.state_dict())
    for spoil in (
        lambda s: s["state"][0].update(extra=1),
        lambda s: s["state"][0].update({k: torch.zeros(9, 9) for k, v in s["state"][0].items() if hasattr(v, "shape")}),
        lambda s: s["param_groups"][0]["params"].pop(),
        lambda s: s["param_groups"][0].update(lr=-1.0),
        lambda s: s["param_groups"][0].pop("weight_decay"),
        lambda s: s.pop("state"),
    ):
        bad = copy.deepcopy(good)
        spoil(bad)
        with pytest.raises(ValueError):
            built.load_state_dict(bad)
        assert flatten_state(built.state_dict())[1] == flatten_state(good)[1]


@pytest.mark.parametrize("optimizer", [AdamW, Lamb])
def test_adamw_and_lamb_name_bad_betas_and_eps(optimizer):
    param = torch.nn.Parameter(torch.zeros(3))
    for bad in ((1.0, 0.9), (0.9, -0.1), (0.9,), 0.9):
        with pytest.raises(ValueError, match="^betas must"):
            optimizer([param], betas=bad)
    with pytest.raises(ValueError, match="^eps must"):
        optimizer([param], eps=-1e-8)


@pytest.mark.parametrize("foreach", [False, True])
def test_adamw_equals_torch(foreach):
    hyper = dict(lr=0.02, betas=(0.8, 0.97), eps=1e-6, weight_decay=0.3)
    ours, theirs = make_params(AdamW, torch.float64), make_params(AdamW, torch.float64)
    for optimizer, params, keywords in ((AdamW, ours, {}), (torch.optim.AdamW, theirs, {"foreach": foreach})):
        groups = [{"params": params[:4]}, {"params": params[4:], "betas": (0.5, 0.9), "eps": 1e-3, "lr": 0.1}]
        built = optimizer(groups, **hyper, **keywords)
        run(built, params, 10)
        for group in built.param_groups:
            group["lr"] /= 3
        run(built, params, 10, start=10)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-12, atol=1e-12)


def test_adamw_equals_itself_when_parameters_are_updated_together_as_on_a_gpu(monkeypatch):
    ours, together = make_params(AdamW), make_params(AdamW)
    built = AdamW(ours, eps=0.1)
    run(built, ours[::2], 3)  # the others start later: step counts differ within a bucket
    run(built, ours, 3, start=3)
    monkeypatch.setattr(AdamW, "bucket", lambda self, param: (param.device,))
    built = AdamW(together, eps=0.1)
    run(built, together[::2], 3)
    run(built, together, 3, start=3)
    assert_equal(ours, together)


def test_lamb_steps_as_torch_adam_does_and_as_far_as_the_parameter_is_large():
    hyper, lr, decay = dict(betas=(0.8, 0.97), eps=1e-6), 0.02, 0.3
    params, others = make_params(Lamb, torch.float64), [torch.nn.Parameter(p * 0) for p in make_params(Lamb, torch.float64)]
    lamb, adam = Lamb(params, lr=lr, weight_decay=decay, **hyper), torch.optim.Adam(others, lr=1.0, **hyper)
    for step in range(10):
        before = [p.detach().clone() for p in params]
        for other in others:
            other.data.zero_()  # its step does not depend on where it stands
        run(lamb, params, 1, start=step)
        run(adam, others, 1, start=step)
        for param, old, other in zip(params, before, others, strict=True):
            step_of_adam = -other.detach() + decay * old
            expected = old - lr * step_of_adam * (old.norm() / step_of_adam.norm() if old.numel() else 1)
            torch.testing.assert_close(param.detach(), expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close((param.detach() - old).norm(), lr * old.norm(), rtol=1e-10, atol=0)


def test_lamb_trusts_the_step_where_a_norm_is_zero():
    """A parameter of zeros moves as Adam would move it; one without gradient and decay stays, and nothing is divided by 0."""
    params = [torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.zeros(4))]
    built = Lamb(params, lr=0.25, weight_decay=0.0)
    for param, grad in zip(params, (3.0, 0.0, 0.0), strict=True):
        param.grad = torch.full((4,), grad)
    built.step()
    torch.testing.assert_close(params[0].detach(), torch.full((4,), -0.25), rtol=1e-5, atol=0)
    assert torch.equal(params[1], torch.ones(4)) and torch.equal(params[2], torch.zeros(4))


def test_muon_names_bad_input():
    param = torch.nn.Parameter(torch.zeros(3, 4))
    bad = dict(momentum=1.0, ns_steps=0, scale="none", dtype="int8")
    for name, value in bad.items():
        with pytest.raises(ValueError, match=f"^{name} must"):
            Muon([param], **{name: value})
    with pytest.raises(ValueError, match="^parameter norm.weight must be of 2 or 3 axes"):
        Muon([("w", param), ("norm.weight", torch.nn.Parameter(torch.zeros(4)))])


def test_parts_of_a_fused_matrix_step_as_matrices_of_their_own():
    """Also after a state went through JSON; without parts they do not."""
    torch.manual_seed(0)
    sizes, options = (5, 3, 16), dict(lr=0.1, weight_decay=0.1, dtype="float64")
    apart = [torch.nn.Parameter(torch.randn(rows, 6, dtype=torch.float64)) for rows in sizes]
    fused = torch.nn.Parameter(torch.cat([p.detach() for p in apart]))
    whole = torch.nn.Parameter(fused.detach().clone())
    optimizers = [Muon(apart, **options), Muon([dict(params=[fused], parts=sizes)], **options), Muon([whole], **options)]
    for step in range(4):
        for i, param in enumerate(apart):
            param.grad = 10.0**-i * torch.randn(param.shape, dtype=torch.float64)
        fused.grad = torch.cat([p.grad for p in apart])
        whole.grad = fused.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        if step == 1:
            tensors, tree = flatten_state(optimizers[1].state_dict())
            optimizers[1] = Muon([dict(params=[fused], parts=sizes)], **options)
            optimizers[1].load_state_dict(unflatten_state(tensors, json.loads(json.dumps(tree))))
    torch.testing.assert_close(fused, torch.cat([p.detach() for p in apart]), rtol=1e-12, atol=1e-12)
    assert (whole - fused).abs().max() > 0.01
    with pytest.raises(ValueError, match=r"^parts must be the rows of \(24, 6\), in parts, not \(5, 3\)"):
        Muon([dict(params=[fused], parts=(5, 3))])


def muon_beside_torch(scale, steps, nesterov=True, **keywords):
    matrices = [i for i, shape in enumerate(shapes(Muon)) if len(shape) == 2 and 0 not in shape]
    ours, theirs = ([make_params(Muon, torch.float64)[i] for i in matrices] for _ in range(2))
    hyper = dict(lr=0.02, momentum=0.9, nesterov=nesterov, weight_decay=0.3)
    run(Muon(ours, scale=scale, **hyper, **keywords), ours, steps)
    adjust = {"spectral": "original", "rms": "match_rms_adamw"}[scale]
    run(torch.optim.Muon(theirs, adjust_lr_fn=adjust, **hyper), theirs, steps)
    return ours, theirs


@pytest.mark.parametrize("scale", ["spectral", "rms"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torch_exactly_when_both_iterate_in_float64(scale, nesterov, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.double().clone())  # where torch would round
    ours, theirs = muon_beside_torch(scale, 20, nesterov, dtype="float64")
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", ["spectral", "rms"])
def test_muon_equals_torch_to_the_rounding_of_bfloat16(scale):
    ours, theirs = muon_beside_torch(scale, 1)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=0.02 * 0.05)  # 5 % of the step's largest entry


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), batch=st.integers(0, 3), seed=st.integers(0, 2**32))
def test_newton_schulz_keeps_singular_vectors_and_takes_values_into_the_band(rows, columns, batch, seed):
    rng = np.random.default_rng(seed)
    rank = min(rows, columns)
    u = np.linalg.qr(rng.standard_normal((batch, rows, rank)))[0]
    v = np.linalg.qr(rng.standard_normal((batch, columns, rank)))[0]
    values = 10 ** rng.uniform(-1, 1, (batch, 1, rank))  # at least 1/632 of their norm
    g = torch.from_numpy(u * values @ np.swapaxes(v, -2, -1))
    out = newton_schulz(g, 5, torch.float64)
    assert out.shape == g.shape
    mapped = np.swapaxes(u, -2, -1) @ out.numpy() @ v  # diagonal in the singular vectors of g
    diagonal = np.diagonal(mapped, axis1=-2, axis2=-1)
    np.testing.assert_allclose(mapped, diagonal[..., None] * np.eye(rank), atol=1e-9)
    assert np.all((0.68 < diagonal) & (diagonal < 1.21))
    assert np.all(np.abs(newton_schulz(g).double().numpy() - out.numpy()) < 0.1)  # bfloat16, the default


def test_newton_schulz_of_zero_is_zero():
    assert torch.equal(newton_schulz(torch.zeros(3, 5)), torch.zeros(3, 5, dtype=torch.bfloat16))
    assert newton_schulz(torch.zeros(2, 0, 5)).shape == (2, 0, 5)
