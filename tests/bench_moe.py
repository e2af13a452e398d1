"""How fast a mixture is: beside a dense layer of the same active FLOPs, and beside the block of the transformers package.

    python -m tests.bench_moe [threads] [dim]

A training step (forward and backward) of one layer, 256 wide unless told otherwise, on 16 rows of 256 tokens that are new in
each step: 8 experts twice as wide, two a token. Sides take turns, so that a noisy machine is so to all; tokens a second are of
the best turn, the ratio that of the best ones. All have the allocator's settings of train.py; at the end, in processes of their
own, each as its users run it: the block in float32 with the allocator as it is, ours as train.py runs it.
"""

import subprocess
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


def main(threads: int = 2, dim: int = 256, only: str = "") -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    context = Context(torch.zeros(ROWS, TIME, dtype=torch.int64), torch.arange(TIME))
    block = theirs(dim)
    if only != "theirs":
        tune_cpu()

    def side(spec: str, width: int, dtype: torch.dtype) -> Callable[[Tensor], None]:
        return stepping(build(spec.format(width), FFNS, "ffn", dim), lambda layer, x: layer(x, context), dtype)

    def their_side(dtype: torch.dtype) -> Callable[[Tensor], None]:
        return stepping(block, lambda layer, x: first(layer(x)), dtype)

    if only:
        alone = their_side(torch.float32) if only == "theirs" else side(PAIRS["gated"][0], 2 * dim, torch.bfloat16)
        print(best({only: alone}, dim)[only])
        return
    for dtype in (torch.bfloat16, torch.float32):
        for name, (mixture, dense) in PAIRS.items():
            sides = {"mixture": side(mixture, 2 * dim, dtype), "dense": side(dense, 4 * dim, dtype)}
            if name == "gated" and block is not None:
                sides["transformers"] = their_side(dtype)
            rates = best(sides, dim)
            ratios = ", ".join(f"{rates['mixture'] / rates[side]:.2f} of {side}" for side in list(sides)[1:])
            shown = ", ".join(f"{side} {rate:,.0f}" for side, rate in rates.items())
            print(f"{name}, {str(dtype).removeprefix('torch.')}, {threads} threads: {shown} tokens/s; {ratios}", flush=True)
    if block is not None:
        command = [sys.executable, "-m", "tests.bench_moe", str(threads), str(dim)]
        turns = [[float(subprocess.check_output([*command, who])) for who in ("ours", "theirs")] for _ in range(3)]
        ours, as_it_comes = map(max, zip(*turns, strict=True))
        print(f"each as it is used: ours {ours:,.0f}, transformers {as_it_comes:,.0f} tokens/s; {ours / as_it_comes:.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *sys.argv[3:])
