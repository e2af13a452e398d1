"""Linear attention against the `flash-linear-attention` package: its plain functions and layers, with the same numbers.

Those that its kernels are tested against, written in PyTorch as loops over time, in chunks, or as a matrix of T x T.
"""

import inspect
import math
import sys
import types

import pytest
import torch
from torch import Tensor, nn

from kernels.linear_attention import linear_attention
from nn.context import Context
from nn.linear_attention import LINEAR_ATTENTION
from nn.linear_attention.delta_rule import delta_rule
from nn.linear_attention.lightning import slopes_of
from nn.linear_attention.retention import forgetting
from nn.spec import build

# Its package of models would put them in the places of Mamba's in the registry of `transformers`, for other tests too
sys.modules.setdefault("fla.models", types.ModuleType("fla.models")).__all__ = []
pytest.importorskip("fla.ops.gla.naive", reason="flash-linear-attention is not installed", exc_type=ImportError)

from fla.modules.feature_map import HedgehogFeatureMap, T2RFeatureMap  # noqa: E402
from fla.ops.delta_rule.naive import delta_rule_chunkwise, delta_rule_recurrence  # noqa: E402
from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule, naive_recurrent_gated_delta_rule  # noqa: E402
from fla.ops.gla.naive import naive_recurrent_gla  # noqa: E402
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn  # noqa: E402
from fla.ops.retention.naive import naive_retention  # noqa: E402
from fla.ops.simple_gla.naive import naive_chunk_simple_gla, naive_parallel_simple_gla, naive_recurrent_simple_gla  # noqa: E402

BATCH, TIME, HEADS, KEY, VALUE = 2, 70, 3, 8, 6  # more than one chunk


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(time: int = TIME) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (numbers(BATCH, time, HEADS, n, seed=n + i) for i, n in enumerate((KEY, KEY, VALUE)))
    return q, k, v, numbers(BATCH, HEADS, KEY, VALUE, seed=9)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert ours.shape == theirs.shape and error < 1e-5, f"{error:.1e}"


