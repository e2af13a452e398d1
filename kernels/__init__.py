"""One operation a file: the equation in NumPy, the Triton kernel, the PyTorch op, and a SPEC its tests are made from."""

from kernels import rmsnorm

SPECS = {
    "rmsnorm": rmsnorm.SPEC,
}
