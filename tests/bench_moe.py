"""How fast a mixture is: beside a dense layer of the same active FLOPs, and beside the block of the transformers package.

    python -m tests.bench_moe [threads] [dim]

A training step (forward and backward) of one layer, 256 wide unless told otherwise, on 16 rows of 256 tokens that are new in
each step: 8 experts twice as wide, two a token. Sides take turns, so that a noisy machine is so to all; tokens a second are of
the best turn, the ratio that of the best ones. All have the allocator's settings of train.py.
"""

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.machine import tune_cpu
from models.stack import FFNS
from nn.context import Context
from nn.spec import build

ROWS, TIME, TURNS = 16, 256, 20
PAIRS = {  # a mixture, and what is as many FLOPs without one
    "gated": ("moe:experts=8:top_k=2:width={}", "swiglu:width={}"),
    "plain": ("moe:experts=8:top_k=2:width={}:gated=false:activation=relu2", "mlp:width={}:activation=relu2"),
}


def stepping(layer: nn.Module, call: Callable, dtype: torch.dtype) -> Callable[[Tensor], None]:
    """One step of a layer on x: call(layer, x) and back."""

    def step(x: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = call(layer, x)
        y.float().sum().backward()
        for parameter in (x, *layer.parameters()):
            parameter.grad = None

    return step


def best(sides: dict[str, Callable[[Tensor], None]], dim: int, turns: int = TURNS) -> dict[str, float]:
    """Tokens a second of each side at its best, after a step each that is not counted."""
    seconds = dict.fromkeys(sides, float("inf"))
    for turn in range(turns + 1):
        x = torch.randn(ROWS, TIME, dim, requires_grad=True)
        for name, step in sides.items():
            start = time.perf_counter()
            step(x)
            seconds[name] = min(seconds[name], time.perf_counter() - start) if turn else float("inf")
    return {name: ROWS * TIME / best for name, best in seconds.items()}


def theirs(dim: int) -> nn.Module | None:
    """The mixture of the `transformers` package with the same sizes, if that is installed."""
    try:
        from transformers.models.mixtral import modeling_mixtral
    except ModuleNotFoundError:
        return None
    sizes = dict(hidden_size=dim, intermediate_size=2 * dim, num_local_experts=8, num_experts_per_tok=2)
    block = modeling_mixtral.MixtralSparseMoeBlock(modeling_mixtral.MixtralConfig(**sizes))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def first(x):
    return x[0] if isinstance(x, tuple) else x


def main() -> None:
    torch.manual_seed(0)
    tune_cpu()
    threads, dim = (*map(int, sys.argv[1:]), *(2, 256)[len(sys.argv) - 1 :])
    torch.set_num_threads(threads)
    context = Context(torch.zeros(ROWS, TIME, dtype=torch.int64), torch.arange(TIME))
    block = theirs(dim)
    for dtype in (torch.bfloat16, torch.float32):
        for name, specs in PAIRS.items():
            widths = dict(mixture=2 * dim, dense=4 * dim)
            layers = {s: build(spec.format(widths[s]), FFNS, "ffn", dim) for s, spec in zip(widths, specs, strict=True)}
            sides = {side: stepping(layer, lambda layer, x: layer(x, context), dtype) for side, layer in layers.items()}
            if name == "gated" and block is not None:
                sides["transformers"] = stepping(block, lambda layer, x: first(layer(x)), dtype)
            rates = best(sides, dim)
            ratios = ", ".join(f"{rates['mixture'] / rates[side]:.2f} of {side}" for side in list(sides)[1:])
            shown = ", ".join(f"{side} {rate:,.0f}" for side, rate in rates.items())
            print(f"{name}, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads: {shown} tokens/s; {ratios}")


if __name__ == "__main__":
    main()
