"""The checkpoints of a run, written by its processes together, behind the run's back if that is asked; and read back."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch.distributed as dist
from torch import Tensor

from models.checkpoint import begin, complete, digest, read_json, read_tensors, write_tensors
from models.machine import set_generators
from models.sharded import on_meta, read_parts, write_parts
from models.weights import tensors_of


class Saver:
    """Writes checkpoints into the folder of a run and keeps the last `keep` of them.

    The first process writes all, or, if a process has `parts` of the tensors only, each its own. `behind`: `save` copies the
    tensors to the host and returns; a thread writes the copies while the run goes on, and the checkpoint is there when
    `finish` finds the thread at its end. Jiang et al. 2024, "MegaScale" (arXiv:2402.15627), section 4.3: fast to the host's
    memory, and from there in the background. It takes the memory of the copies, and some of the processor's time.
    """

    def __init__(self, run: Path, *, keep: int, rank: int = 0, parts: bool = False, behind: bool = False):
        self.run, self.keep, self.rank, self.behind = run, keep, rank, behind
        self.group = dist.new_group(backend="gloo") if parts else None  # its own: what the run sends goes on meanwhile
        self.partial, self.thread, self.error, self.digests = None, None, None, {}

    @property
    def writing(self) -> bool:
        """Whether the thread is still at work."""
        return self.thread is not None and self.thread.is_alive()

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], write: Callable[[Path], None]) -> Path:
        """A checkpoint of tensors, by the file (`model`, `optimizer`) that they belong to, and of what `write(folder)` writes.

        All processes take part; its folder, which is complete after `finish`. OSError where it cannot be written: what was
        saved before is still there.
        """
        self.finish()
        place = self.run / f"step-{step:06d}"
        if self.rank > 0 and not self.group:
            return place
        self.partial = begin(self.run, step) if self.rank == 0 else self.run / f".step-{step:06d}"
        if self.rank == 0:
            write(self.partial)
        if self.group:
            dist.barrier(self.group)
        if self.behind:  # also from the CPU: the run goes on to change them
            tensors = {file: {n: t.detach().to("cpu", copy=True) for n, t in of.items()} for file, of in tensors.items()}
            self.thread = Thread(target=self.work, args=(tensors,))
            self.thread.start()
        else:
            self.work(tensors)
            self.finish()
        return place

    def work(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        try:
            if self.group:
                together = {name: tensor for of in tensors.values() for name, tensor in of.items()}
                written = write_parts(self.partial, together, self.group)
            else:
                written = [self.partial / f"{file}.safetensors" for file in tensors]
                for path, of in zip(written, tensors.values(), strict=True):
                    write_tensors(path, of)
            self.digests = {path.name: digest(path) for path in written}
        except BaseException as error:  # of whatever kind: `finish` raises it, and the folder does not become a checkpoint
            self.error = error

    def finish(self) -> None:
        """Wait for what is being written, and make it a checkpoint; nothing, if nothing is. All processes take part."""
        if self.partial is None:
            return
        if self.thread is not None:
            self.thread.join()
        partial, error, digests = self.partial, self.error, self.digests
        self.partial, self.thread, self.error, self.digests = None, None, None, {}
        if self.group:
            every: list = [None] * dist.get_world_size()
            told = error and ((error.errno, error.strerror, error.filename) if isinstance(error, OSError) else (0, str(error)))
            dist.all_gather_object(every, (told, digests), group=self.group)
            error = next((OSError(*said) for said, _ in every if said), None)
            digests = {name: checksum for _, of in every for name, checksum in of.items()}
        try:
            if error:
                raise error
            if self.rank == 0:
                complete(partial, keep=self.keep, digests=digests)
        finally:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)


def restore(folder: Path, state: Any, loader: Any, scaler: Any) -> tuple[int, float]:
    """Put a RunState, a loader, a LossScale and PyTorch's generators back as a checkpoint has them; weights are not read.

    The step and the seconds of training so far. ValueError naming what is missing, damaged or of another optimizer.
    """
    progress = read_json(folder / "progress.json")
    there = tensors_of(folder, "optimizer") if state.is_whole else on_meta(folder, "optimizer")
    state.load_optimizer(progress["optimizer"], there, partial(read_parts, folder))
    loader.load_state_dict(progress["loader"])
    scaler.load_state_dict(progress["scaler"])
    set_generators(read_tensors(folder / "generators.safetensors"))
    return progress["step"], progress["elapsed"]
