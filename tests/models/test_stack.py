"""A stack spelled in words: its grammar, and the residual sublayers it is made of."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models import Config, LanguageModel
from models.stack import MIXERS, SUBLAYERS, Residual, layers, parse_stack
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
    from nn.attention import ATTENTION
    from nn.ffn import FFNS

    assert len(SUBLAYERS) == len(MIXERS) + len(FFNS) and ATTENTION.items() <= MIXERS.items()


@pytest.mark.parametrize("place", ["pre", "post"])
def test_residual(place):
    torch.manual_seed(0)
    sublayer = Residual("mlp", 8, norm="layernorm", norm_place=place, heads=2)
    nn.init.normal_(sublayer.norm.weight)
    x = torch.randn(2, 3, 8)
    context = Context(torch.zeros(2, 3, dtype=torch.int64), torch.arange(3))
    expected = (
        x + sublayer.layer(sublayer.norm(x), context) if place == "pre" else sublayer.norm(x + sublayer.layer(x, context))
    )
    assert torch.equal(sublayer(x, context), expected)
