"""Weights and optimizer state by the names that a checkpoint knows them by, whatever a mesh has made of model and optimizer.

So a checkpoint says the same on every mesh, and a run may go on with another mesh or on one process.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optim.combined import Combined
from optim.state import flatten_state, unflatten_state


class RunState:
    """What a run has learned: the tensors of a model and its optimizer, of which a process may hold parts (DTensors), or none.

    To be made before the model is spread over processes, with or without numbers; `tensors(model)` gives what is saved of it,
    by name, and `optimizer_of(model)` its optimizer: of all, whose state no step has made yet, and by `after`, of a process's
    share. Tensors of the optimizer are named as `flatten_state` names those of one process.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Callable[[nn.Module], dict[str, Tensor]],
        optimizer_of: Callable[[nn.Module], Combined],
    ):
        self.model, self.tensors_of, self.optimizer_of = model, tensors, optimizer_of
        self.shapes = {name: torch.empty_like(parameter, device="meta") for name, parameter in model.named_parameters()}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.before = optimizer_of(model)
        each_one = self.before.optimizers
        self.numbered = [[names[id(p)] for group in each.param_groups for p in group["params"]] for each in each_one]

    def after(self, spread) -> Combined:
        """The optimizer of what this process has of the model since it was spread: see models/parallel.py."""
        self.is_whole = spread.is_whole
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

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors that this process has, or has a part of."""
        return self.tensors_of(self.model)

    def optimizer(self) -> tuple[dict[str, Tensor], object]:
        """The optimizer's tensors that this process has, or has a part of, and the tree of all. All processes take part."""
        if self.is_whole:
            return flatten_state(self.now.state_dict())
        ours = {path: holder.place.as_param(holder.state[p][key], p) for path, holder, p, key in self.paths()}
        plain = {name: self.numbers(parameter) for name, parameter in self.parameters.items()}
        every: list[dict] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(every, {name: numbers for name, numbers in plain.items() if numbers is not None})
        plain = {name: numbers for of_one in every for name, numbers in of_one.items()}
        saved = []
        for each, names in zip(self.before.optimizers, self.numbered, strict=True):
            there = {number: name for number, name in enumerate(names) if name in plain}
            states = {number: each.init_state(self.shapes[name]) | plain[name] for number, name in there.items()}
            saved.append({"state": states, "param_groups": numbered_groups(each.param_groups)})
        return ours, flatten_state({"optimizers": saved})[1]

    def numbers(self, parameter: Tensor) -> dict | None:
        """What the optimizer remembers of a parameter beside tensors; None before its first step."""
        holder = self.holders.get(id(parameter))
        state = holder and holder.state.get(parameter)
        return {key: value for key, value in state.items() if not isinstance(value, Tensor)} if state else None

    def paths(self) -> list[tuple[str, torch.optim.Optimizer, Tensor, str]]:
        """(path, optimizer, parameter, key) of every tensor of the optimizer's state here."""
        found = []
        for place, names in enumerate(self.numbered):
            for number, name in enumerate(names):
                parameter = self.parameters.get(name)
                holder = None if parameter is None else self.holders[id(parameter)]
                for key, value in holder.state.get(parameter, {}).items() if holder else ():
                    if isinstance(value, Tensor):
                        found.append((f"optimizers/{place}/state/{number}/{key}", holder, parameter, key))
        return found

    @torch.no_grad()
    def load_optimizer(self, tree: object, there: dict[str, Tensor], read: Callable[[dict[str, Tensor]], None]) -> None:
        """Put this process's share of a saved state in its place.

        `tree`: as `optimizer` gave it; `there`: the saved tensors by name, or others of their shapes on the meta device, with
        which `read(tensors)` fills those it is given by the saved ones of their names. ValueError where it is another
        optimizer's state.
        """
        saved = unflatten_state(there, tree)
        self.before.load_state_dict(saved)  # checked, and all that there is to do on one process
        if self.is_whole:
            return
        for each, names, old in zip(self.before.optimizers, self.numbered, saved["optimizers"], strict=True):
            for number, name in enumerate(names):
                parameter, state = self.parameters.get(name), old["state"].get(number)
                if parameter is not None and state:
                    holder = self.holders[id(parameter)]
                    numbers = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
                    holder.state[parameter].update(holder.first_state(parameter) | numbers)
            each.state.clear()
        paths = self.paths()
        tensors = {path: holder.place.as_param(holder.state[p][key], p) for path, holder, p, key in paths}
        read(tensors)
        for path, holder, parameter, key in paths:
            holder.state[parameter][key] = holder.place.state(tensors[path])


def numbered_groups(groups: list[dict]) -> list[dict]:
    """Groups as a state_dict has them: numbers in place of parameters."""
    made, first = [], 0
    for group in groups:
        numbers = list(range(first, first := first + len(group["params"])))
        made.append({key: value for key, value in group.items() if key != "params"} | {"params": numbers})
    return made
