"""How fast is each kernel, beside what the machine can do and beside PyTorch?

    python -m kernels.bench [name ...] [--device cuda|cpu] [--dtype bfloat16] [--compile] [--out roofline.png]

Every example call of every SPEC, forward alone and forward with backward: the time of ours, achieved GB/s and TFLOP/s
(of the bytes and FLOPs that the SPEC says are needed, so that waste counts as slowness), their share of the copy
bandwidth and the matmul peak measured in the same run, and how many times as long PyTorch's own operations take, eager
and, with --compile, compiled. Sides are timed in turn, medians are compared. A roofline of all calls goes into a PNG.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import SPECS
from kernels.spec import Cost, Shape, Spec, outputs


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: bytes a second of a copy (read and written), FLOPs a second of a matrix product."""

    bandwidth: float
    flops: float

    def seconds(self, cost: Cost) -> float:
        """The least time in which this can be done."""
        return max(cost.bytes / self.bandwidth, cost.flops / self.flops)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(functions: dict[str, Callable[[], object]], device: torch.device, budget: float = 1.5) -> dict[str, float]:
    """Median seconds of each function, called in turn until `budget` seconds a function are spent."""
    for function in functions.values():  # compiled and warm
        function()
        function()
    synchronize(device)
    found: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + budget * len(functions)
    while time.perf_counter() < end or len(found[next(iter(found))]) < 3:
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in found.items()}


def many(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """On a GPU ten calls at once, so that the time to start a kernel hides behind the one before."""
    if device.type != "cuda":
        return function

    def calls() -> None:
        for _ in range(10):
            function()

    return calls


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    size = 2**28 if device.type == "cuda" else 2**25
    source = torch.ones(size, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    repeat = 10 if device.type == "cuda" else 1
    calls = dict(copy=many(lambda: target.copy_(source), device), product=many(lambda: a @ b, device))
    seconds = medians(calls, device)
    return Ceilings(2 * source.nbytes * repeat / seconds["copy"], 2 * side**3 * repeat / seconds["product"])


def forward(function: Callable, call: dict) -> Callable[[], object]:
    def run():
        with torch.no_grad():
            return function(**call)

    return run


def both(function: Callable, spec: Spec, call: dict) -> Callable[[], object]:
    names = [name for name in spec.gradients if isinstance(call.get(name), Tensor)]
    feed: list[Tensor] = []

    def run():
        results = [r for r in outputs(function(**call)) if isinstance(r, Tensor) and r.requires_grad]
        if not feed:
            feed.extend(torch.randn_like(r) for r in results)
        return torch.autograd.grad(results, [call[name] for name in names], feed, allow_unused=True)

    return run


def shapes(example: dict) -> str:
    """The first tensors of a call, as 16384x4096."""
    return " ".join("x".join(map(str, v.dims)) for v in example.values() if isinstance(v, Shape))[:34]


def bench(name: str, example: dict, device: torch.device, dtype: torch.dtype, roof: Ceilings, compiled: bool) -> list[tuple]:
    """Rows of the table for one example call: (label, pass, cost, seconds of ours, ratio to eager, ratio to compiled)."""
    spec = SPECS[name]
    call = spec.call(example, dtype, device)
    costs = spec.cost(**call)
    sides = dict(ours=spec.op, eager=spec.pytorch) | (dict(compiled=torch.compile(spec.pytorch)) if compiled else {})
    passes = [("forward", costs[0], {side: forward(f, call) for side, f in sides.items()})]
    if spec.gradients:
        whole = Cost(costs[0].flops + costs[1].flops, costs[0].bytes + costs[1].bytes)
        passes.append(("forward+backward", whole, {side: both(f, spec, call) for side, f in sides.items()}))
    rows = []
    for label, cost, functions in passes:
        seconds = medians({side: many(f, device) for side, f in functions.items()}, device)
        seconds = {side: s / (10 if device.type == "cuda" else 1) for side, s in seconds.items()}
        ratios = [seconds[side] / seconds["ours"] for side in ("eager", "compiled") if side in seconds]
        rows.append((f"{name} {shapes(example)}", label, cost, seconds["ours"], *ratios))
    return rows


def roofline(rows: list[tuple], roof: Ceilings, path: str) -> None:
    """FLOPs a second over FLOPs a byte, on logarithmic axes, under the two ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    intensity = [2**i / 8 for i in range(20)]
    axes.loglog(intensity, [min(roof.flops, i * roof.bandwidth) / 1e9 for i in intensity], color="black")
    for name in dict.fromkeys(row[0].split()[0] for row in rows):
        mine = [row for row in rows if row[0].split()[0] == name]
        points = [(row[2].flops / row[2].bytes, row[2].flops / row[3] / 1e9) for row in mine]
        axes.loglog(*zip(*points, strict=True), "o", label=name)
    axes.set(xlabel="FLOPs a byte", ylabel="GFLOP/s", title="Kernels under the roofline")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="kernels; all without one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--compile", action="store_true", help="beside torch.compile too")
    parser.add_argument("--out", default="roofline.png", help="where the roofline is drawn")
    flags = parser.parse_args(argv)
    if unknown := [name for name in flags.names if name not in SPECS]:
        parser.error(f"no kernel {unknown[0]!r}; there are {', '.join(SPECS)}")
    try:
        device = torch.device(flags.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"device: {flags.device!r} is not here: {str(error).splitlines()[0]}")
    dtype = getattr(torch, flags.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    roof = ceilings(device, dtype)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{machine}, PyTorch {torch.__version__}, {flags.dtype or str(dtype)[6:]}: "
          f"copy {roof.bandwidth / 1e9:,.0f} GB/s, matmul {roof.flops / 1e12:,.2f} TFLOP/s")  # fmt: skip
    print(f"{'call':50}{'pass':18}{'ms':>9}{'GB/s':>8}{'TFLOP/s':>9}{'share':>7}{'eager':>8}{'compiled':>9}")
    rows = []
    for name in flags.names or SPECS:
        for example in SPECS[name].gpu if device.type == "cuda" else SPECS[name].cpu:
            for row in bench(name, example, device, dtype, roof, flags.compile):
                label, kind, cost, seconds, *ratios = row
                rates = f"{cost.bytes / seconds / 1e9:8.0f}{cost.flops / seconds / 1e12:9.3f}"
                beside = "".join(f"{ratio:7.2f}x" for ratio in ratios)
                share = roof.seconds(cost) / seconds
                print(f"{label[:49]:50}{kind:18}{seconds * 1e3:9.3f}{rates}{share:7.0%}{beside}", flush=True)
                rows.append(row)
    roofline(rows, roof, flags.out)
    print(f"drawn: {flags.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