def by_head(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, T, H, …) as (B, H, T, …), and back."""
    return tuple(x.transpose(1, 2) for x in tensors)


def test_gla():
    q, k, v, first = inputs()
    g = nn.functional.logsigmoid(numbers(BATCH, TIME, HEADS, KEY, seed=5)) / 16
    theirs, last = naive_recurrent_gla(q, k, v, g, initial_state=first, output_final_state=True)
    o, S = linear_attention(q, k, v, g, initial_state=first)
    assert_close(o, theirs)
    assert_close(S, last)


@pytest.mark.parametrize("bound", [0.0, 0.75])
def test_hgrn2(bound):
    """GLA whose keys are 1 - exp(g), with the gates as our mixer makes them and as theirs makes them of the same numbers."""
    q, f, v, first = inputs()
    mixer = build(f"hgrn2:bound={bound}", LINEAR_ATTENTION, "mixer", HEADS * VALUE, heads=HEADS)
    g = nn.functional.logsigmoid(f)
    if bound:
        g = torch.logaddexp(torch.tensor(bound).log(), torch.log1p(torch.tensor(-bound)) + g)
    theirs, last = naive_recurrent_gla(q, 1 - g.exp(), v, g, initial_state=first, output_final_state=True)
    kept, written = mixer.gates(f)
    o, S = linear_attention(q, written, v, kept, initial_state=first)
    assert_close(o, theirs)
    assert_close(S, last)


def test_retention():
    q, k, v, _ = inputs()
    (theirs,) = by_head(naive_retention(*by_head(q, k, v)))
    o, _ = linear_attention(q, k, v, forgetting(HEADS))
    assert_close(o, theirs)


@pytest.mark.parametrize("kind", ["linear", "alibi"])
def test_the_decay_of_lightning(kind):
    """Three forms of theirs with a decay a head: a loop, chunks, and a matrix."""
    q, k, v, first = inputs()
    decay = -slopes_of(kind, HEADS, 2, 4)
    g = decay.float().expand(BATCH, TIME, HEADS)
    o, S = linear_attention(q, k, v, decay, initial_state=first)
    for theirs in (naive_recurrent_simple_gla, naive_chunk_simple_gla):
        found, last = theirs(q, k, v, g, initial_state=first.clone(), output_final_state=True)
        assert_close(o, found)
        assert_close(S, last)
    assert_close(linear_attention(q, k, v, decay)[0], naive_parallel_simple_gla(q, k, v, g)[0])


def test_the_normaliser_of_linear():
    """Their running sum of keys is our column of ones."""
    q, k, v, _ = inputs()
    dim = HEADS * KEY
    mixer = build("linear", LINEAR_ATTENTION, "mixer", dim, heads=HEADS)
    x = numbers(BATCH, TIME, dim)
    with torch.no_grad():
        mixer.out.weight.copy_(torch.eye(dim))
        q, k, v = (layer(x).view(BATCH, TIME, HEADS, KEY) for layer in (mixer.query, mixer.key, mixer.value))
        y = mixer(x, Context(torch.zeros(BATCH, TIME, dtype=torch.int64), torch.arange(TIME)))
    q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
    theirs, _ = naive_recurrent_linear_attn(q, k, v, normalize=True)
    assert_close(y, theirs.flatten(2))


def test_delta_rule():
    """Theirs scales queries by D^(-1/2), and its form in chunks takes whole ones."""
    q, k, v, first = inputs(64)
    k, beta = nn.functional.normalize(k, dim=-1), numbers(BATCH, 64, HEADS, seed=7).sigmoid()
    scale = 1 / math.sqrt(KEY)
    theirs, last = delta_rule_recurrence(*by_head(q, k, v, beta), initial_state=first)
    o, S = delta_rule(q * scale, k, v, beta, initial_state=first, chunk=20)
    assert_close(o, *by_head(theirs))
    assert_close(S, last)
    theirs, last = delta_rule_chunkwise(*by_head(q, k, v, beta), chunk_size=32)
    o, S = delta_rule(q * scale, k, v, beta)
    assert_close(o, *by_head(theirs))
    assert_close(S, last)


def test_gated_delta_rule():
    q, k, v, first = inputs()
    k, beta = nn.functional.normalize(k, dim=-1), numbers(BATCH, TIME, HEADS, seed=7).sigmoid()
    g = -nn.functional.softplus(numbers(BATCH, TIME, HEADS, seed=8))
    o, S = delta_rule(q / math.sqrt(KEY), k, v, beta, g, initial_state=first)
    options = dict(initial_state=first, output_final_state=True)
    for theirs in (naive_recurrent_gated_delta_rule, naive_chunk_gated_delta_rule):
        found, last = theirs(q, k, v, beta=beta, g=g, **options)
        assert_close(o, found)
        assert_close(S, last)


def test_the_feature_maps_of_lolcats():
    """T2R's is theirs without a bias. Their Hedgehog map takes ONE softmax over [2z, -2z], the paper two, over z and over -z.

    With twice our A and b ours are the two halves of theirs, each divided by its sum.
    """
    dim, u = HEADS * KEY, numbers(BATCH, HEADS, TIME, KEY)
    with torch.no_grad():
        mixer = build("lolcats:feature=t2r:width=6", LINEAR_ATTENTION, "mixer", dim, heads=HEADS)
        theirs = [T2RFeatureMap(KEY, 6) for _ in range(HEADS)]
        mixer.query_map.copy_(torch.stack([map.layer.weight.T for map in theirs]))
        found = mixer.mapped(u, mixer.query_map, mixer.query_shift)
        for head, map in enumerate(theirs):
            assert_close(found[:, head], map(u[:, head]))
        mixer = build("lolcats", LINEAR_ATTENTION, "mixer", dim, heads=HEADS)
        theirs = [HedgehogFeatureMap(KEY) for _ in range(HEADS)]
        for map in theirs:
            nn.init.normal_(map.layer.weight, std=0.5), nn.init.normal_(map.layer.bias)
        mixer.key_map.copy_(torch.stack([2 * map.layer.weight.T for map in theirs]))
        mixer.key_shift.copy_(torch.stack([2 * map.layer.bias for map in theirs]))
        found = mixer.mapped(u, mixer.key_map, mixer.key_shift)
        for head, map in enumerate(theirs):
            halves = map(u[:, head]).unflatten(-1, (2, KEY))
            assert_close(found[:, head], (halves / halves.sum(-1, keepdim=True)).flatten(-2))


# Whole layers of theirs: their kernels need a GPU, so in their places stand the plain functions and PyTorch's own norm

DIM = 24


class TheirConvolution(nn.Module):
    """Their ShortConvolution with PyTorch's own convolution."""

    def __init__(self, theirs: nn.Module):
        super().__init__()
        self.weight = theirs.weight  # (C, 1, W)

    def forward(self, x: Tensor, **_) -> tuple[Tensor, None]:
        C, _, W = self.weight.shape
        padded = nn.functional.pad(x.transpose(1, 2), (W - 1, 0))
        return nn.functional.silu(nn.functional.conv1d(padded, self.weight, groups=C)).transpose(1, 2), None


