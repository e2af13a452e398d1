"""The first weights of a model of which nobody has all: drawn a part at a time."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from models.config import Config
from models.language_model import LanguageModel, share_among_layers
from nn.init import INITS, own_values


@torch.no_grad()
def draw(config: Config, seed: int, take: Callable[[str, Tensor], None]) -> None:
    """Give `take(name, tensor)` the parameters and buffers of `build_model(config, seed=seed)`, bit for bit.

    One part, an embedding or a sublayer, is in memory at a time. A name may come again: what comes last holds.
    """
    with torch.device("meta"):
        model = LanguageModel(config)
    generator = torch.Generator().manual_seed(seed)
    for initialise, anew in ((partial(INITS[config.init], model), True), (own_values, False)):
        for name in model.part_names():
            place = model.get_submodule(name)
            if name == "stack" or not (anew or any(hasattr(module, "own_init") for module in place.modules())):
                continue
            part = model.make_part(name)
            model.put_part(name, part)
            share_among_layers(model.stack)  # what layers share is drawn with the first of them, and not there in the others
            tensors = {path: t for path, t in (*part.named_parameters(), *part.named_buffers()) if not t.is_meta}
            versions = {path: tensor._version for path, tensor in tensors.items()}
            initialise([module for module in part.modules() if all(not t.is_meta for t in own_tensors(module))], generator)
            for path, tensor in tensors.items():
                tied = config.tie and (name, path) == ("head", "weight")
                if tensor._version > versions[path] or anew and not tied:
                    take("embedding.weight" if tied else f"{name}.{path}", tensor.detach())
            model.put_part(name, place)


def own_tensors(module: torch.nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]
