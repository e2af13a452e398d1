"""What each of several processes does in tests/optim/test_offload.py: steps on the host, beside steps on the device.

torchrun --nproc-per-node 2 -m tests.optim.offload_processes fsdp=2 tp=2
"""

import sys

import torch.distributed as dist

from models.sharded import read_all
from nn.parallel.mesh import sizes_of
from optim import AdamW, Combined, Lamb, Muon, by_parts, split_parameters
from optim.parallel.processes import leave_processes
from tests.models.spread_processes import Run

OTHER = {"fsdp=2": "tp=2", "tp=2": "pp=2"}  # where a run goes on


def optimizer_of(model) -> Combined:
    split = split_parameters(model)
    matrices = Muon(by_parts(model, split.hidden), lr=0.02, dtype="float64")
    return Combined([matrices, Lamb(split.head + split.embedding, lr=0.01), AdamW(split.vector, lr=0.01)])


def offloaded(model) -> Combined:
    optimizer = optimizer_of(model)
    optimizer.moved = optimizer.offload()
    return optimizer


def compare(mesh: str) -> None:
    sizes, other = (sizes_of(words, dist.get_world_size()) for words in (mesh, OTHER[mesh]))
    here, there = (Run("gqa", sizes, make_optimizer=make) for make in (optimizer_of, offloaded))
    for number in range(2):
        assert here.step(number) == there.step(number)
    numbers = sum(getattr(p, "_local_tensor", p).numel() for p in there.model.parameters() if p.requires_grad)
    assert there.optimizer.moved == dict(down=2 * 8 * numbers, up=2 * 8 * numbers), (there.optimizer.moved, numbers)
    folders = [run.saved() for run in (here, there)]
    states = [read_all(folder) for folder in folders]
    assert states[0].keys() == states[1].keys() and all(states[0][k].equal(states[1][k]) for k in states[0])
    went_on = []
    for folder, make in zip(folders, (offloaded, optimizer_of), strict=True):
        after = Run("gqa", other, folder=folder, make_optimizer=make)
        found = read_all(after.saved())
        assert all(states[0][k].equal(found[k]) for k in states[0])
        went_on.append(after.step(2))
    assert went_on[0] == went_on[1], went_on


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for mesh in sys.argv[1:]:
        compare(mesh)
        if dist.get_rank() == 0:
            print(f"{mesh}: equal", flush=True)
    leave_processes()
