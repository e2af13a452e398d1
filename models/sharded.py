"""Tensors of which each process holds a part, written by all of them at once into a folder of safetensors, and read back.

PyTorch's distributed checkpoints (torch.distributed.checkpoint) in their safetensors form: every process writes one file of the
parts it holds, whose header tells where in the whole tensor each begins; a reader asks for the parts it needs, cut in whatever
way. What several processes hold is written by one. No process ever has the whole, and no file is pickled.
"""

import errno
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

PATTERN = "shard-*.safetensors"


def write_parts(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup) -> list[Path]:
    """Write what this process holds of each tensor; the files it has written. All processes of the group take part.

    Raises an OSError on all of them where one cannot write.
    """
    from torch.distributed import checkpoint  # which takes its time

    writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        checkpoint.save(tensors, storage_writer=writer, process_group=group)
    except checkpoint.api.CheckpointException as error:
        raise first_cause(error, folder) from None
    return sorted(folder.glob(f"shard-{dist.get_rank(group) + 1:05d}-*.safetensors"))


def read_parts(folder: Path, tensors: dict[str, Tensor], *, alone: bool = False) -> None:
    """Fill tensors, parts or wholes, with the saved ones of their names. All processes take part, unless one is `alone`.

    ValueError naming a tensor that is not there, or that has another shape.
    """
    from torch.distributed import checkpoint

    there = on_meta(folder)
    for name, tensor in tensors.items():
        if name not in there:
            raise ValueError(f"checkpoint {str(folder)!r}: the tensor {name!r} is missing")
        if there[name].shape != tensor.shape:
            shapes = f"{tuple(there[name].shape)}, not {tuple(tensor.shape)}"
            raise ValueError(f"checkpoint {str(folder)!r}: the tensor {name!r} has the shape {shapes}")
    try:
        with warnings.catch_warnings(action="ignore"):  # it says that one process is alone
            checkpoint.load(tensors, storage_reader=checkpoint.HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except checkpoint.api.CheckpointException as error:
        raise ValueError(f"checkpoint {str(folder)!r}: {first_cause(error, folder)}") from None


def kind_of(name: str) -> str:
    """What a tensor of a checkpoint belongs to: names of the model's parameters have no slash in them."""
    return "model" if "/" not in name else "generators" if name.startswith("generators/") else "optimizer"


def on_meta(folder: Path, kind: str = "") -> dict[str, Tensor]:
    """The saved tensors by name (of one kind, if it is given), without their numbers, on the meta device.

    ValueError where a file is damaged.
    """
    from torch.distributed import checkpoint

    try:
        found = checkpoint.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {str(folder)!r} is not readable: {error}") from None
    found = {name: of for name, of in found.items() if kind in ("", kind_of(name))}
    return {name: torch.empty(of.size, dtype=of.properties.dtype, device="meta") for name, of in found.items()}


def read_all(folder: Path, kind: str = "") -> dict[str, Tensor]:
    """All tensors (of one kind, if it is given), whole, on the CPU of this process."""
    tensors = {name: torch.empty_like(tensor, device="cpu") for name, tensor in on_meta(folder, kind).items()}
    read_parts(folder, tensors, alone=True)
    return tensors


def first_cause(error: BaseException, folder: Path) -> OSError:
    """What went wrong on the first of the processes on which something did."""
    cause = next(iter(error.failures.values()))[0]
    told = cause if isinstance(cause, OSError) else OSError(errno.EIO, f"{type(cause).__name__}: {cause}")
    return OSError(told.errno, told.strerror or str(told), str(told.filename or folder))
