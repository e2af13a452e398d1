"""Attention is exchanged, everything that fits is kept bit for bit."""

import pytest
import torch
from torch import nn

from models import Config, build_model
from models.linearize import kinds, linearize, main, numbered, unmatched
from models.weights import load_model, save_model

TINY = dict(vocab_size=40, dim=16, heads=2, depth=4, seq_len=24, stem="")


def trained(**options):
    model = build_model(Config.of(**TINY | options), seed=1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.train()


CASES = {  # options of the model, the mixer, the layers: the sublayers, and the kinds of tensors that are new
    "all": (dict(mixer="gqa", ffn="mlp"), "retention:expand=1", "all", ["retention:expand=1", "mlp"] * 4, "layer.gate.weight"),
    "ends": (
        dict(mixer="gqa,mha", ffn="mlp", stem="ngram"), "retention:expand=1", "first,last",
        ["ngram", "retention:expand=1", "mlp", "mha", "mlp", "gqa", "mlp", "retention:expand=1", "mlp"], "layer.gate.weight",
    ),
    "some have none": (
        dict(mixer="gqa:kv_heads=1,gla", ffn="none"), "gqa:window=3", "all",
        ["gqa:window=3:kv_heads=1", "gla", "gqa:window=3:kv_heads=1", "gla"], "none",
    ),
    "some are missing": (
        dict(mixer="none,gqa", ffn="mlp,none", depth=5), "gqa:gate=true", "2",
        ["mlp", "gqa:gate=true", "mlp", "gqa", "mlp"], "layer.gate.weight",
    ),
    "spelled out": (
        dict(stack="(gqa mlp)*2 mqa swiglu mamba mlp"), "gqa:sinks=true", "2-3",
        ["gqa", "mlp", "gqa:sinks=true", "mlp", "gqa:sinks=true:kv_heads=1", "swiglu", "mamba", "mlp"], "layer.sinks",
    ),
    "side by side": (
        dict(mixer="gqa:bias=true:head_dim=6:softcap=3+mlp", ffn="none"), "mha:head_dim=4", "1",
        ["mha:head_dim=4:bias=true+mlp", *["gqa:bias=true:head_dim=6:softcap=3+mlp"] * 3],
        ", ".join(f"layer.branches.0.{n}" for n in ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight",
                                                    "value.bias", "out.weight")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_changes_and_what_is_kept(case):
    options, mixer, layers, specs, new = CASES[case]
    model = trained(**options)
    made = linearize(model, mixer, layers=layers, seed=5)
    assert made.specs == specs and made.training and kinds(unmatched(made, model)) == new
    ours, before, drawn = made.state_dict(), model.state_dict(), build_model(made.config, seed=5).state_dict()
    for name, tensor in ours.items():
        fits = name in before and before[name].shape == tensor.shape
        assert torch.equal(tensor, (before if fits else drawn)[name]), name
    made.embedding.weight.data.zero_()
    assert model.embedding.weight.any()  # copies


def test_options_reach_the_layers():
    model = trained(mixer="gqa:qk_norm=head:window=3:kv_heads=1", ffn="mlp")
    made = linearize(model, "gqa:window=5")
    assert [(s.layer.window, s.layer.qk_norm, s.layer.kv_heads) for s in made.stack[::2]] == [(5, "head", 1)] * 4
    tokens = torch.arange(3)[None]  # shorter than either window
    assert torch.equal(made(tokens), model(tokens)) and made.config.mixer == "gqa:window=5:qk_norm=head:kv_heads=1"


@pytest.mark.parametrize(
    ("options", "mixer", "layers", "part"),
    [
        (dict(), "gqq", "all", "unknown mixer 'gqq'"),
        (dict(), "gla:nonsense=3", "all", "has no option 'nonsense'"),
        (dict(mixer="gla"), "retention", "all", "mixer: no layer has attention, in whose place 'retention'"),
        (dict(mixer="gqa,gla"), "retention", "1,2", "layers: layer 2 has no attention; 1, 3 have"),
        (dict(), "retention", "5", "layers: '5' is none of 1 to 4"),
        (dict(), "retention", "0", "layers: '0' is none of"),
        (dict(), "retention", "3-2", "layers: '3-2' is none of"),
        (dict(), "retention", "1-2-3", "layers: '1-2-3' is none of"),
        (dict(), "retention", "first,second", "layers: 'second' is none of"),
        (dict(mixer="gqa:heads=3:head_dim=5"), "gla", "all", "expand_k: 0.5 times 16 numbers do not divide into 3"),
    ],
)
def test_mistakes(options, mixer, layers, part):
    with pytest.raises(ValueError, match=part):
        linearize(trained(**dict(mixer="gqa") | options), mixer, layers=layers)


def test_numbers():
    assert numbered("last,first, 3-4", 6) == [1, 3, 4, 6] and numbered("2-last", 4) == [2, 3, 4]


def test_as_a_command(tmp_path, capsys):
    model, folder = trained(mixer="gqa:bias=true:sinks=true", ffn="mlp"), tmp_path / "trained"
    folder.mkdir()
    save_model(model, folder)
    call = [str(folder), "--mixer", "retention:expand=1", "--layers", "2-3", "--seed", "3"]
    assert main([*call, "--out", str(tmp_path / "made")]) == 0
    out = capsys.readouterr().out
    assert "36 tensors copied, 2 new: layer.gate.weight; left behind: layer.sinks, layer.query.bias, " in out
    assert "\ngqa:bias=true:sinks=true -> retention:expand=1\n" in out
    made, wanted = load_model(tmp_path / "made"), linearize(model, "retention:expand=1", layers="2-3", seed=3).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in made.state_dict().items())
    assert main([*call[:-2], "--mixer", "gqq", "--out", str(tmp_path / "again")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("linearize: unknown mixer 'gqq'") and not (tmp_path / "again").exists()
