"""Which process of a run is slow: all the others wait for it, so that the time of a step does not tell them apart.

Jiang et al. 2024, "MegaScale: Scaling Large Language Model Training to More Than 10,000 GPUs" (arXiv:2402.15627), section 5.2,
times the critical parts of a step on every rank and compares ranks; here as numbers instead of a picture.
"""

import socket
import time
from statistics import median

import torch
import torch.distributed as dist

from models.parallel import Spread
from nn.parallel.collectives import waited

EVERY = 50  # steps from one comparison to the next
SLOW = 1.5  # times as long as the others


class OwnTime:
    """Seconds of a step in which a process works by itself: it makes its batch, and computes the forward passes of its layers.

    Between these marks nothing waits for another process: weights are gathered before a sublayer and gradients summed in the
    backward pass, which is not measured; what layers exchange within (`nn.parallel.collectives`) is taken off, on a CPU. On a
    GPU the layers' time is that between two events of its stream, in which exchanges within a layer count (ulysses, ring, ep).
    Not seen: what is slow only in backward passes, in the optimizer, or between the processes (a bad cable slows all alike).
    Other programs on its machine make a process slow as well: who times steps of milliseconds there will see it named for them.
    """

    def __init__(self, spread: Spread, clock=time.perf_counter):
        self.spread, self.clock, self.on_gpu = spread, clock, spread.device.type == "cuda"
        self.in_step, self.loading, self.spans, self.steps = False, 0.0, [], []
        if spread.is_alone:
            return
        whole = getattr(spread.forward, "module", spread.forward)  # what DDP wraps
        for module in [whole] if spread.is_whole else [residual.layer for residual in spread.model.stack]:
            module.register_forward_pre_hook(self.start)
            module.register_forward_hook(self.stop)
        self.hosts = [""] * dist.get_world_size()
        dist.all_gather_object(self.hosts, socket.gethostname())

    def begin(self) -> None:
        """The step begins: the process makes its batch."""
        self.in_step, self.spans, self.began_at = True, [], self.clock()

    def loaded(self) -> None:
        """The batch is made."""
        self.loading = self.clock() - self.began_at

    def start(self, *_) -> None:
        self.began = self.now()

    def stop(self, *_) -> None:
        if self.in_step:  # and not a judgement between two of them
            self.spans.append((self.began, self.now()))

    def now(self):
        """A moment: seconds that the process has not spent waiting, or an event on the GPU's stream."""
        if not self.on_gpu:
            return self.clock() - waited["seconds"]
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def end(self, step: int) -> dict:
        """The step ends. After every 50th, for the log: `busy`, seconds a step of each rank, the median of these steps; and
        `slow`, a line that names who takes 1.5 times as long as the others that have the same layers. {} otherwise."""
        if self.spread.is_alone:
            return {}
        layers = sum(a.elapsed_time(b) / 1000 if self.on_gpu else b - a for a, b in self.spans)
        self.steps.append(self.loading + layers)
        self.in_step = False
        if step % EVERY:
            return {}
        busy, self.steps = gathered(median(self.steps), self.spread), []
        lines = []
        for rank, others in slow_ranks(busy, self.spread.sizes["pp"]):
            works = f"works {busy[rank]:.2g} s of a step by itself, the others {others:.2g} s"
            lines.append(f"rank {rank} on {self.hosts[rank]} is slow: {works}")
        return dict(busy=busy) | (dict(slow="; ".join(lines)) if lines else {})


def gathered(seconds: float, spread: Spread) -> list[float]:
    """The number of every rank."""
    all_of_them = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=spread.device)
    all_of_them[dist.get_rank()] = seconds
    dist.all_reduce(all_of_them)
    return [round(x, 6) for x in all_of_them.tolist()]


def slow_ranks(busy: list[float], stages: int = 1) -> list[tuple[int, float]]:
    """(rank, the others' median) of ranks that take more than SLOW times that. The others: of the same one of the pipeline's
    `stages`, which follow each other in the order of ranks; where a stage has one rank, there are none to compare it with."""
    size, found = len(busy) // stages, []
    for rank, own in enumerate(busy):
        first = rank // size * size
        others = [busy[other] for other in range(first, first + size) if other != rank]
        if others and own > SLOW * median(others):
            found.append((rank, median(others)))
    return found
