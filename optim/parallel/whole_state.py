"""Weights and optimizer state of a model that is spread over processes, put together, and taken apart again.

So a checkpoint is the same folder whatever the mesh was, and a run may go on with another mesh or on one process.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels.shards import cut_as
from optim.combined import Combined


class WholeState:
    """A model and its optimizer as a whole, whatever a mesh has made of them.

    To be made before the model is spread over processes; `tensors(model)` gives what is saved of it, by name, and
    `optimizer_of(model)` its optimizer: of all, whose state no step has made yet, and by `after`, of a process's share.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Callable[[nn.Module], dict[str, Tensor]],
        optimizer_of: Callable[[nn.Module], Combined],
    ):
        self.model, self.tensors_of, self.optimizer_of = model, tensors, optimizer_of
        self.tensors = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors(model).items()}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.before = optimizer_of(model)
        each_one = self.before.optimizers
        self.numbered = [[names[id(p)] for group in each.param_groups for p in group["params"]] for each in each_one]

    def after(self, spread) -> Combined:
        """The optimizer of what this process has of the model since it was spread: see models/parallel.py."""
        self.spread = spread
        self.now = self.before if spread.is_whole else self.optimizer_of(self.model)
        for group in () if spread.is_whole else self.before.param_groups:  # the whole model is not kept for their sake
            group["params"] = [nn.Parameter(torch.empty_like(p, device="meta")) for p in group["params"]]
        self.parameters = dict(self.model.named_parameters())
        self.holders = {id(p): each for each in self.now.optimizers for group in each.param_groups for p in group["params"]}
        return self.now

    @property
    def param_groups(self) -> list[dict]:
        """Those of the optimizer that steps, and those that are saved."""
        return self.now.param_groups + (self.before.param_groups if self.now is not self.before else [])

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The model's tensors by name. All processes take part; only the first gets them."""
        ours = self.tensors_of(self.model)
        if self.spread.is_whole:
            return ours
        found = ((name, self.spread.gather(name, ours.get(name), *like)) for name, like in self.tensors.items())
        return {name: tensor for name, tensor in found if self.spread.rank == 0}

    @torch.no_grad()
    def optimizer_state(self) -> dict:
        """The state_dict of the optimizer of the whole model. All processes take part; only the first's is complete."""
        if self.spread.is_whole:
            return self.now.state_dict()
        saved = []
        for each, names in zip(self.before.optimizers, self.numbered, strict=True):
            states = {number: state for number, name in enumerate(names) if (state := self.state(each, name))}
            saved.append({"state": states, "param_groups": numbered_groups(each.param_groups)})
        return {"optimizers": saved}

    def state(self, optimizer: torch.optim.Optimizer, name: str) -> dict:
        """What the optimizer remembers of a parameter, whole; {} before its first step."""
        shape, dtype = self.tensors[name]
        first = optimizer.init_state(torch.empty(shape, dtype=dtype, device="meta"))
        parameter = self.parameters.get(name)
        holder = None if parameter is None else self.holders[id(parameter)]
        ours = {} if parameter is None else holder.state.get(parameter, {})
        numbers = [1.0, *(ours[key] for key, value in first.items() if not isinstance(value, Tensor))] if ours else None
        count = 1 + sum(not isinstance(value, Tensor) for value in first.values())
        given = torch.tensor(numbers or [0.0] * count, dtype=torch.float64, device=self.spread.device)
        there, *numbers = self.spread.gather(name, given, given.shape, given.dtype).tolist()
        if not there:
            return {}
        numbers = iter(numbers)
        whole = {}
        for key, value in first.items():
            if isinstance(value, Tensor):
                own = holder.place.as_param(ours[key], parameter) if ours else None
                tensor = self.spread.gather(name, own, value.shape, value.dtype)
                whole[key] = tensor if self.spread.rank == 0 else None
            else:
                whole[key] = type(value)(next(numbers))
        return whole

    def load_optimizer_state(self, saved: dict) -> None:
        """Put this process's share of a saved state in its place. ValueError where it is another optimizer's."""
        self.before.load_state_dict(saved)  # checked, and cut below
        if self.spread.is_whole:
            return
        for each, names, old in zip(self.before.optimizers, self.numbered, saved["optimizers"], strict=True):
            for number, name in enumerate(names):
                parameter = self.parameters.get(name)
                if parameter is not None and (state := old["state"].get(number)):
                    holder = self.holders[id(parameter)]
                    for key, value in state.items():
                        own = holder.place.state(cut_as(value, parameter)) if isinstance(value, Tensor) else value
                        holder.state[parameter][key] = own
            each.state.clear()


def numbered_groups(groups: list[dict]) -> list[dict]:
    """Groups as a state_dict has them: numbers in place of parameters."""
    made, first = [], 0
    for group in groups:
        numbers = list(range(first, first := first + len(group["params"])))
        made.append({key: value for key, value in group.items() if key != "params"} | {"params": numbers})
    return made
