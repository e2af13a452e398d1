"""Does torch.compile(fullgraph=True) trace the Triton path of an op? Found out without a GPU: traced, never run.

    python -m tests.kernels.trace_triton [rmsnorm ...]        all operations, or some

The tensors lie on the CPU; PyTorch and Triton are told that there is a GPU, which is enough for everything before code
generation. In place of the compiled graphs stand functions that return empty tensors of the right shapes. Prints how
many kernels the forward and the backward graph of each example call start.
"""

import sys

import torch
import torch.utils._triton
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels import SPECS
from kernels.launch import use
from kernels.spec import outputs


class Pretended:
    """As much of a GPU's driver as tracing asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


def kernels_in(name: str, example: dict) -> list[int]:
    """The number of kernels in each graph that one example call makes."""
    spec, found = SPECS[name], []

    def pretend(graph, _):
        called = [f"{node.target} {node.args[:1]}" for node in graph.graph.nodes if node.op == "call_function"]
        found.append(sum("triton_kernel_wrapper" in call or "rosetta" in call for call in called))
        values = [node.meta["val"] if node is not None else None for node in graph.graph.output_node().args[0]]

        def run(*_):
            return [torch.empty(v.shape, dtype=v.dtype) if isinstance(v, torch.Tensor) else v for v in values]

        return make_boxed_func(run)

    partition = min_cut_rematerialization_partition
    backend = aot_autograd(fw_compiler=pretend, bw_compiler=pretend, partition_fn=partition)
    torch._dynamo.reset()
    call = spec.call(example, torch.float32, "cpu")
    with use("triton"):
        results = outputs(torch.compile(spec.op, fullgraph=True, backend=backend)(**call))
        results = [r for r in results if isinstance(r, torch.Tensor) and r.requires_grad]
        names = [n for n in spec.gradients if isinstance(call.get(n), torch.Tensor)]
        if results and names:
            grads = [torch.ones_like(r) for r in results]
            torch.autograd.grad(results, [call[n] for n in names], grads, allow_unused=True)
    return found


if __name__ == "__main__":
    torch.utils._triton.has_triton = lambda: True
    driver.set_active(Pretended())
    for name in sys.argv[1:] or SPECS:
        for shapes in SPECS[name].cpu:
            print(name, *kernels_in(name, shapes), flush=True)
