"""ZeRO: the same parameters as one process at each stage, a share of the bytes, and no more sent than the paper says."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from optim import AdamW
from optim.parallel.zero import Zero, held_bytes
from tests.processes import printed_by


@pytest.fixture(scope="module", autouse=True)
def group():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_table_of_the_paper():
    """Figure 1: 7.5 billion parameters on 64 ranks, in GB."""
    assert [round(held_bytes(7.5e9, 64, stage) / 1e9, 1) for stage in range(4)] == [120.0, 31.4, 16.6, 1.9]


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_equal_one(ranks):
    """See tests/optim/zero_processes.py."""
    lines = printed_by(ranks, "tests.optim.zero_processes")
    assert lines == [f"{ranks} ranks"]


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = (nn.Linear(3, 3, dtype=torch.float64) for _ in range(3))
        self.second.weight = self.first.weight  # of no one unit
        self.unused.bias.requires_grad_(False)

    def forward(self, x):
        return self.second(self.first(x).tanh()).square().sum()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parameters_that_are_shared_unused_or_frozen(stage):
    torch.manual_seed(0)
    ours, plain = Layers(), Layers()
    plain.load_state_dict(ours.state_dict())
    frozen = plain.unused.bias.clone()
    zero = Zero(ours, lambda groups: AdamW(groups, lr=0.01), stage=stage, units=[ours.first, ours.second])
    optimizer = AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.01)
    assert [flat.sizes for flat in zero.flats] == [[3], [3], [9, 9]]
    for seed in range(3):
        for part in torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)):
            ours(part).backward()  # two passes a step
            plain(part).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        assert np.isclose(zero.clip(0.5), norm.item())
        plain.unused.weight.grad = torch.zeros(3, 3, dtype=torch.float64)  # it stands beside one that learns
        zero.step()
        optimizer.step()
        optimizer.zero_grad()
    with zero.whole():
        for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert torch.equal(ours.unused.bias, frozen)


def test_bad_input():
    with pytest.raises(ValueError, match="^stage: 1, 2 or 3, not 4"):
        Zero(nn.Linear(2, 2), AdamW, stage=4)
    layer = nn.Linear(2, 2)
    for params in ([layer.weight], [layer.weight, layer.bias, layer.bias]):
        with pytest.raises(ValueError, match="^groups: they hold"):
            Zero(layer, AdamW, stage=1, groups=[dict(params=params)])
    layer.bias.data = layer.bias.data.double()
    with pytest.raises(ValueError, match="^groups: torch.float32 on cpu beside torch.float64"):
        Zero(layer, AdamW, stage=1)
