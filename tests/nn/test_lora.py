"""LoRA: nothing is changed at first, only two thin matrices learn, and merging them in keeps the function."""

import pytest
import torch
from torch import Tensor, nn

from models import Config, LanguageModel, build_model
from nn.adapt import ADAPTERS
from nn.adapt.lora import LowRank, lora, merge
from nn.linear import Linear, decode_in_half, project
from nn.spec import build
from optim import split_parameters

DIM = 16
FIELDS = dict(vocab_size=23, dim=DIM, heads=4, depth=2, seq_len=24, stem="", position="rope", ffn="mlp:width=24")
MIXERS = [
    "gqa:kv_heads=2:bias=true",
    "mla:kv_rank=6:nope_dim=3:rope_dim=4:value_dim=5",
    "lolcats:window=3",
    "mamba2:head_dim=8",
]


def make(mixer: str = MIXERS[0], adapter: str = "", *, seed: int = 0) -> LanguageModel:
    """A model of random weights, adapted or not, and the adapter's B too no longer zero."""
    model = build_model(Config.of(**FIELDS, mixer=mixer, adapt=adapter), seed=seed).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def tokens(length: int = 9, batch: int = 3) -> Tensor:
    return torch.randint(23, (batch, length), generator=torch.Generator().manual_seed(2))


def adapters(model: nn.Module) -> list[tuple[str, Linear]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, Linear) and m.adapter is not None]


@torch.no_grad()
def test_the_equation():
    """y = W x + b + (alpha / rank) B A x, of a layer alone and of several that read the same."""
    layers = [Linear(6, n, bias=n == 4).double() for n in (4, 5)]
    holder, x = nn.ModuleDict(dict(zip("ab", layers, strict=True))), torch.randn(2, 3, 6, dtype=torch.float64)
    lora(holder, rank=2, alpha=3.0, targets=("a", "b"))
    for layer, y in zip(layers, project(x, *layers), strict=True):
        A, B = layer.adapter.A.weight, layer.adapter.B.weight.normal_()
        assert A.shape == (2, 6) and B.shape == (layer.out_features, 2)
        expected = nn.functional.linear(x, layer.weight, layer.bias) + 1.5 * (x @ A.T) @ B.T
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-14)
        torch.testing.assert_close(x @ layer.effective_weight.T + (0 if layer.bias is None else layer.bias), expected)
        assert not torch.equal(y, layer(x))  # it was computed before B was drawn


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_at_first_it_is_the_same_function_and_merging_keeps_it(mixer):
    plain, ids = make(mixer), tokens()
    before, weights = plain(ids), {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    targets = ("out", "up") if mixer.startswith("mla") else ("out",)
    lora(plain, rank=3, alpha=2.0, targets=targets)
    assert torch.equal(plain(ids), before)
    for _, layer in adapters(plain):
        assert layer.adapter.A.weight.abs().max() <= layer.in_features**-0.5
        layer.adapter.B.weight.normal_(std=0.3)
    after, state = plain(ids), plain.init_state(3, 9)
    assert (after - before).abs().max() > 0.01
    steps = torch.cat([plain(part, state=state) for part in ids.split([4, 1, 1, 3], 1)], 1)  # mla decodes with W itself
    torch.testing.assert_close(steps, after, rtol=0, atol=1e-12)
    merge(plain)
    torch.testing.assert_close(plain(ids), after, rtol=0, atol=1e-12)
    assert not adapters(plain) and plain.state_dict().keys() == weights.keys()
    changed = {name for name, tensor in plain.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert {name.split(".")[-2] for name in changed} == {*targets} and all(p.requires_grad for p in plain.parameters())


def test_only_the_thin_matrices_learn():
    """Everything else is bit-identical after steps of the optimizers, which hold rank (in + out) numbers a target."""
    model, ids = make(adapter="lora:rank=3:targets=query+value+down"), tokens()
    learning = [p for p in model.parameters() if p.requires_grad]
    # query 16 -> 16, value 16 -> 8 of two heads, the ffn's down 24 -> 16; in two layers
    assert sum(p.numel() for p in learning) == 2 * 3 * ((16 + 16) + (16 + 8) + (24 + 16))
    split = split_parameters(model)
    assert {id(p) for _, p in split.vector} == {id(p) for p in learning} and not split.hidden + split.head + split.embedding
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, ids).backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (".adapter." not in name), name


def test_gradients():
    """By finite differences, of A and B and of what a layer reads."""
    layer = Linear(4, 3).double()
    lora(nn.ModuleDict(dict(a=layer)), rank=2, alpha=5.0, targets=("a",))
    names, values = zip(*layer.adapter.named_parameters(prefix="adapter"), strict=True)
    values = [torch.randn_like(value).requires_grad_() for value in values]
    call = lambda x, *given: torch.func.functional_call(layer, dict(zip(names, given, strict=True)), x)  # noqa: E731
    assert torch.autograd.gradcheck(call, (torch.randn(5, 4, dtype=torch.float64, requires_grad=True), *values))
    assert layer.weight.grad is None and layer.bias.grad is None


@torch.no_grad()
def test_in_half_precision_while_decoding():
    """The copy has the adapter's part in it: of layers that are one product, and of one by itself."""
    model, ids = make(adapter="lora:rank=3:targets=query+value+out").float(), tokens(6, 1)
    exact, plain = model(ids), make().float()
    decode_in_half(model)
    state, steps = model.init_state(1, 6), []
    for part in ids.split(1, 1):
        steps.append(model(part, state=state))
    error = (torch.cat(steps, 1) - exact).norm() / exact.norm()
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if ".adapter." not in name})
    assert 0 < error < 0.01 < 0.1 < (plain(ids) - exact).norm() / exact.norm()


