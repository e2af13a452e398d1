"""Models from and to folders: our checkpoints and published ones alike."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kernels.shards import local, part
from models import huggingface
from models.checkpoint import MANIFEST, load_weights, model_tensors, read_json, read_tensors, write_json, write_tensors
from models.config import Config
from models.draw import draw
from models.language_model import LanguageModel
from models.sharded import PATTERN, read_all, read_parts
from nn.adapt import ADAPTERS
from nn.spec import build

FORMAT = "rosetta"


def save_model(model: LanguageModel, folder: Path) -> None:
    """Write a model's configuration and weights into a folder: what `read_config` and `load_model` read."""
    save_config(model.config, folder)
    write_tensors(folder / "model.safetensors", model_tensors(model))


def save_config(config: Config, folder: Path) -> None:
    write_json(folder / "config.json", {"format": FORMAT, **config.to_json()})


def tensors_of(folder: Path, kind: str) -> dict[str, Tensor]:
    """The `model` or the `optimizer` of a checkpoint: tensors by name, whole, on the CPU, however they were written."""
    if not any(folder.glob(PATTERN)):
        return read_tensors(folder / f"{kind}.safetensors")
    return read_all(folder, kind)


def read_config(folder: Path) -> Config:
    """The configuration of a checkpoint or of a published model. ValueError if the folder holds neither."""
    if not folder.is_dir():
        raise ValueError(f"checkpoint: there is no folder {str(folder)!r}")
    if huggingface.is_huggingface(folder):
        return huggingface.read_config(folder)
    values = read_json(folder / "config.json")
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise ValueError(f"{str(folder / 'config.json')!r} is neither of a checkpoint of ours nor of a published model")
    return Config.from_json(values)


def load_model(folder: Path, config: Config | None = None) -> LanguageModel:
    """The model of a checkpoint or a published one, float32 on the CPU, built as `config` says or as the folder does.

    If `config` has an adapter and the folder none, the model is loaded plain and then adapted, drawn from the config's seed.
    ValueError naming the first tensor that is missing, left over or of another shape; for published weights of another model
    than `config` says; for a folder adapted otherwise.
    """
    if config and (saved := read_config(folder)).adapt != config.adapt:
        if saved.adapt:
            raise ValueError(f"adapt: {str(folder)!r} has {saved.adapt} already; python -m models.merge_adapter makes it plain")
        return adapted(load_model(folder, replace(config, adapt="")), config.adapt, seed=config.seed)
    model = skeleton(config or read_config(folder))
    if huggingface.is_huggingface(folder):
        published = huggingface.load(folder)
        if huggingface.facts(model) != huggingface.facts(published):
            raise ValueError(f"weights: {str(folder)!r} holds another model than these flags ask for")
        published.config = model.config  # with what a run has beside the model
        return published
    load_weights(model, tensors_of(folder, "model"), str(folder))
    return model


def skeleton(config: Config) -> LanguageModel:
    """A model without numbers, on the meta device."""
    with torch.device("meta"):
        return LanguageModel(config)


@torch.no_grad()
def fill(tensors: dict[str, Tensor], config: Config, folder: Path | None) -> None:
    """Give tensors of a model, of which this process may have parts, the numbers of a checkpoint; of none: the first ones.

    All processes of a run take part. None needs memory for more than its parts and one sublayer, but where the folder holds a
    published model, or one that is yet to be adapted: that is read whole.
    """

    def take(name: str, tensor: Tensor) -> None:
        if name in tensors:
            local(tensors[name]).copy_(part(tensor, like=tensors[name]))

    if folder is None:
        draw(config, config.seed, take)
    elif huggingface.is_huggingface(folder) or read_config(folder).adapt != config.adapt:
        for name, tensor in model_tensors(load_model(folder, config)).items():
            take(name, tensor)
    else:
        read_parts(folder, tensors)


def adapted(model: LanguageModel, adapter: str, *, seed: int = 0) -> LanguageModel:
    """In place: the model with the adapter that a spec of ADAPTERS names, its numbers drawn from the seed."""
    build(adapter, ADAPTERS, "adapter", model, generator=torch.Generator().manual_seed(seed))
    model.config = replace(model.config, adapt=adapter)
    return model


def is_published(folder: Path) -> bool:
    """Whether a folder holds a model without a run: no manifest of ours."""
    return not (folder / MANIFEST).exists()
