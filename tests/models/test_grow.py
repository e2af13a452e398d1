"""Wider by copies: exactly the same function, or one whose symmetry is broken. Deeper by copies: each tensor a source's."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import train
from models import build_model, widen
from models.grow import ORDERS, deepen, grow, main
from models.stack import cycled
from models.weights import load_model, save_model
from models.widen import Copies, copies
from nn.attention import MQA
from tests.models.drawn import drawn, tokens

trained = partial(drawn, std=0.4, heads=4, depth=3, mixer="gqa:kv_heads=2", ffn="swiglu")

MODELS = {
    "llama": dict(model="llama-1m", ffn="swiglu:width=24", norm="rmsnorm:eps=1e-2"),  # tied
    "the default": dict(model="small", mixer="gqa:qk_norm=unit,gqa:qk_norm=unit:value_embedding=true", stem="ngram:rows=50"),
    "gpt2": dict(model="gpt2", mixer="mha:bias=true", norm="rmsnorm:bias=true", position="learned"),
    "tied without a gain": dict(norm="srmsnorm", tie=True),
    "gain about 1, tied": dict(norm="rmsnorm:offset=1", tie=True, softcap=5.0, embedding_scale=3.0),
    "all that attention has": dict(mixer="gqa:kv_heads=2:bias=true:gate=true:sinks=true:window=9:softcap=4:scale=0.3,mqa"),
    "norms of heads": dict(mixer="gqa:heads=6:kv_heads=3:head_dim=4:qk_norm=head,mha:qk_norm=head:head_dim=6"),
    "heads said twice": dict(mixer="gqa:heads=8:kv_heads=8,gqa:heads=2:kv_heads=1", norm="none"),
    "one head": dict(mixer="mqa:heads=1:head_dim=6,gqa:heads=1:head_dim=6", heads=2),
    "ffns": dict(ffn="geglu:width=5,mlp:activation=star_relu:bias=true,glu:bias=true:width=7", norm_place="sandwich"),
    "side by side": dict(stack="gqa+sglu:width=3 mlp:width=9 mqa:head_dim=6 swiglu", norm_place="post"),
    "after": dict(norm_place="deepnorm", embedding_norm="extra", mixer="mqa,none"),
    "output": dict(norm_place="output", norm="rmsnorm:gain=false:bias=true"),
    "an encoder": dict(objective="masked", norm_place="scaled", vocab_size=41),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_fpi_keeps_the_function(name):
    """Whether every unit is copied equally often (32, 48) or not (24)."""
    model = trained(**MODELS[name])
    for dim in (32, 48) if name == "one head" else (32, 24, 48):
        made = grow(model, width=dim, seed=dim)
        scale = model(tokens()).abs().max()
        assert (made(tokens()) - model(tokens())).abs().max() < 1e-12 * scale
        assert scale > 0.5 and made.config.dim == dim and made.embedding.weight.shape[1] == dim
        assert made.config.tie == (model.config.tie and name != "tied without a gain")
        assert bool(made.config.stack) == bool(model.config.stack)
        for old, new in zip(model.stack, made.stack, strict=True):
            old, new = (getattr(s.layer, "branches", [s.layer])[0] for s in (old, new))
            if hasattr(old, "heads"):
                assert new.heads == old.heads * dim // 16 and new.head_dim == old.head_dim
                alone = old.kv_heads == old.heads and not isinstance(old, MQA)
                assert new.kv_heads == (new.heads if alone else old.kv_heads)
            elif hasattr(old, "down"):
                assert new.down.in_features == -(-old.down.in_features * dim // 16)


@torch.no_grad()
def test_models_that_equal_copies_alone_preserve():
    """A norm of means, or one over all heads: only where all have equally many."""
    for options in (dict(norm="layernorm", tie=True), dict(mixer="gqa:kv_heads=2:qk_norm=all"), dict(mixer="mha:qk_norm=all")):
        model = trained(**options)
        for dim in (32, 48):
            torch.testing.assert_close(grow(model, width=dim)(tokens()), model(tokens()), rtol=0, atol=1e-11)
        with pytest.raises(ValueError, match="^dim: .* multiple of 16"):
            grow(model, width=24)


@torch.no_grad()
def test_unequal_copies_need_the_factor(monkeypatch):
    """Copied as they are, a doubling is exact and a half more is not, since the norm sees another mean of squares."""
    model = trained()
    monkeypatch.setattr(widen, "channels", copies)
    assert (grow(model, width=32)(tokens()) - model(tokens())).abs().max() < 1e-12
    assert (grow(model, width=24)(tokens()) - model(tokens())).abs().max() > 1e-2


def test_a_query_head_is_copied_within_its_group():
    layer = trained(mixer="gqa:heads=6:kv_heads=2:head_dim=4").stack[0].layer
    query, key = widen.inner(layer, 32, 16, None, torch.Generator().manual_seed(0))
    assert key.source.tolist() == [0, 1] and len(query.source) == 12
    assert query.source.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    query, key = widen.inner(trained(mixer="mha").stack[0].layer, 24, 16, None, torch.Generator().manual_seed(0))
    assert key is query and query.source[:4].tolist() == [0, 1, 2, 3] and len({*query.source[4:].tolist()}) == 2


def test_copies():
    made = Copies(torch.tensor([2, 0, 1, 0, 0]), torch.tensor([1.0, 1, 2, 1, 1], dtype=torch.float64))
    assert made.counts.tolist() == [1, 3, 1, 3, 3] and made.added.tolist() == [False, False, False, True, True]
    assert made.written(torch.tensor([10.0, 20.0, 30.0])).tolist() == [30, 10, 40, 10, 10]
    torch.testing.assert_close(made.read(torch.tensor([[3.0, 8.0, 5.0]])), torch.tensor([[5.0, 1, 4, 1, 1]]))
    assert made.blocks(2).source.tolist() == [4, 5, 0, 1, 2, 3, 0, 1, 0, 1] and made.blocks(2).counts.tolist()[2:4] == [3, 3]
    drawn = {tuple(copies(3, 8, torch.Generator().manual_seed(seed)).source.tolist()) for seed in range(20)}
    assert all(c[:6] == (0, 1, 2, 0, 1, 2) and len({*c[6:]}) == 2 for c in drawn) and len(drawn) > 3


@torch.no_grad()
def test_aki_takes_new_rows_from_the_layer_above():
    model = trained(mixer="gqa:kv_heads=2:bias=true", ffn="mlp:width=6")
    fpi, aki = (grow(model, width=24, method=method, seed=3) for method in ("fpi", "aki"))
    assert (aki(tokens()) - model(tokens())).abs().max() > 0.1
    generator = torch.Generator().manual_seed(3)
    stream = widen.channels(16, 24, generator)
    query, _ = widen.inner(model.stack[0].layer, 24, 16, None, generator)
    (neurons,) = widen.inner(model.stack[1].layer, 24, 16, None, generator)
    units = {"query": query.blocks(4), "out": stream, "up": neurons, "down": stream}
    for name, unit in units.items():
        first = 0 if name in ("query", "out") else 1
        for number in (first, first + 2, first + 4):
            ours, theirs = (getattr(made.stack[number].layer, name) for made in (aki, fpi))
            above = getattr(fpi.stack[min(number + 2, first + 4)].layer, name)
            assert unit.added.sum() == len(ours.weight) / 3
            for kind in ("weight", "bias") if ours.bias is not None else ("weight",):
                a, b, c = (getattr(linear, kind) for linear in (ours, theirs, above))
                assert torch.equal(a[~unit.added], b[~unit.added]) and torch.equal(a[unit.added], c[unit.added])
                assert number == first + 4 or not torch.equal(a, b)  # the last layer has none above it
    for sublayer in model.stack[2:]:  # all layers alike: there is nothing else above
        first = model.stack[0 if sublayer.is_mixer else 1]
        sublayer.load_state_dict(first.state_dict())
    fpi, aki = (grow(model, width=24, method=method, seed=3).state_dict() for method in ("fpi", "aki"))
    assert all(torch.equal(tensor, aki[name]) for name, tensor in fpi.items())


def test_copies_stay_copies_unless_the_symmetry_is_broken():
    """After a step of gradient descent neurons of FPI are still equal in pairs; those of AKI never were."""
    for method, equal in (("fpi", True), ("aki", False)):
        made = grow(trained(ffn="swiglu:width=8"), width=32, method=method)
        made(tokens(), tokens()).backward()
        layer = made.stack[1].layer
        with torch.no_grad():
            for parameter in made.parameters():
                parameter -= 1e-4 * parameter.grad
        up, grad = layer.up.weight.detach(), layer.up.weight.grad
        assert grad.abs().max() > 1e-3
        assert torch.allclose(up[:8], up[8:], rtol=0, atol=1e-12) == equal


@pytest.mark.parametrize(
    ("options", "depth", "order", "sources", "lists"),
    [
        (dict(), 6, "interpolate", [0, 0, 1, 1, 2, 2], ("gqa:kv_heads=2", "swiglu")),
        (dict(), 6, "stack", [0, 1, 2, 0, 1, 2], ("gqa:kv_heads=2", "swiglu")),
        (dict(), 4, "interpolate", [0, 0, 1, 2], ("gqa:kv_heads=2", "swiglu")),
        (dict(), 4, "stack", [0, 1, 2, 0], ("gqa:kv_heads=2", "swiglu")),
        (dict(), 3, "stack", [0, 1, 2], ("gqa:kv_heads=2", "swiglu")),
        (dict(stem="ngram:rows=9 mlp", mixer="gqa,none", ffn="mlp,swiglu,mlp"), 6, "interpolate", [0, 0, 1, 1, 2, 2],
         ("gqa,gqa,none,none", "mlp,mlp,swiglu,swiglu")),
        (dict(mixer="gqa,none,mqa", ffn="mlp,none,swiglu"), 4, "stack", [0, 1, 2, 0], ("gqa,none,mqa", "mlp,none,swiglu")),
        (dict(mixer="gqa,mqa"), 5, "stack", [0, 1, 2, 0, 1], ("gqa,mqa,gqa", "swiglu")),
        (dict(stack="ngram:rows=9 gqa+mlp swiglu mqa retention moe:experts=2:top_k=1"), 5, "interpolate", [0, 0, 1, 1, 2],
         "ngram:rows=9 gqa+mlp swiglu gqa+mlp swiglu mqa mqa retention moe:experts=2:top_k=1"),
    ],
)  # fmt: skip
def test_every_layer_is_a_copy_of_its_source(options, depth, order, sources, lists):
    model = trained(**options)
    made = deepen(model, depth, order=order)
    assert ((made.config.mixer, made.config.ffn) if not made.config.stack else made.config.stack) == lists
    stem = {"ngram:rows=9 mlp": 2}.get(options.get("stem"), 1 if "stack" in options else 0)
    layers = [[0, 1], [2, 3], [4, 5]]
    if "stack" in options:
        layers = [[0, 1], [2], [3, 4]]
    elif "none" in options.get("mixer", ""):
        layers = [[0, 1], [2], [3, 4]] if "stem" in options else [[0, 1], [], [2, 3]]
    wanted = [*range(stem), *(stem + number for source in sources for number in layers[source])]
    assert len(made.stack) == len(wanted)
    for number, source in enumerate(wanted):
        ours, theirs = made.stack[number].state_dict(), model.stack[source].state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert all(ours[name].data_ptr() != theirs[name].data_ptr() for name in ours)
    rest = [name for name in model.state_dict() if not name.startswith("stack.")]
    assert all(torch.equal(made.state_dict()[name], model.state_dict()[name]) for name in rest)
    fresh = build_model(made.config)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in made.named_parameters()}
    made(tokens())


def test_orders_at_the_size_of_the_paper():
    """From 32 to 40 layers: every fourth one has its copy beside it."""
    sources = ORDERS["interpolate"](32, 40)
    assert sorted(sources) == sources and [sources.count(n) for n in range(32)] == [2, 1, 1, 1] * 8


def test_a_list_is_as_short_as_it_can_be():
    assert [cycled(list(text)) for text in ("aaaa", "abab", "aba", "abb", "abcab", "a", "")] == [
        "a", "a,b", "a,b", "a,b,b", "a,b,c", "a", "none"
    ]  # fmt: skip


@torch.no_grad()
def test_both_at_once():
    model = trained()
    made = grow(model, width=24, depth=6, order="stack", method="aki", ffn_width=100, seed=5)
    wide = widen.widen(model, 24, method="aki", ffn_width=100, seed=5)
    assert made.config == deepen(wide, 6, order="stack").config == replace(
        model.config, dim=24, heads=6, depth=6, ffn="swiglu:width=100"
    )  # fmt: skip
    assert torch.equal(made(tokens()), deepen(wide, 6, order="stack")(tokens()))
    alone = grow(model, ffn_width=100)
    assert alone.config.ffn == "swiglu:width=100" and (alone(tokens()) - model(tokens())).abs().max() < 1e-12
    assert grow(model, width=16).config == model.config
    assert grow(model.train(), width=32).training and not grow(model.eval(), width=32, depth=4).training
    tables = [grow(model, width=24, seed=seed).embedding.weight for seed in (5, 5, 6)]
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


@pytest.mark.parametrize(
    ("options", "given", "part"),
    [
        (dict(), dict(width=8), "dim: 8 is less than the 16"),
        (dict(), dict(width=18), "dim: 4 heads do not become 18 / 16 times as many; 4 channels a head"),
        (dict(mixer="gqa:heads=8:kv_heads=4"), dict(width=18), "dim: at 18 there are 9 query heads, which 4 key/value heads"),
        (dict(), dict(width=32, method="net2net"), "method: 'net2net' is none of fpi, aki"),
        (dict(depth=1), dict(width=32, method="aki"), "method: aki takes from the next layer"),
        (dict(), dict(ffn_width=3), "ffn_width: 3 neurons are fewer than the 64"),
        (dict(position="alibi"), dict(width=32), "position: 'alibi' knows heads or channels by their number"),
        (dict(mixer="retention"), dict(width=32), "stack: Retention is not among the layers"),
        (dict(ffn="moe"), dict(width=32), "stack: MoE is not among the layers"),
        (dict(norm="crmsnorm"), dict(width=32), "norm: 'crmsnorm' is not among those"),
        (dict(head="transform"), dict(width=32), "head: 'transform' has layers of its own"),
        (dict(), dict(depth=2), "depth: 2 is less than the 3 layers"),
        (dict(depth=0), dict(depth=2), "depth: the model has no layer"),
        (dict(), dict(depth=6, order="random"), "order: 'random' is none of interpolate, stack"),
        (dict(embedding_norm="first"), dict(depth=6), "embedding_norm: 'first' leaves the first layer without a norm"),
    ],
)  # fmt: skip
def test_mistakes(options, given, part):
    with pytest.raises(ValueError, match=f"^({part})"):
        grow(trained(**options), **given)


def test_as_a_command(tmp_path, capsys):
    model, folder = trained(vocab_size=8, seq_len=9).float(), tmp_path / "small"
    folder.mkdir()
    save_model(model, folder)
    call = [str(folder), "--width", "32", "--depth", "6", "--order", "stack", "--method", "aki", "--seed", "3"]
    assert main([*call, "--out", str(tmp_path / "grown")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("6 sublayers, ") and " -> 12 sublayers, " in out and "width 32 (was rmsnorm, 16)" in out
    made, wanted = load_model(tmp_path / "grown"), grow(model, width=32, depth=6, order="stack", method="aki", seed=3)
    assert made.config == wanted.config
    assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in made.state_dict().items())
    run = ["--weights", str(tmp_path / "grown"), "--data", "task:induction:length=8:symbols=4", "--steps", "2"]
    run += ["--eval-every", "0", "--dtype", "float32", "--device", "cpu", "--batch-size", "64", "--out", str(tmp_path / "run")]
    assert train.main(run) == 0
    capsys.readouterr()
    assert main([str(folder), "--depth", "2", "--out", str(tmp_path / "again")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "grow: depth: 2 is less than the 3 layers that there are" and not (tmp_path / "again").exists()
