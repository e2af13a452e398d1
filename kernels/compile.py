"""Compile every kernel for GPUs that need not be present, and report registers, shared memory and spills.

    python -m kernels.compile [--quick] [name ...]        all kernels, or those of some files

The launches are those that the example calls of each SPEC make, forward and backward, in float32 and bfloat16: the ops
run on tensors without memory while every launch is noted. --quick, which the tests take: all launches in bfloat16 for sm_90;
one of each kernel in float32 there, and in bfloat16 for the other targets. Exit status 1 if a kernel spills registers into
memory or asks for more shared memory than the device has.
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels import SPECS
from kernels.launch import TRITON, recording
from kernels.spec import outputs

# (backend, architecture, threads of a warp) and the bytes of shared memory that one program can have
TARGETS = {
    "sm_80": (("cuda", 80, 32), 163 * 1024),
    "sm_90": (("cuda", 90, 32), 227 * 1024),
    "sm_100": (("cuda", 100, 32), 227 * 1024),
    "gfx942": (("hip", "gfx942", 64), 64 * 1024),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@dataclass(frozen=True)
class Launch:
    """One way a kernel is compiled: what the just-in-time compiler would make of one launch's arguments."""

    op: str
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Report:
    """What a kernel needs: registers a thread, bytes of shared memory a program, bytes (or registers) spilled."""

    launch: Launch
    target: str
    registers: int
    shared: int
    spills: int

    @property
    def fits(self) -> bool:
        return self.spills == 0 and self.shared <= TARGETS[self.target][1]


def launches(
    name: str, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16), target: str = "sm_90"
) -> list[Launch]:
    """Every different launch of the example calls of SPECS[name] on a target."""
    found: dict[Launch, None] = {}
    spec = SPECS[name]
    for example in spec.gpu:
        for dtype in (d for d in dtypes if d in spec.dtypes):
            with recording(target) as noted:
                call = spec.call(example, dtype)
                results = [r for r in outputs(spec.op(**call)) if isinstance(r, Tensor) and r.requires_grad]
                inputs = [call[n] for n in spec.gradients if isinstance(call.get(n), Tensor)]
                if inputs and results:
                    torch.autograd.grad(results, inputs, [torch.empty_like(r) for r in results], allow_unused=True)
            for kernel, args, options in noted:
                found[describe(name, kernel, args, options)] = None
    return list(found)


def describe(op: str, kernel, args: tuple, options: dict) -> Launch:
    given = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in options.items() if k not in OPTIONS}
    constant = {kernel.arg_names[p.num] for p in kernel.params if p.is_constexpr}
    general = {kernel.arg_names[p.num] for p in kernel.params if p.do_not_specialize}
    signature, constants, divisible = [], [], []
    for name in kernel.arg_names:
        value = given[name]
        if name in constant or value is None or (type(value) is int and value == 1 and name not in general):
            signature.append((name, "constexpr"))
            constants.append((name, value))
            continue
        kind = POINTERS[value.dtype] if isinstance(value, Tensor) else "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, int) and abs(value) >= 2**31:
            kind = "i64"
        signature.append((name, kind))
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and name not in general):
            divisible.append(name)
    chosen = tuple((k, v) for k, v in options.items() if k in OPTIONS)
    return Launch(op, kernel.fn.__module__, kernel.__name__, tuple(signature), tuple(constants), tuple(divisible), chosen)


def compiled(launch: Launch, target: str) -> Report:
    """Compile one launch for one target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(sys.modules[launch.module], launch.kernel)
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible}
    source = ASTSource(kernel, dict(launch.signature), dict(launch.constants), attributes)
    made = triton.compile(source, target=GPUTarget(*TARGETS[target][0]), options=dict(launch.options))
    registers, spills = cuda_usage(made.asm["cubin"]) if target.startswith("sm") else hip_usage(made.asm["amdgcn"])
    return Report(launch, target, registers, made.metadata.shared, spills)


def cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of its stack: Triton's kernels have no local arrays, so what is there was spilled."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"\b{key}:(\d+)", text)[1]) for key in ("REG", "STACK"))
    return registers, stack


def hip_usage(assembly: str) -> tuple[int, int]:
    """Vector registers a thread, and how many registers of either kind were spilled."""
    numbers = {key: int(value) for key, value in re.findall(r"\.(\w+_count):\s*(\d+)", assembly)}
    return numbers["vgpr_count"], numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]


def reports(names: list[str], quick: bool = False) -> list[Report]:
    """All launches of these files for all targets, on all cores."""
    work: dict[tuple[Launch, str], None] = {}
    for target, dtype in itertools.product(TARGETS, (torch.bfloat16, torch.float32)):
        if quick and target != "sm_90" and dtype == torch.float32:
            continue
        found = [launch for name in names for launch in launches(name, (dtype,), target)]
        if quick and (target, dtype) != ("sm_90", torch.bfloat16):
            found = {(launch.op, launch.kernel): launch for launch in reversed(found)}.values()  # the first of each kernel
        work |= {(launch, target): None for launch in found}
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        return list(pool.map(compiled, *zip(*work, strict=True), chunksize=2))


def main(argv: list[str] | None = None) -> int:
    names = sys.argv[1:] if argv is None else argv
    quick, names = "--quick" in names, [name for name in names if name != "--quick"]
    if unknown := [name for name in names if name not in SPECS]:
        print(f"kernels.compile: no kernel {unknown[0]!r}; there are {', '.join(SPECS)}", file=sys.stderr)
        return 2
    if not TRITON or os.environ.get("TRITON_INTERPRET") == "1":
        print("kernels.compile: needs Triton, and TRITON_INTERPRET not set", file=sys.stderr)
        return 2
    made = reports(names or list(SPECS), quick)
    print(f"{'kernel':44}{'element':>8}{'constants':>44}  target {'regs':>5} {'shared':>7} {'spills':>6}")
    for report in made:
        launch = report.launch
        element = next(kind for _, kind in launch.signature if kind.startswith("*"))[1:]
        constants = " ".join(f"{value}" for _, value in (*launch.constants, *launch.options))
        print(f"{launch.op + '.' + launch.kernel:44}{element:>8}{constants[-42:]:>44}  {report.target:6} {report.registers:5} "
              f"{report.shared:7} {report.spills:6}{'' if report.fits else '  does not fit'}")  # fmt: skip
    if unseen := [name for name in names or SPECS if not any(report.launch.op == name for report in made)]:
        print(f"kernels.compile: no launch of {', '.join(unseen)} was noted", file=sys.stderr)
        return 1
    failed = [report for report in made if not report.fits]
    print(f"{len(made)} compiled, {len(failed)} that spill or ask for too much shared memory")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