def test_under_autocast():
    model, ids = make(adapter="lora:rank=3").float(), tokens()
    exact = model(ids, ids)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, ids)
    loss.backward()
    assert abs(loss.item() / exact.item() - 1) < 0.02
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.dtype == torch.float32) == (".adapter." in name), name


def test_it_is_traced_whole():
    """torch.compile takes an adapted model as one graph."""
    model, ids = make(adapter="lora:rank=3"), tokens()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model(ids))


def test_the_seed_draws_it():
    """Of a model that is built adapted."""
    model, same, other = (build_model(Config.of(**FIELDS, mixer="gqa", adapt="lora:rank=2"), seed=s) for s in (3, 3, 4))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])
        assert not name.endswith("A.weight") or not torch.equal(tensor, other.state_dict()[name])
        assert not name.endswith("B.weight") or not tensor.any()
    assert any(name.endswith("A.weight") for name in model.state_dict())


def test_what_does_not_fit():
    for spec, message in (
        ("lora:targets=query+heads", "targets: no layer is called 'heads'; there are: down, key, out, query, up, value"),
        ("lora:targets=querry", "targets: no layer is called 'querry' \\(did you mean 'query'\\?\\); there are: "),
        ("lora:targets=head", "targets: no layer is called 'head'"),  # the loss reads its matrix as it is
        ("lora:rank=0", "rank: 0 is too small"), ("lora:alpha=0", "alpha: 0.0 "), ("lora:alpha=inf", "alpha: inf "),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{message}"):
            build(spec, ADAPTERS, "adapter", make())
    with pytest.raises(ValueError, match="^adapter: .*already"):
        lora(make(adapter="lora"))
    with pytest.raises(ValueError, match="^adapter: .*none to merge"):
        merge(make())


def test_a_layer_alone_has_none():
    layer = Linear(3, 4)
    assert layer.adapter is None and layer.effective_weight is layer.weight and {*layer.state_dict()} == {"weight", "bias"}
    assert not any(isinstance(m, LowRank) for m in make().modules())
