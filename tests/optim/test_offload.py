"""A step on the host is the step on the device, bit for bit; what moves is counted; checkpoints fit both ways."""

import json

import pytest
import torch
from torch import nn

import train
from models.checkpoint import checkpoints, read_tensors
from models.log import read
from optim import OPTIMIZERS, AdamW, Combined, Muon, flatten_state, unflatten_state
from optim.offload import host_of
from tests.optim.test_groups import Model, step
from tests.optim.test_optimizers import assert_equal, make_params, random_grads, run
from tests.processes import printed_by

every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])


def beside(optimizer, dtype, seed=0):
    """The same parameters twice, in two groups each, with their optimizers: here, and on the host with its count of bytes."""
    sides = []
    for _ in range(2):
        params = make_params(optimizer, dtype, seed)
        groups = [dict(params=params[:3]), dict(params=params[3:], lr=0.004, weight_decay=0.3)]
        sides.append((params, Combined([optimizer(groups, lr=0.03)])))
    (ours, here), (theirs, there) = sides
    return ours, here, theirs, there, there.offload()


@every_optimizer
@every_dtype
def test_a_step_on_the_host_is_the_step_on_the_device(optimizer, dtype):
    ours, here, theirs, there, moved = beside(optimizer, dtype)
    for number in range(6):
        for params, built in ((ours, here), (theirs, there)):
            random_grads(params, seed=number)
            for param in params[:: 1 + number % 2]:
                param.grad = param.grad if number % 3 else None
            for group in built.param_groups:
                group["lr"] = group["base_lr"] * (1 + number) / 6
            built.step()
        assert_equal(ours, theirs)
        assert flatten_state(here.state_dict())[1] == flatten_state(there.state_dict())[1]
    assert_equal(flatten_state(here.state_dict())[0].values(), flatten_state(there.state_dict())[0].values())
    assert min(moved.values()) > 0


@every_optimizer
@every_dtype
def test_what_moves_is_the_gradient_down_and_as_many_numbers_up(optimizer, dtype):
    *_, params, built, moved = beside(optimizer, dtype)
    random_grads(params[1:], seed=0)
    built.step()
    numbers = sum(param.numel() for param in params[1:])
    up = dtype if optimizer.elementwise else torch.promote_types(dtype, torch.float32)  # the parameter, or a step of it
    assert moved == dict(down=numbers * dtype.itemsize, up=numbers * up.itemsize)
    built.zero_grad()
    assert all(param.grad is None for param in params)
    built.step()
    assert moved == dict(down=numbers * dtype.itemsize, up=numbers * up.itemsize)


def test_the_host_is_the_cpu():
    """For every device; only parameters that have no numbers, as those of a model that is being planned, stay as they are."""
    assert {str(host_of(torch.device(name))) for name in ("cpu", "cuda", "cuda:1", "mps")} == {"cpu"}
    assert host_of(torch.device("meta")).type == "meta"


@every_optimizer
def test_state_is_where_the_host_is(optimizer):
    *_, params, built, _ = beside(optimizer, torch.bfloat16)
    run(built, params, 2)
    found = [v for v in flatten_state(built.state_dict())[0].values() if isinstance(v, torch.Tensor)]
    assert found and all(tensor.device == host_of(params[0].device) for tensor in found)
    (inner,) = built.optimizers
    empty = inner.first_state(torch.empty(3, 3, device="meta"))
    assert {v.device.type for v in empty.values() if isinstance(v, torch.Tensor)} == {"meta"}


@every_optimizer
@every_dtype
@pytest.mark.parametrize("first, second", [(0, 1), (1, 0), (1, 1)])
def test_a_state_goes_on_elsewhere_bit_for_bit(optimizer, dtype, first, second):
    ours, here, theirs, there, _ = beside(optimizer, dtype)
    whole, whole_run = [(ours, here), (theirs, there)][first]
    run(whole_run, whole, 3)
    tensors, tree = flatten_state(whole_run.state_dict())
    others = [(params, built) for params, built in (beside(optimizer, dtype)[:2], beside(optimizer, dtype)[2:4])]
    params, built = others[second]
    run(built, params, 1)  # so that there are copies of other numbers
    for param, now in zip(params, whole, strict=True):
        param.data.copy_(now.data)
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    built.load_state_dict(unflatten_state(saved, json.loads(json.dumps(tree))))
    run(whole_run, whole, 3, start=3)
    run(built, params, 3, start=3)
    assert_equal(whole, params)


def test_a_model_of_several_optimizers_under_a_gradient_scaler():
    """An overflow is skipped, and nothing moves for it; else the steps are those of the device."""
    models, runs = [], []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Model(tied=True))
        matrices = [p for p in models[-1].parameters() if p.ndim == 2]
        rest = [p for p in models[-1].parameters() if p.ndim != 2]
        runs.append(Combined([Muon(matrices), AdamW(rest)]))
    moved = runs[1].offload()
    for model, optimizer in zip(models, runs, strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
        for factor in (float("inf"), 1.0, 2.0):
            optimizer.zero_grad()
            scaler.scale(factor * sum((p**2).sum() for p in model.parameters())).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            if optimizer is runs[1] and factor == float("inf"):
                assert moved == dict(down=0, up=0)
    assert_equal(models[0].parameters(), models[1].parameters())
    step(models[0], runs[0], 7)
    step(models[1], runs[1], 7)
    assert_equal(models[0].parameters(), models[1].parameters())


def test_offload_is_asked_for_at_the_beginning_and_of_ours():
    weight = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError, match="^offload must be asked of optimizers of ours, not 'SGD'$"):
        Combined([torch.optim.SGD([weight], lr=0.5)]).offload()
    built = Combined([AdamW([weight])])
    run(built, [weight], 1)
    with pytest.raises(ValueError, match="^offload must be asked for before the first step"):
        built.offload()


def test_parts_of_parameters_step_on_the_host_as_on_the_device():
    """Two processes, each mesh with and without offload; then a checkpoint of one goes on on another, the other way."""
    lines = printed_by(2, "tests.optim.offload_processes", "fsdp=2", "tp=2")
    assert lines == [f"{mesh}: equal" for mesh in ("fsdp=2", "tp=2")]


def test_the_flag_is_listed(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert "--offload, --no-offload" in capsys.readouterr().out


@pytest.mark.parametrize("first", [True, False])
def test_a_run_changes_sides_and_ends_as_if_it_had_not(first, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(4):
        (text / f"{number}.txt").write_text("".join(chr(97 + (i * i + number) % 23) for i in range(1000)))
    flags = ["--tokenizer", "byte", "--dim", "16", "--depth", "1", "--heads", "2", "--seq-len", "16", "--data", str(text),
             "--batch-size", "4", "--device", "cpu", "--eval-every", "0", "--sample", "1", "--schedule", "wsd:decay=0.01",
             "--clip", "1", "--dtype", "float32"]  # fmt: skip
    words = {True: "--offload", False: "--no-offload"}
    assert train.main([*flags, "--steps", "4", "--out", str(tmp_path / "one")]) == 0
    run = str(tmp_path / "run")
    assert train.main([*flags, "--steps", "2", "--out", run, words[first]]) == 0
    assert train.main(["--resume", run, "--steps", "4", words[not first]]) == 0
    losses = [[r["loss"] for r in read(tmp_path / name / "log.jsonl") if "loss" in r] for name in ("one", "run")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    for file in ("model", "optimizer"):
        one, other = (read_tensors(checkpoints(tmp_path / name)[-1] / f"{file}.safetensors") for name in ("one", "run"))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
