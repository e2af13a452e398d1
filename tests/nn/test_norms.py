"""Every norm against its formula in NumPy, and the contract of the family.

A norm whose class says `per_token = False` works with statistics of the batch in training: only outside of it is a token's
output that token's alone. All others are functions of one token always.
"""

import numpy as np
import pytest
import torch
from torch import nn

from models import Config, build_model
from models.describe import activation_bytes
from models.weights import load_model, save_model
from nn.norm import NORMS
from nn.spec import arguments, build

DIM = 12
BATCH_STATISTICS = {"powernorm", "unifiednorm"}


def layernorm(x, norm, eps=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def rmsnorm(x, norm, eps=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def crmsnorm(x, norm, eps=1e-6):
    return rmsnorm(np.concatenate([x, -x.sum(-1, keepdims=True)], -1), norm, eps)[..., :-1]


def running(x, norm, eps=1e-5):
    return x / np.sqrt(norm.mean_square.numpy() + eps)


FORMULAS = {
    "none": lambda x, norm: x,
    "layernorm": layernorm,
    "rmsnorm": rmsnorm,
    "srmsnorm": rmsnorm,
    "crmsnorm": crmsnorm,
    "powernorm": running,
    "unifiednorm": running,
    "fakenorm": layernorm,
}
each = pytest.mark.parametrize("name", NORMS)


def having(*options: str):
    """Those that have all of these options."""
    return pytest.mark.parametrize("name", [name for name, norm in NORMS.items() if {*options} <= arguments(norm).keys()])


def make(spec: str, dtype: torch.dtype = torch.float64, *, training: bool = False) -> nn.Module:
    torch.manual_seed(0)
    norm = build(spec, NORMS, "norm", DIM)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    if hasattr(norm, "mean_square"):
        nn.init.uniform_(norm.mean_square, 0.5, 2.0)
    return norm.to(dtype).train(training)


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 1


def step(norm: nn.Module, seed: int) -> torch.Tensor:
    """Output and gradient of one step of training on a batch of its own, which is where statistics move."""
    x = numbers(2, 5, DIM, seed=seed).to(norm_dtype(norm)).requires_grad_()
    y = norm.train()(x)
    y.backward(numbers(2, 5, DIM, seed=seed + 100).to(y.dtype))
    norm.zero_grad()
    return torch.stack([y.detach(), x.grad])


def norm_dtype(norm: nn.Module) -> torch.dtype:
    return next((t.dtype for t in norm.state_dict().values() if t.is_floating_point()), torch.float64)


def test_every_norm_has_its_formula_here():
    assert FORMULAS.keys() == NORMS.keys()
    assert BATCH_STATISTICS == {name for name, norm in NORMS.items() if not getattr(norm, "per_token", True)}


@each
@pytest.mark.parametrize("eps", [None, 0.5])
@pytest.mark.parametrize("shape", [(DIM,), (2, 5, DIM), (0, 3, DIM)])
def test_formula(name, eps, shape):
    if eps is not None and "eps" not in arguments(NORMS[name]):
        return
    norm, x = make(name if eps is None else f"{name}:eps={eps}"), numbers(*shape)
    expected = FORMULAS[name](x.numpy(), norm, **({} if eps is None else dict(eps=eps)))
    for parameter, apply in (("weight", np.multiply), ("bias", np.add)):
        if getattr(norm, parameter, None) is not None:
            expected = apply(expected, getattr(norm, parameter).detach().numpy())
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@having("gain")
def test_bare(name):
    """Without gain and bias there is nothing to learn, and only the formula is left."""
    norm, x = make(f"{name}:gain=false:bias=false"), numbers(4, DIM)
    assert not list(norm.parameters())
    np.testing.assert_allclose(norm(x).numpy(), FORMULAS[name](x.numpy(), norm), rtol=1e-12, atol=1e-12)


@having("bias")
def test_bias(name):
    norm, x = make(f"{name}:gain=false:bias=true"), numbers(4, DIM)
    expected = FORMULAS[name](x.numpy(), norm) + norm.bias.detach().numpy()
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@each
def test_begins_as_the_bare_formula(name):
    x, norm = numbers(4, DIM), build(name, NORMS, "norm", DIM).double().eval()
    np.testing.assert_allclose(norm(x).detach().numpy(), FORMULAS[name](x.numpy(), norm))


@each
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept(name, dtype, training):
    norms = make(name, dtype, training=training), make(name, training=training)
    y, exact = (norm(numbers(4, DIM).to(next(iter(norm.parameters()), torch.zeros(1, dtype=kind)).dtype))
                for norm, kind in zip(norms, (dtype, torch.float64), strict=True))  # fmt: skip
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0)


@each
def test_rounded_once(name):
    """bfloat16 in, parameters in float32: nearly every number is the exact one rounded."""
    norm, x = make(name, torch.float32), numbers(50, DIM).bfloat16()
    expected = make(name)(x.double()).bfloat16()
    assert norm(x).dtype == torch.bfloat16 and (norm(x) == expected).double().mean() > 0.97


@having("bias")
def test_a_bias_keeps_the_dtype(name):
    assert make(f"{name}:bias=true", torch.float32)(numbers(4, DIM).bfloat16()).dtype == torch.bfloat16


@each
@pytest.mark.parametrize("training", [False, True])
def test_gradients(name, training):
    """Exact in training too: a batch norm's first steps are its warmup."""
    norm, x = make(name, training=training), numbers(3, DIM).requires_grad_()
    assert torch.autograd.gradcheck(norm, (x,))
    norm.zero_grad()
    (norm(x) * numbers(3, DIM)).sum().backward()
    assert all(p.grad.isfinite().all() and (p.grad != 0).all() for p in norm.parameters())


@each
def test_a_token_is_by_itself(name):
    """Outside of training, and where no gradient is recorded, always; in training if and only if the class says so."""
    norm, x = make(name), numbers(3, 4, DIM)
    other = x.clone()
    other[1, 2] = numbers(DIM, seed=7)
    same = torch.ones(3, 4, dtype=torch.bool)
    same[1, 2] = False
    torch.testing.assert_close(norm(x)[1, 2], norm(x[1, 2]))
    torch.testing.assert_close(norm(x)[same], norm(other)[same], rtol=0, atol=0)
    norm.train()
    with torch.no_grad():
        torch.testing.assert_close(norm(x)[same], norm(other)[same], rtol=0, atol=0)
    assert torch.equal(norm(x)[same], norm(other)[same]) == getattr(norm, "per_token", True)


@each
def test_statistics_move_in_training_only(name):
    norm = make(name)
    before = {key: tensor.clone() for key, tensor in norm.state_dict().items()}
    norm(numbers(4, DIM))
    norm.train()(numbers(0, DIM))
    with torch.inference_mode():
        norm.train()(numbers(4, DIM))
    assert all(torch.equal(before[key], tensor) for key, tensor in norm.state_dict().items())
    step(norm, 1)
    assert all(torch.equal(before[key], tensor) for key, tensor in norm.state_dict().items()) == (not list(norm.buffers()))


@each
def test_state_round_trip(name):
    """What the state holds is all there is: a second norm that gets it goes on the same way."""
    spec = name + ":warmup=1" * ("warmup" in arguments(NORMS[name]))
    norm = make(spec)
    for seed in range(3):
        step(norm, seed)
    again = build(spec, NORMS, "norm", DIM).double()
    again.load_state_dict(norm.state_dict())
    for seed in range(3, 6):
        torch.testing.assert_close(step(again, seed), step(norm, seed), rtol=0, atol=0)
    torch.testing.assert_close(again.eval()(numbers(4, DIM)), norm.eval()(numbers(4, DIM)), rtol=0, atol=0)
    assert all(torch.equal(tensor, norm.state_dict()[key]) for key, tensor in again.state_dict().items())


@each
def test_in_a_model(name, tmp_path):
    """Trained two steps, saved and loaded; built without memory; causal outside of training."""
    config = Config.of(vocab_size=31, dim=16, heads=2, depth=1, seq_len=12, norm=name, init="gpt2")
    model, tokens = build_model(config), torch.arange(24).view(2, 12)
    for _ in range(2):
        model(tokens, tokens).backward()
    save_model(model.eval(), tmp_path)
    again = load_model(tmp_path).eval()
    assert torch.equal(model(tokens), again(tokens))
    assert activation_bytes(config, 12, torch.float32) > 0
    changed = tokens.clone()
    changed[:, 6:] = 30
    assert torch.equal(again(changed)[:, :6], model(tokens)[:, :6])


@pytest.mark.parametrize("name", [name for name in NORMS if name not in {"none"} | BATCH_STATISTICS])
def test_scale_does_not_matter(name):
    norm, x = make(f"{name}:eps=0"), numbers(4, DIM)
    torch.testing.assert_close(norm(1000 * x), norm(x))


@each
@pytest.mark.parametrize("training", [False, True])
def test_zeros_stay_finite(name, training):
    norm, x = make(name, training=training), torch.zeros(2, DIM, dtype=torch.float64, requires_grad=True)
    for _ in range(8):
        y = norm(x)
        y.sum().backward()
        assert y.isfinite().all() and (name == "none" or x.grad.isfinite().all())


@each
def test_bad_arguments(name):
    known = arguments(NORMS[name])
    for option, bad in (("eps", "-1"), ("warmup", "-1"), ("window", "0"), ("decay", "1"), ("decay", "-0.1")):
        if option in known:
            with pytest.raises(ValueError, match=f"^{option}: .* is too small|^{option}: .* does not lie in"):
                make(f"{name}:{option}={bad}")


@pytest.mark.parametrize(("name", "peer"), [("layernorm", nn.LayerNorm), ("rmsnorm", nn.RMSNorm), ("fakenorm", nn.LayerNorm)])
def test_peer(name, peer):
    """PyTorch's own, with the same gain and bias."""
    norm = make(f"{name}:eps=1e-5")
    other = peer(DIM, eps=1e-5).double()
    other.load_state_dict({key: tensor for key, tensor in norm.state_dict().items() if key in other.state_dict()})
    torch.testing.assert_close(norm(numbers(4, DIM)), other(numbers(4, DIM)))
    simple = nn.RMSNorm(DIM, eps=1e-6, elementwise_affine=False)
    torch.testing.assert_close(make("srmsnorm")(numbers(4, DIM)), simple(numbers(4, DIM)))
