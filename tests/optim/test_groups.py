"""Who gets which parameter, and several optimizers as one."""

import json

import pytest
import torch
from torch import nn

from optim import AdamW, Combined, Muon, by_parts, flatten_state, split_parameters, unflatten_state


class Block(nn.Module):
    elementwise = ("decay",)

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm((2, dim))
        self.mix = nn.Linear(dim, 2 * dim)
        self.gate = nn.Linear(dim, 1)
        self.heads = nn.Linear(dim, dim, bias=False)
        self.conv = nn.Conv1d(dim, dim, 3)
        self.experts = nn.Parameter(torch.randn(3, dim, dim))
        self.decay = nn.Parameter(torch.randn(dim, 4))
        self.grid = nn.Parameter(torch.randn(2, 2, 2, 2))


class Model(nn.Module):
    def __init__(self, tied, dim=8):
        super().__init__()
        self.tokens = nn.Embedding(16, dim)
        self.positions = nn.Embedding(4, dim)
        self.blocks = nn.ModuleList([Block(dim)])
        self.head = nn.Linear(dim, 16)
        if tied:
            self.head.weight = self.tokens.weight


def names(split):
    return {role: [name for name, _ in pairs] for role, pairs in split._asdict().items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("wrap", [False, True])
def test_parameters_go_by_what_their_module_is(tied, wrap):
    model = nn.ModuleDict({"module": Model(tied)}) if wrap else Model(tied)
    prefix = "module." if wrap else ""
    block = prefix + "blocks.0."
    split = names(split_parameters(model))
    assert split["hidden"] == [block + "experts", block + "mix.weight", block + "heads.weight"]
    assert split["head"] == ([] if tied else [prefix + "head.weight"])
    assert split["embedding"] == [prefix + "tokens.weight", prefix + "positions.weight"]
    vectors = ["decay", "grid", "norm.weight", "norm.bias", "mix.bias", "gate.weight", "gate.bias", "conv.weight"]
    assert split["vector"] == [block + name for name in [*vectors, "conv.bias"]] + [prefix + "head.bias"]
    every = [name for pairs in split.values() for name in pairs]
    assert sorted(every) == sorted(name for name, _ in model.named_parameters())


def test_the_head_may_own_the_shared_tensor():
    model = nn.ModuleDict({"head": nn.Linear(8, 16, bias=False), "tokens": nn.Embedding(16, 8)})
    model["head"].weight = model["tokens"].weight
    assert names(split_parameters(model)) == {"hidden": [], "head": [], "embedding": ["head.weight"], "vector": []}


def test_a_plain_module_works_and_frozen_parameters_stay_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))
    model[0].weight.requires_grad_(False)
    split = split_parameters(model)
    assert names(split) == {"hidden": ["2.weight"], "head": [], "embedding": [], "vector": ["0.bias", "2.bias"]}
    assert split.hidden[0][1] is model[2].weight


def test_fused_matrices_form_groups_of_their_own():
    model = Model(tied=False)
    model.blocks[0].mix.parts = (12, 4)
    groups = by_parts(model, split_parameters(model).hidden)
    found = [([name for name, _ in group["params"]], group["parts"]) for group in groups]
    assert found == [(["blocks.0.experts", "blocks.0.heads.weight"], ()), (["blocks.0.mix.weight"], (12, 4))]
    assert by_parts(model, []) == []
    Muon(groups)


def build():
    torch.manual_seed(0)
    model = Model(tied=False)
    split = split_parameters(model)
    rest = [{"params": split.head}, {"params": split.embedding + split.vector, "weight_decay": 0.0, "lr": 0.004}]
    return model, Combined([Muon(split.hidden, lr=0.02), AdamW(rest, lr=0.001)])


def step(model, optimizer, seed):
    rng = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=rng)
    optimizer.step()


def test_combined_steps_zeroes_and_schedules_all():
    model, optimizer = build()
    assert [group["base_lr"] for group in optimizer.param_groups] == [0.02, 0.001, 0.004]
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * 0.0
    step(model, optimizer, 0)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * 0.5
    step(model, optimizer, 1)
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    calls = []
    assert optimizer.step(lambda: calls.append(1) or torch.tensor(2.0)) == 2.0 and calls == [1]


def test_combined_state_continues_bit_for_bit():
    (model, optimizer), (other, resumed) = build(), build()
    for seed in range(3):
        step(model, optimizer, seed)
    tensors, tree = flatten_state(optimizer.state_dict())
    resumed.load_state_dict(unflatten_state({n: t.clone() for n, t in tensors.items()}, json.loads(json.dumps(tree))))
    other.load_state_dict(model.state_dict())
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, resumed, seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_combined_takes_torch_optimizers_too():
    weight, bias = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))
    optimizer = Combined([torch.optim.SGD([weight], lr=0.5), AdamW([bias], lr=0.1)])
    assert [group["base_lr"] for group in optimizer.param_groups] == [0.5, 0.1]


def test_combined_refuses_a_shared_parameter_and_a_foreign_state():
    weight = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError, match="^optimizers must be without a parameter in common"):
        Combined([Muon([weight]), AdamW([weight])])
    with pytest.raises(ValueError, match="^state_dict must be of 1 optimizers"):
        Combined([Muon([weight])]).load_state_dict({"optimizers": []})


def test_combined_under_a_gradient_scaler_skips_an_overflow():
    model, optimizer = build()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    before = [p.detach().clone() for p in model.parameters()]
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * sum((p**2).sum() for p in model.parameters())).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        changed = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
        assert any(changed) == (factor == 1.0)
    torch.testing.assert_close(model.tokens.weight.grad, 2 * before[0])
