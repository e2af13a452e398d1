"""A stack spelled in words: its grammar, and the residual sublayers it is made of."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models import Config, LanguageModel
from models.residual import PLACES, Residual, make_sublayer
from models.stack import MIXERS, SUBLAYERS, layer_numbers, layers, parse_stack
from nn.context import Context


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []), ("   ", []), ("gqa", ["gqa"]), ("gqa mlp", ["gqa", "mlp"]), ("gqa*3", ["gqa"] * 3), ("gqa * 2", ["gqa"] * 2),
        ("(gqa mlp)*2", ["gqa", "mlp"] * 2), ("(gqa)", ["gqa"]), ("(gqa mlp) swiglu", ["gqa", "mlp", "swiglu"]),
        ("gqa*0 mlp", ["mlp"]),
        ("((gqa mlp)*2 mha)*2", ["gqa", "mlp", "gqa", "mlp", "mha"] * 2),
        ("(gqa(mlp)*2)*2mha", ["gqa", "mlp", "mlp"] * 2 + ["mha"]),
        ("none gqa none*5", ["gqa"]), ("(none)*3", []),
        ("gqa:kv_heads=2:bias=true mlp:width=8*2", ["gqa:kv_heads=2:bias=true"] + ["mlp:width=8"] * 2),
        ("\n(gqa\tmlp)\n*2\n", ["gqa", "mlp"] * 2), ("gqa*9999", ["gqa"] * 9999),
    ],
)  # fmt: skip
def test_grammar(text, expected):
    assert parse_stack(text) == expected


TREES = st.recursive(
    st.sampled_from(["gqa", "mlp", "none"]),
    lambda t: st.tuples(st.lists(t, min_size=1, max_size=3), st.integers(0, 3)),
    max_leaves=8,
)


def spelled(tree) -> str:
    return tree if isinstance(tree, str) else f"({' '.join(map(spelled, tree[0]))})*{tree[1]}"


def written_out(tree) -> list[str]:
    if isinstance(tree, str):
        return [tree] if tree != "none" else []
    return [spec for item in tree[0] for spec in written_out(item)] * tree[1]


@given(TREES)
@settings(max_examples=100, deadline=None)
def test_any_nesting(tree):
    assert parse_stack(spelled(tree)) == written_out(tree)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("(gqa", "a ) is missing"), ("gqa)", "a ) too many"), ("gqa*x", "'*'"), ("*2", "'*'"), ("gqa*", "'*'"),
        ("gqq", "unknown sublayer 'gqq'"),
        ("gqa*20000", "'0'"), ("(gqa*9999)*2", "more than 10000"), ("(mlp:witdh=3)*2", "did you mean 'width'?"),
        ("gqa,mlp", "unknown sublayer 'gqa,mlp'"),
    ],
)  # fmt: skip
def test_mistakes(text, part):
    with pytest.raises(ValueError) as caught:
        parse_stack(text)
    assert part in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("mixer", "ffn", "depth", "expected"),
    [
        ("gqa", "mlp", 2, ["gqa", "mlp"] * 2), ("gqa,mqa", "mlp", 3, ["gqa", "mlp", "mqa", "mlp", "gqa", "mlp"]),
        ("gqa,mqa,mha", "mlp,swiglu", 4, ["gqa", "mlp", "mqa", "swiglu", "mha", "mlp", "gqa", "swiglu"]),
        ("none", "mlp", 2, ["mlp"] * 2), ("gqa,none", "none,mlp", 2, ["gqa", "mlp"]), ("none", "none", 5, []),
        ("gqa", "mlp", 0, []),
    ],
)  # fmt: skip
def test_lists_cycle_over_the_depth(mixer, ffn, depth, expected):
    assert layers(mixer, ffn, depth) == expected


@pytest.mark.parametrize(
    ("mixer", "ffn", "part"),
    [("mlp", "mlp", "unknown mixer 'mlp'"), ("gqa", "gqa", "unknown ffn 'gqa'"), ("gqa,", "mlp", "unknown mixer ''")],
)
def test_lists_hold_only_their_kind(mixer, ffn, part):
    with pytest.raises(ValueError, match=part):
        layers(mixer, ffn, 1)


def test_stack_and_lists_make_the_same_model():
    fields = dict(vocab_size=5, dim=16, heads=2)
    one = LanguageModel(Config.of(**fields, stem="ngram:rows=9", mixer="gqa:qk_norm=unit,mha", ffn="mlp", depth=4))
    other = LanguageModel(Config.of(**fields, stack="ngram:rows=9 (gqa:qk_norm=unit mlp mha mlp)*2"))
    assert str(one) == str(other)


@pytest.mark.parametrize("stack", ["none", "mlp", "gqa", "gqa gqa mlp (mlp gqa)*2"])
def test_any_stack_runs(stack):
    model = LanguageModel(Config.of(vocab_size=5, dim=16, heads=2, stack=stack))
    assert [s.is_mixer for s in model.stack] == [spec in MIXERS for spec in parse_stack(stack)]
    tokens = torch.arange(5)[None]
    state = model.init_state(1, 5)
    assert model(tokens, state=state).shape == (1, 5, 5)
    model(tokens, tokens).backward()


def test_names_of_mixers_and_ffns_do_not_clash():
    from models.stack import FFNS
    from nn.attention import ATTENTION

    assert len(SUBLAYERS) == len(MIXERS) + len(FFNS) and ATTENTION.items() <= MIXERS.items()


X = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
FORMULAS = {
    "pre": lambda f, norm, _: X + f(norm(X)),
    "scaled": lambda f, norm, _: X + f(norm(X) / math.sqrt(4)),
    "sandwich": lambda f, norm, second: X + second(f(norm(X))),
    "output": lambda f, norm, _: X + norm(f(X)),
    "post": lambda f, norm, _: norm(X + f(X)),
    "deepnorm": lambda f, norm, _: norm(14**0.25 * X + f(X)),
}


@pytest.mark.parametrize("place", PLACES)
def test_residual(place):
    torch.manual_seed(0)
    layer = make_sublayer("mlp", SUBLAYERS, 8)
    sublayer = Residual(layer, 8, norm="layernorm", place=place, number=4, sublayers=14).double()
    for norm in (sublayer.norm, sublayer.second_norm):
        if norm is not None:
            nn.init.normal_(norm.weight)
    context = Context(torch.zeros(2, 3, dtype=torch.int64), torch.arange(3))
    expected = FORMULAS[place](lambda x: layer(x, context), sublayer.norm, sublayer.second_norm)
    torch.testing.assert_close(sublayer(X, context), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("place", PLACES)
def test_every_place_trains_and_is_normed_at_the_end(place):
    fields = dict(vocab_size=5, dim=16, heads=2, depth=2, stem="")
    model = LanguageModel(Config.of(**fields, norm="rmsnorm:gain=false", norm_place=place))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    seen = []
    model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.arange(5)[None])
    torch.testing.assert_close(seen[0].square().mean(-1), torch.ones(1, 5), rtol=1e-4, atol=0)
    model(torch.arange(5)[None], torch.arange(5)[None]).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("specs", "numbers"),
    [
        (["gqa", "mlp", "gqa", "mlp"], [1, 1, 2, 2]), (["ngram", "gqa", "mlp", "mlp", "gqa"], [1, 1, 1, 2, 3]),
        (["gqa+mlp", "gqa+mlp"], [1, 2]), (["mlp", "mlp"], [1, 2]), (["gqa", "gqa", "mlp"], [1, 2, 2]), ([], []),
    ],
)  # fmt: skip
def test_layer_numbers(specs, numbers):
    assert layer_numbers(specs) == numbers


def residual_variance(place: str, depth: int = 32, dim: int = 256) -> float:
    """Of the stream after `depth` layers whose sublayers are random rotations of what they read."""
    torch.manual_seed(0)
    x = torch.randn(64, dim, dtype=torch.float64)
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    for number in range(1, depth + 1):
        layer = nn.Linear(dim, dim, bias=False, dtype=torch.float64)
        nn.init.orthogonal_(layer.weight)
        layer.forward = lambda x, context, layer=layer: nn.functional.linear(x, layer.weight)
        x = Residual(layer, dim, norm="rmsnorm:eps=0", place=place, number=number).double()(x, None)
    return x.square().mean().item()


def test_layernorm_scaling_tames_the_variance():
    """1 + L after L unit sublayers before a norm, 1 + sum 1/l with LayerNorm Scaling (Sun et al. 2025, section 3)."""
    assert residual_variance("pre") == pytest.approx(33, rel=0.1)
    assert residual_variance("scaled") == pytest.approx(1 + sum(1 / i for i in range(1, 33)), rel=0.1)


def test_side_by_side():
    """x + attention(norm(x)) + mlp(norm(x)) with one norm; with the attention's output at zero the mlp alone is left."""
    fields = dict(vocab_size=5, dim=16, heads=2, depth=2, stem="", position="none")
    model = LanguageModel(Config.of(**fields, mixer="gqa+mlp:width=8", ffn="none")).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    block, x = model.stack[0], torch.randn(1, 3, 16, dtype=torch.float64)
    context = Context(torch.zeros(1, 3, dtype=torch.int64), torch.arange(3))
    mixer, ffn = block.layer.branches
    torch.testing.assert_close(block(x, context), x + mixer(block.norm(x), context) + ffn(block.norm(x), context))
    nn.init.zeros_(mixer.out.weight)
    torch.testing.assert_close(block(x, context), x + ffn(block.norm(x), context))


@torch.no_grad()
def test_side_by_side_decodes():
    model = LanguageModel(Config.of(vocab_size=5, dim=16, heads=2, stack="(mqa+swiglu)*2 mlp+mlp"))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert [s.is_mixer for s in model.stack] == [True, True, False]
    tokens, state = torch.tensor([[0, 3, 1, 4, 2]]), model.init_state(1, 5)
    parts = [model(part, state=state) for part in tokens.split([2, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("stack", "part"),
    [("gqa+gqa", "2 mixers side by side"), ("gqa+", "unknown sublayer 'gqa+'"), ("gqa+mlq", "unknown sublayer 'mlq'")],
)
def test_side_by_side_mistakes(stack, part):
    with pytest.raises(ValueError, match=part.replace("+", r"\+")):
        LanguageModel(Config.of(vocab_size=5, dim=16, heads=2, stack=stack))
