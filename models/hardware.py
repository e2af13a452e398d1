"""What accelerators can do at best, by their makers' data sheets, and how long a planned step would take on them."""

import math
from typing import NamedTuple

from models.plan import Part, Run, Stage, plan


class Hardware(NamedTuple):
    flops: float  # FLOP/s of bfloat16 matrix products with float32 sums, no sparsity
    memory: float  # bytes
    memory_rate: float  # bytes/s, from and to its own memory
    link: float  # bytes/s that one accelerator sends to others in its node (half of what is quoted for both directions)
    network: float  # bytes/s that one accelerator sends to other nodes
    node: int  # accelerators that `link` joins


# NVIDIA's data sheets of the A100 80GB SXM (2021), H100 SXM (2023) and H200 SXM (2024); network: the adapters of the
# DGX A100 (200 Gbit/s for each GPU), DGX H100 and DGX H200 (400 Gbit/s), by their user guides.
HARDWARE = {
    "h100": Hardware(flops=989.4e12, memory=80e9, memory_rate=3.35e12, link=450e9, network=50e9, node=8),
    "h200": Hardware(flops=989.4e12, memory=141e9, memory_rate=4.8e12, link=450e9, network=50e9, node=8),
    "a100": Hardware(flops=312e12, memory=80e9, memory_rate=2.039e12, link=300e9, network=25e9, node=8),
}
BESIDE = ("fsdp ", "dp ", "ring send")  # messages that travel while a rank computes


def seconds(stages: list[Stage], run: Run, hardware: Hardware) -> float:
    """The least time of a step, of the slowest stage, by a model of four terms:

        time = (compute + memory + waiting) (1 + (p - 1) / m) + max(0, beside - compute - memory)

    compute: FLOPs at the peak rate; memory: bytes from and to it at its rate; waiting: messages whose result the next product
    needs (tp, ulysses, ep, pp); beside: messages that travel meanwhile (weights, gradients, keys and values on a ring), of
    which what takes longer counts; p - 1 of m micro-batches are a pipeline's bubble. An axis has the rate of a node's links if
    its ranks, which are as far apart as the axes within it make them, are all in one. Left out: products below the peak,
    latencies, several axes on one wire, experts with uneven loads, steps on the host, so that the truth is worse.
    """
    bubble, times = (run.sizes["pp"] - 1) / run.micro_batches, []
    for stage in stages:
        took = {name: size / rate_of(name.partition(" ")[0], run.sizes, hardware) for name, size in stage.sent.items()}
        beside = sum(time for name, time in took.items() if name.startswith(BESIDE))
        own = stage.flops / hardware.flops + stage.moved / hardware.memory_rate
        times.append((own + sum(took.values()) - beside) * (1 + bubble) + max(0.0, beside - own))
    return max(times)


def rate_of(axis: str, sizes: dict[str, int], hardware: Hardware) -> float:
    axes = list(sizes)
    outermost = min(map(axes.index, ("dp", "ep"))) if axis == "dp" else axes.index(axis)  # copies are those of both
    ranks = math.prod(sizes[name] for name in axes[outermost:])
    return hardware.link if ranks <= hardware.node else hardware.network


def predict(parts: list[Part], run: Run, hardware: Hardware) -> tuple[float, float]:
    """(seconds of a step, model FLOPs utilisation), the best to hope for.

    The second is the FLOPs of the model's training, nothing counted twice, beside the peak of all ranks.
    """
    time = seconds(plan(parts, run), run, hardware)
    ranks = run.positions * run.sizes["tp"] * run.sizes["pp"]  # that work on the same rows
    useful = 3 * sum(part.flops for part in parts) * run.rows * run.micro_batches / ranks
    return time, useful / (time * hardware.flops)
