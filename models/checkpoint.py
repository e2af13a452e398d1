"""Checkpoints: folders that exist whole or not at all.

One holds the weights and the optimizer's state whole (model.safetensors, optimizer.safetensors), or cut as the processes that
wrote it held them (shard-*.safetensors, models/sharded.py). It is written into a temporary folder beside its place, with a
manifest of every file's length and SHA-256, flushed to the disk, and renamed. So a folder of its name is complete, whenever the
writer was killed; and a file that was cut or altered later is found by its digest and named. Tensors are safetensors,
everything else is JSON: reading one executes nothing.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MANIFEST = "manifest.json"
NAME = re.compile(r"step-([0-9]+)")


def save(run: Path, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
    """Make `run`/step-N of the files that `write(folder)` puts into a folder; of older ones the last `keep - 1` stay."""
    partial = begin(run, step)
    try:
        write(partial)
        return complete(partial, keep=keep)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def begin(run: Path, step: int) -> Path:
    """An empty folder for the files of a checkpoint, which it is not before it is `complete`."""
    for leftover in run.glob(".step-*"):  # of a writer that was killed
        shutil.rmtree(leftover)
    partial = run / f".step-{step:06d}"
    partial.mkdir(parents=True)
    return partial


def complete(partial: Path, *, keep: int, digests: dict[str, str] | None = None) -> Path:
    """Make a checkpoint of a folder that `begin` gave and that has all its files now; of older ones the last `keep - 1` stay.

    `digests`: those that are known, by the names of their files.
    """
    run, step = partial.parent, int(partial.name.removeprefix(".step-"))
    target, aside = (run / name.format(step) for name in ("step-{:06d}", "step-0{:06d}"))
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    names = {path.relative_to(partial).as_posix(): path for path in files}
    manifest = {name: [path.stat().st_size, (digests or {}).get(name) or digest(path)] for name, path in names.items()}
    write_json(partial / MANIFEST, manifest)
    for path in [*partial.rglob("*"), partial]:
        flush(path)
    if target.exists():  # a resumed run that comes by the same step again: under its other name it still counts
        remove(aside)
        target.rename(aside)
    partial.rename(target)
    flush(run)
    remove(aside)
    for old in checkpoints(run)[:-keep]:
        remove(old)
    return target


def remove(folder: Path) -> None:
    """Delete a checkpoint, if it is there: its name first, so that half of it is never taken for one."""
    hidden = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        folder.rename(hidden)
        shutil.rmtree(hidden)


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in run.glob("step-*") if NAME.fullmatch(path.name) and (path / MANIFEST).exists()]
    return sorted(found, key=lambda path: (int(NAME.fullmatch(path.name)[1]), -len(path.name)))


def find(place: Path) -> Path:
    """The checkpoint that a path means: itself, the newest of a run, the newest run's in a folder of runs. It is verified.

    A folder of published weights is returned as it is. ValueError if there is none, or if it is damaged.
    """
    found = [place] if (place / "config.json").exists() else checkpoints(place)[-1:]
    found = found or [c[-1] for folder in place.glob("*/") if (c := checkpoints(folder))]
    if not found:
        raise ValueError(f"checkpoint: there is none in {str(place)!r}")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    if (newest / MANIFEST).exists():
        verify(newest)
    return newest


def verify(folder: Path) -> None:
    """ValueError naming the first file of a checkpoint that is missing, cut short or altered.

    Under torchrun each process looks whether all are there, and reads its share of them.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    for number, (name, (size, checksum)) in enumerate(read_json(folder / MANIFEST).items()):
        path = folder / name
        if not path.is_file():
            raise ValueError(f"checkpoint {str(folder)!r} is damaged: {name} is missing")
        if path.stat().st_size != size:
            raise ValueError(f"checkpoint {str(folder)!r} is damaged: {name} has {path.stat().st_size} bytes, not {size}")
        if number % world == rank and digest(path) != checksum:
            raise ValueError(f"checkpoint {str(folder)!r} is damaged: {name} was altered (its SHA-256 differs)")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers of a language model by name; what several layers share is there once, by its first name."""
    once, every = dict(model.named_parameters()), dict(model.named_parameters(remove_duplicate=False))
    return {name: tensor for name, tensor in model.state_dict().items() if name in once or name not in every}


def load_weights(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Put tensors by name into a language model, whose parameters may still be on the meta device.

    ValueError naming the tensor that is missing, left over or of another shape.
    """
    wanted = model_tensors(model)
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors or name not in wanted:
            raise ValueError(f"{source}: the tensor {name!r} is {'missing' if name in wanted else 'not part of this model'}")
        if tensors[name].shape != wanted[name].shape:
            shapes = f"{tuple(tensors[name].shape)}, not {tuple(wanted[name].shape)}"
            raise ValueError(f"{source}: the tensor {name!r} has the shape {shapes}")
    model.load_state_dict(tensors, assign=True, strict=False)  # the names were compared above
    if model.config.tie:
        model.head.weight = model.embedding.weight


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise an OSError naming the file where it cannot be written."""
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. ValueError naming the file if it is not one."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} is not a readable safetensors file: {error}") from None


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """ValueError naming the file if it is not there or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{str(path)!r} is not JSON: it was cut short or altered") from None


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Have the system put a file, or the entries of a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
