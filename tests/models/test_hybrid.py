"""Where attention and MLPs stand in a hybrid stack, and its spelling."""

from fractions import Fraction

import pytest
import torch

from models import Config, LanguageModel
from models.hybrid import SUBLAYERS, hybrid_pattern, main, spelled
from models.stack import parse_stack

PUBLISHED = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"


def test_the_published_pattern(capsys):
    assert hybrid_pattern(56, 0.08, 0.5) == PUBLISHED
    assert main(["56", "0.08", "0.5"]) == 0 and capsys.readouterr().out == PUBLISHED + "\n"
    assert [PUBLISHED.count(letter) for letter in "M*-"] == [24, 4, 28]


def walked(layers: int, attention: int, mlps: int) -> str:
    """The same by walking: a sublayer gives way as soon as less than half of a stretch is left of those before it."""
    pattern = ["M"] * layers
    for letter, count, stretches in (("*", attention, attention + 1), ("-", mlps, mlps)):
        places = [i for i, found in enumerate(pattern) if found == "M"]
        stretch = Fraction(len(places) - count, max(1, stretches))
        left = stretch
        for place in places:
            if 2 * left < 1 and pattern.count(letter) < count:
                pattern[place], left = letter, left + stretch
            else:
                left -= 1
    return "".join(pattern)


@pytest.mark.parametrize("attention_ratio", [0, 0.05, 0.08, 0.25, 0.5])
@pytest.mark.parametrize("mlp_ratio", [0, 0.1, 0.25, 0.5])
def test_shares_and_places(attention_ratio, mlp_ratio):
    for layers in (1, 2, 8, 14, 24, 48, 56, 97):
        attention, mlps = round(layers * attention_ratio), round(layers * mlp_ratio)
        pattern = hybrid_pattern(layers, attention_ratio, mlp_ratio)
        assert pattern == walked(layers, attention, mlps)
        assert [pattern.count(letter) for letter in "*-M"] == [attention, mlps, layers - attention - mlps]
        if 0 < mlps < layers - attention:
            assert pattern.endswith("-")


def test_spelled_as_a_stack(capsys):
    assert parse_stack(spelled("M-*")) == ["mamba2:groups=8", "mlp:activation=gelu", "gqa:kv_heads=8"]
    assert spelled("M*", {"M": "mamba", "*": "mqa"}) == "mamba mqa"
    assert main(["8", "0.1", "0.5", "--stack"]) == 0
    specs = parse_stack(capsys.readouterr().out)
    assert [specs.count(SUBLAYERS[letter]) for letter in "M*-"] == [3, 1, 4]
    small = dict(zip("M*-", ("mamba2:state=64", "gqa:kv_heads=2", "mlp:activation=gelu"), strict=True))
    assert parse_stack(Config.of(model="mamba2-hybrid").stack) == parse_stack(spelled(hybrid_pattern(14, 0.08, 0.5), small))


def test_the_preset_is_a_model():
    model = LanguageModel(Config.of(model="mamba2-hybrid", dim=64, vocab_size=11))
    assert [s.is_mixer for s in model.stack] == [letter != "-" for letter in hybrid_pattern(14, 0.08, 0.5)]


@pytest.mark.parametrize(("numbers", "argument"), [((8, 0.6, 0.6), "mlp_ratio"), ((8, -0.1, 0), "attention_ratio"),
                                                   ((-1, 0, 0), "layers"), ((8, 0, float("nan")), "mlp_ratio")])  # fmt: skip
def test_impossible_shares(numbers, argument, capsys):
    with pytest.raises(ValueError, match=f"^{argument}: "):
        hybrid_pattern(*numbers)
    assert main(["--", *map(str, numbers)]) == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_an_unknown_letter():
    with pytest.raises(ValueError, match=r"^pattern: 'x' is none of M, \*, -$"):
        spelled("M-x")


def test_nemotron_h_is_its_published_pattern_and_size():
    """8.10 billion parameters: what the published tensors sum to."""
    pattern = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
    words = {"M": "mamba2:groups=8", "*": "gqa:kv_heads=8", "-": "mlp:activation=relu2:width=21504"}
    config = Config.of(model="nemotron-h-8b")
    assert parse_stack(config.stack) == parse_stack(spelled(pattern, words))
    with torch.device("meta"):
        model = LanguageModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_100_852_736