def with_weights(theirs: nn.Module, ours: nn.Module, names: dict[str, str]) -> None:
    """Random weights for theirs, and the same for ours, whose names are given; what is not named is zero in ours."""
    for parameter in [*theirs.parameters(), *ours.parameters()]:
        nn.init.normal_(parameter, std=0.3)
    theirs_by_name = theirs.state_dict()
    values = {name: torch.zeros_like(value) for name, value in ours.state_dict().items()}
    values |= {name: theirs_by_name[other] for name, other in names.items()}
    ours.load_state_dict(values)


def same_outputs(theirs: nn.Module, ours: nn.Module) -> None:
    x = numbers(BATCH, 20, DIM)
    with torch.no_grad():
        assert_close(ours(x, Context(torch.zeros(BATCH, 20, dtype=torch.int64), torch.arange(20))), theirs(x)[0])


QKV = {"query.weight": "q_proj.weight", "key.weight": "k_proj.weight", "value.weight": "v_proj.weight"}


def test_the_layer_of_gla(monkeypatch):
    module = pytest.importorskip("fla.layers.gla")
    monkeypatch.setattr(module, "fused_recurrent_gla", lambda q, k, v, gk, **_: naive_recurrent_gla(q, k, v, gk))
    theirs = module.GatedLinearAttention(hidden_size=DIM, num_heads=HEADS, fuse_norm=False)
    theirs.g_norm, theirs.gate_fn = nn.RMSNorm(DIM // HEADS, eps=1e-5), nn.functional.silu
    ours = build("gla", LINEAR_ATTENTION, "mixer", DIM, heads=HEADS)
    names = QKV | {"gate.weight": "g_proj.weight", "out.weight": "o_proj.weight", "gain": "g_norm.weight"}
    names |= {"decay_down.weight": "gk_proj.0.weight"}
    names |= {f"decay_up.{kind}": f"gk_proj.1.{kind}" for kind in ("weight", "bias")}
    with_weights(theirs, ours, names)
    same_outputs(theirs, ours)


@pytest.mark.parametrize("layer", [1, 3])
def test_the_layer_of_hgrn2(layer, monkeypatch):
    """Their bounds are given to a layer from outside; ours are what theirs begin with."""
    module = pytest.importorskip("fla.layers.hgrn2")
    bounds = torch.ones(4).softmax(0).cumsum(0) - 0.25
    monkeypatch.setattr(
        module, "fused_recurrent_gla",
        lambda q, k, v, gk, **_: naive_recurrent_gla(q * q.shape[-1] ** 0.5, k, v, gk),
    )  # fmt: skip
    monkeypatch.setattr(
        module, "rms_norm_linear",
        lambda o, gain, bias, weight, b: nn.functional.rms_norm(o, o.shape[-1:], gain, 1e-5) @ weight.mT,
    )  # fmt: skip
    monkeypatch.setattr(module, "swish", nn.functional.silu)
    theirs = module.HGRN2Attention(hidden_size=DIM, num_heads=HEADS, expand_ratio=None, layer_idx=layer - 1)
    ours = build(f"hgrn2:layer={layer}:layers=4", LINEAR_ATTENTION, "mixer", DIM, heads=HEADS)
    names = {"query": "q_proj", "forget": "f_proj", "value": "i_proj", "out": "o_proj"}
    with_weights(theirs, ours, {f"{a}.weight": f"{b}.weight" for a, b in names.items()} | {"gain": "g_norm.weight"})
    x = numbers(BATCH, 20, DIM)
    with torch.no_grad():
        y = ours(x, Context(torch.zeros(BATCH, 20, dtype=torch.int64), torch.arange(20)))
        assert_close(y, theirs(x, lower_bound=bounds[layer - 1])[0])


@pytest.mark.parametrize("doubled", [False, True])
def test_the_layer_of_delta(doubled, monkeypatch):
    """Their queries are scaled by D^(-1/2), which the norm undoes but for its eps."""
    module, D = pytest.importorskip("fla.layers.delta_net"), DIM // HEADS

    def plain(q, k, v, beta, **_):
        q, k = (x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        o, S = delta_rule_recurrence(*by_head(q, k, v, beta))
        return o.transpose(1, 2), S

    monkeypatch.setattr(module, "fused_recurrent_delta_rule", plain)
    theirs = module.DeltaNet(hidden_size=DIM, num_heads=HEADS, conv_size=4, allow_neg_eigval=doubled)
    theirs.o_norm = nn.RMSNorm(D, eps=1e-5)
    for name in ("q_conv1d", "k_conv1d", "v_conv1d"):
        setattr(theirs, name, TheirConvolution(getattr(theirs, name)))
    ours = build(f"delta:eps={1e-5 * D}:beta_max={1 + doubled}", LINEAR_ATTENTION, "mixer", DIM, heads=HEADS)
    names = QKV | {"beta.weight": "b_proj.weight", "out.weight": "o_proj.weight", "gain": "o_norm.weight"}
    with_weights(theirs, ours, names)
    with torch.no_grad():
        ours.taps.copy_(torch.cat([getattr(theirs, f"{x}_conv1d").weight[:, 0] for x in "qkv"]))
    same_outputs(theirs, ours)


def test_the_layer_of_gated_delta(monkeypatch):
    """Qwen3-Next's, from `transformers`: its projections are packed, head by head q, k, v and gate, and b and a."""
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    plain = inspect.unwrap(qwen.torch_chunk_gated_delta_rule)  # where fla is installed its kernel stands in front
    monkeypatch.setattr(qwen, "torch_chunk_gated_delta_rule", lambda *args, cu_seqlens, **more: plain(*args, **more))
    D, V = 8, 16
    config = qwen.Qwen3NextConfig(
        hidden_size=DIM, linear_num_value_heads=HEADS, linear_num_key_heads=HEADS, linear_key_head_dim=D,
        linear_value_head_dim=V, linear_conv_kernel_dim=4, rms_norm_eps=1e-5, hidden_act="silu",
    )  # fmt: skip
    theirs = qwen.Qwen3NextGatedDeltaNet(config, 0)
    ours = build(f"gated_delta:head_dim={D}:eps={1e-5 * D}", LINEAR_ATTENTION, "mixer", DIM, heads=HEADS)
    with_weights(theirs, ours, {"out.weight": "out_proj.weight", "gain": "norm.weight", "A_log": "A_log", "dt_bias": "dt_bias"})
    packed = theirs.in_proj_qkvz.weight.unflatten(0, (HEADS, -1)).split([D, D, V, V], 1)
    with torch.no_grad():
        for name, weight in zip(("query", "key", "value", "gate"), packed, strict=True):
            getattr(ours, name).weight.copy_(weight.flatten(0, 1))
        for name, weight in zip(("beta", "decay"), theirs.in_proj_ba.weight.unflatten(0, (HEADS, 2)).unbind(1), strict=True):
            getattr(ours, name).weight.copy_(weight)
        ours.taps.copy_(theirs.conv1d.weight[:, 0])
        x = numbers(BATCH, 80, DIM)
        y = theirs(x)
        y = y[0] if isinstance(y, tuple) else y
        assert_close(ours(x, Context(torch.zeros(BATCH, 80, dtype=torch.int64), torch.arange(80))), y)
