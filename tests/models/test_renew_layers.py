"""The last layers begin anew, all else stays as it was trained."""

import pytest
import torch
from torch import nn

from models import Config, build_model
from models.renew_layers import main, renew
from models.weights import load_model, save_model

TINY = dict(vocab_size=40, dim=16, heads=2, depth=4, seq_len=24)
LAST = {  # options of a model: the sublayers of its last one and its last three layers
    "default": (dict(), {7, 8}, {3, 4, 5, 6, 7, 8}),  # behind the stem
    "gpt2": (dict(model="gpt2"), {6, 7}, {2, 3, 4, 5, 6, 7}),
    "mixers alone": (dict(model="gpt2", ffn="none"), {3}, {1, 2, 3}),
    "spelled out": (dict(stack="mha mlp mha mqa swiglu swiglu"), {5}, {2, 3, 4, 5}),  # an ffn behind an ffn is a layer
}


def trained(**options):
    model = build_model(Config.of(**TINY | options), seed=1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=3.0)
    return model


@pytest.mark.parametrize("case", LAST)
def test_what_begins_anew(case):
    options, one, three = LAST[case]
    model = trained(**options)
    before, drawn = model.state_dict(), build_model(model.config, seed=5).state_dict()
    for top, sublayers in ((1, one), (3, three)):
        for name, tensor in renew(model, top, seed=5).state_dict().items():
            new = name.startswith("stack.") and int(name.split(".")[1]) in sublayers
            assert torch.equal(tensor, (drawn if new else before)[name]), name


def test_as_a_command(tmp_path, capsys):
    model, folder = trained(), tmp_path / "trained"
    folder.mkdir()
    save_model(model, folder)
    assert main([str(folder), "--top", "2", "--seed", "3", "--out", str(tmp_path / "made")]) == 0
    made, wanted = load_model(tmp_path / "made").state_dict(), renew(model, 2, seed=3).state_dict()
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)
    assert main([str(folder), "--top", "5", "--out", str(tmp_path / "again")]) == 2
    assert "top: 5 of 4 layers" in capsys.readouterr().err and not (tmp_path / "again").exists()
