"""Adapted models from and to folders: loaded plain and then adapted, trained, resumed, judged, and made plain."""

import shutil

import pytest
import torch
from torch import nn

import eval as evaluation
import train
from models import Config, build_model
from models.checkpoint import checkpoints, read_tensors
from models.huggingface import export
from models.merge_adapter import main, merged
from models.recast import recast
from models.weights import adapted, load_model, save_model

TASK = "task:induction:length=8:symbols=4"
TINY = dict(
    model="llama-1m",
    vocab_size=8,
    dim=16,
    heads=2,
    depth=2,
    seq_len=9,
    mixer="gqa:kv_heads=1",
    ffn="swiglu:width=24",
    tie=False,
)
RUN = ["--steps", "4", "--eval-every", "0", "--dtype", "float32", "--device", "cpu", "--batch-size", "4", "--data", TASK]


@pytest.fixture
def base(tmp_path):
    """A folder with plain weights."""
    model = build_model(Config.of(**TINY, seed=3), seed=1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    folder = tmp_path / "base"
    folder.mkdir()
    save_model(model, folder)
    return folder


def tokens() -> torch.Tensor:
    return torch.randint(8, (2, 8), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_plain_weights_are_loaded_and_then_adapted(base, tmp_path):
    """Drawn from the config's seed; what was adapted is loaded as it is; and another adapter is refused."""
    plain, config = load_model(base), Config.of(**TINY, adapt="lora:rank=2", seed=5)
    model = load_model(base, config)
    assert model.config == config and torch.equal(model(tokens()), plain(tokens()))
    by_hand = adapted(load_model(base), "lora:rank=2", seed=5)
    assert all(torch.equal(tensor, by_hand.state_dict()[name]) for name, tensor in model.state_dict().items())
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {name for name in model.state_dict() if ".adapter." in name} and len(learning) == 2 * 4 * 2
    for name in learning:
        model.get_parameter(name).normal_()
    folder = tmp_path / "adapted"
    folder.mkdir()
    save_model(model, folder)
    again = load_model(folder)
    assert torch.equal(again(tokens()), model(tokens()))
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == learning
    for other in ("", "lora:rank=3", "lora"):
        with pytest.raises(ValueError, match="^adapt: .*has lora:rank=2 already"):
            load_model(folder, Config.of(**TINY, adapt=other))


def test_a_run_resumes_bit_for_bit_and_touches_nothing_else(base, tmp_path, capsys):
    flags = ["--weights", str(base), "--adapt", "lora:rank=2:targets=query+down", "--save-every", "2", *RUN]
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(checkpoints(tmp_path / "parts")[-1])  # as if it had been stopped at step 2
    assert train.main(["--resume", str(tmp_path / "parts")]) == 0
    for file in ("model.safetensors", "optimizer.safetensors"):
        end, resumed = (read_tensors(checkpoints(tmp_path / run)[-1] / file) for run in ("parts", "whole"))
        assert resumed.keys() == end.keys() and all(torch.equal(resumed[name], end[name]) for name in end)
    end = read_tensors(checkpoints(tmp_path / "whole")[-1] / "model.safetensors")
    before = read_tensors(base / "model.safetensors")
    assert before.keys() == {name for name in end if ".adapter." not in name}
    assert all(torch.equal(end[name], tensor) for name, tensor in before.items())
    assert all(end[name].any() for name in end if ".adapter." in name) and len(end) - len(before) == 2 * 2 * 2
    capsys.readouterr()
    assert evaluation.main(["task", "--checkpoint", str(tmp_path / "whole"), "--device", "cpu"]) == 0
    assert "9" in capsys.readouterr().out


def test_made_plain(base, tmp_path, capsys):
    """By the command: the same logits, no adapter in the configuration, tensors of the names there were; not twice."""
    model = adapted(load_model(base), "lora:rank=2")
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            nn.init.normal_(parameter)
    folder, out = tmp_path / "adapted", tmp_path / "made"
    folder.mkdir()
    save_model(model, folder)
    assert main([str(folder), "--out", str(out)]) == 0
    made = load_model(out)
    assert made.config.adapt == "" and made.state_dict().keys() == load_model(base).state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(made(tokens()), model(tokens()), rtol=1e-5, atol=1e-5)
    assert (made(tokens()) - load_model(base)(tokens())).abs().max() > 0.1
    assert model.config.adapt and any(".adapter." in name for name in model.state_dict())  # a copy was merged
    capsys.readouterr()
    assert main([str(out), "--out", str(tmp_path / "again")]) == 2
    assert "not adapted" in capsys.readouterr().err and not (tmp_path / "again").exists()


def test_only_a_plain_model_is_exported_or_recast(base, tmp_path):
    model = adapted(load_model(base), "lora:rank=2")
    with pytest.raises(ValueError, match="^export: .*merge_adapter"):
        export(model, tmp_path / "published")
    export(merged(model), tmp_path / "published")
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "published")(tokens()), model(tokens()))
    with pytest.raises(ValueError, match="^adapt: .*merge_adapter"):
        recast(model, "rmsnorm", [], [], torch.eye(16))


@torch.no_grad()
def test_published_weights_are_adapted(base, tmp_path):
    export(load_model(base), tmp_path / "published")
    model = load_model(tmp_path / "published", Config.of(**TINY, adapt="lora:rank=2"))
    assert model.config.adapt == "lora:rank=2" and torch.equal(model(tokens()), load_model(base)(tokens()))
    assert any(".adapter." in name for name in model.state_dict())


def test_a_run_from_published_weights_goes_on_as_it_began(base, tmp_path, capsys):
    """Its checkpoints know the data, the steps and the adapter, and a flag that asks for another model is refused."""
    export(load_model(base), tmp_path / "published")
    for flags in ([], ["--adapt", "lora:rank=2"]):
        out = tmp_path / f"run{len(flags)}"
        assert train.main(["--weights", str(tmp_path / "published"), *flags, *RUN, "--save-every", "2", "--out", str(out)]) == 0
        end = read_tensors(checkpoints(out)[-1] / "model.safetensors")
        shutil.rmtree(checkpoints(out)[-1])
        assert train.main(["--resume", str(out)]) == 0
        resumed = read_tensors(checkpoints(out)[-1] / "model.safetensors")
        assert checkpoints(out)[-1].name == "step-000004" and all(torch.equal(resumed[name], end[name]) for name in end)
    capsys.readouterr()
    for flags in (["--norm", "layernorm"], ["--dim", "32"], ["--mixer", "mha"]):
        assert train.main(["--weights", str(tmp_path / "published"), *flags, *RUN]) == 2
        assert "weights: " in capsys.readouterr().err


def test_bad_input_is_one_line_and_status_2(base, capsys):
    for flags, message in (
        (["--adapt", "lora"], "adapt: "),
        (["--adapt", "lora:rank=0", "--weights", str(base)], "rank: "),
        (["--adapt", "lora:targets=heads", "--weights", str(base)], "targets: "),
        (["--adapt", "lota", "--weights", str(base)], "unknown adapter 'lota' (did you mean 'lora'?)"),
    ):
        assert train.main([*flags, *RUN]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err
