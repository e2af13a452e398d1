"""How fast a mixture is: beside a dense layer of the same active FLOPs, and beside the block of the transformers package.

    python -m tests.bench_moe [threads]

A training step (forward and backward) of one layer, width 256, on 16 rows of 256 tokens: 8 experts, two a token. Sides take
turns, so that a noisy machine is so to all; tokens a second are of the best turn, the ratio that of the best ones.
"""

import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from models.stack import FFNS
from nn.context import Context
from nn.spec import build

DIM, ROWS, TIME, TURNS = 256, 16, 256, 20
PAIRS = {  # a mixture, and what is as many FLOPs without one
    "gated": ("moe:experts=8:top_k=2:width=512", "swiglu:width=1024"),
    "plain": ("moe:experts=8:top_k=2:width=512:gated=false:activation=relu2", "mlp:width=1024:activation=relu2"),
}


def stepping(layer: nn.Module, call: Callable, dtype: torch.dtype) -> Callable[[], None]:
    """One step of a layer: call(layer, x) and back."""
    x = torch.randn(ROWS, TIME, DIM, requires_grad=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = call(layer, x)
        y.float().sum().backward()
        for parameter in (x, *layer.parameters()):
            parameter.grad = None

    return step


def best(sides: dict[str, Callable[[], None]], turns: int = TURNS) -> dict[str, float]:
    """Tokens a second of each side at its best."""
    seconds = dict.fromkeys(sides, float("inf"))
    for _ in range(turns):
        for name, step in sides.items():
            start = time.perf_counter()
            step()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return {name: ROWS * TIME / best for name, best in seconds.items()}


def theirs() -> nn.Module | None:
    """The mixture of the `transformers` package with the same sizes, if that is installed."""
    try:
        from transformers.models.mixtral import modeling_mixtral
    except ModuleNotFoundError:
        return None
    sizes = dict(hidden_size=DIM, intermediate_size=512, num_local_experts=8, num_experts_per_tok=2)
    block = modeling_mixtral.MixtralSparseMoeBlock(modeling_mixtral.MixtralConfig(**sizes))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def first(x):
    return x[0] if isinstance(x, tuple) else x


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    context = Context(torch.zeros(ROWS, TIME, dtype=torch.int64), torch.arange(TIME))
    block = theirs()
    for dtype in (torch.bfloat16, torch.float32):
        for name, specs in PAIRS.items():
            layers = dict(zip(("mixture", "dense"), (build(spec, FFNS, "ffn", DIM) for spec in specs), strict=True))
            sides = {side: stepping(layer, lambda layer, x: layer(x, context), dtype) for side, layer in layers.items()}
            if name == "gated" and block is not None:
                sides["transformers"] = stepping(block, lambda layer, x: first(layer(x)), dtype)
            rates = best(sides)
            ratios = ", ".join(f"{rates['mixture'] / rates[side]:.2f} of {side}" for side in list(sides)[1:])
            shown = ", ".join(f"{side} {rate:,.0f}" for side, rate in rates.items())
            print(f"{name}, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads: {shown} tokens/s; {ratios}")


if __name__ == "__main__":
    main()
