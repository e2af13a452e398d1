"""What every optimizer here shares: checked groups, wide state, exact checkpoints. A subclass adds only its equation.

Numbers: state and arithmetic are float32 for float16, bfloat16 and float32 parameters and float64 for float64 ones; the
result is rounded once, into the parameter. (torch.optim keeps the state of a bfloat16 parameter in bfloat16, where a
running mean stands still: adding 0.1 % of something rounds to nothing.)
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.shards import local

from .offload import Here


def require(condition: bool, name: str, value: object, wanted: str) -> None:
    """Raise a ValueError naming the argument, what would be right and what came, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name} must be {wanted}, not {value!r}")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a parameter of this dtype is updated: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class Optimizer(torch.optim.Optimizer):
    """A torch.optim.Optimizer given by three methods of a subclass.

    check(group): ValueError naming the first hyperparameter that is out of range (extends the one here).
    init_state(param): the state before the first step, tensors in `wide(param.dtype)`, ints and floats.
    update(group, params, grads, states): one step in place on one bucket of wide parameters with their wide gradients
    (never written to) and states. Of parameters that are cut among processes (DTensors) it gets this process's parts if
    the class is `elementwise`, so that no number needs another; else the DTensors, but still this process's parts of their
    gradients. Of those gradients, and of states, it may find that they are on the host, and what it sends on from there goes
    through `self.place.up(x, param)`; if the class is `elementwise`, the parameters are on the host too (offload.py).

    Every group also gets `base_lr`, its learning rate at construction, so that a schedule can set
    `group["lr"] = group["base_lr"] * multiplier` before each step. Parameters whose gradient is None are left alone.

    Beside its class a module defines `reference_step(param, grad, state, *, …) -> (param, state)`, one step in NumPy
    float64 from its first state `{}`, whose keywords are keys of a group. The contract test holds the class to it.
    """

    place = Here()
    elementwise = True
    ndims: tuple[int, ...] | None = None  # numbers of axes a parameter may have; None: any
    exact: dict = {}  # keywords with which a step equals reference_step up to rounding in the parameter's own dtype

    def check(self, group: dict) -> None:
        """Raise a ValueError naming the first hyperparameter of `group` that is out of range."""
        require(0 <= group["lr"] < math.inf, "lr", group["lr"], "a finite number of at least 0")

    def bucket(self, param: Tensor) -> tuple:
        """A key: parameters of equal keys and dtypes are updated by one call."""
        return (param.device,)

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters with their own hyperparameters. ValueError for one out of range or an unfit parameter."""
        super().add_param_group(param_group)
        group = self.param_groups.pop()  # back only when every check has passed
        group.setdefault("base_lr", group["lr"])
        self.check(group)
        for number, param in enumerate(group["params"]):
            name = self.name(group, number)
            require(param.is_floating_point(), name, param.dtype, "of a real floating-point dtype")
            if self.ndims is not None:
                wanted = f"of {' or '.join(map(str, self.ndims))} axes for {type(self).__name__}"
                require(param.ndim in self.ndims, name, tuple(param.shape), wanted)
        self.param_groups.append(group)

    def name(self, group: dict, number: int) -> str:
        """How to name a parameter in an error: by its name where names were given, else by its place."""
        return f"parameter {group['param_names'][number] if 'param_names' in group else number}"

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Take one step and return the closure's loss, if one was given. ValueError for a sparse gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for number, param in enumerate(group["params"]):
                if param.grad is not None:
                    layout = param.grad.layout
                    require(layout == torch.strided, f"gradient of {self.name(group, number)}", layout, "dense")
            buckets: dict[tuple, list[Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    buckets.setdefault((param.dtype, *self.bucket(param)), []).append(param)
            for (dtype, *_), params in buckets.items():
                dtype = wide(dtype)
                for param in params:
                    if not self.state[param]:
                        self.state[param].update(self.first_state(param))
                states, grads = [self.state[p] for p in params], self.place.gradients(params, dtype)
                if self.elementwise:
                    copies = [self.place.copy(p, dtype) for p in params]  # the parameter itself where it is wide already
                    parts = [{key: local(value) for key, value in state.items()} for state in states]
                    self.update(group, copies, grads, parts)
                    for state, part in zip(states, parts, strict=True):
                        state.update((key, value) for key, value in part.items() if not isinstance(value, Tensor))
                    for param, copy in zip(params, copies, strict=True):
                        self.place.replace(param, copy)
                else:
                    widened = [p.to(dtype) for p in params]
                    self.update(group, widened, grads, states)
                    for param, result in zip(params, widened, strict=True):
                        if result is not param:
                            param.copy_(result)
        return loss

    def first_state(self, param: Tensor) -> dict:
        """`init_state`, in its place."""
        state = self.init_state(param)
        return {key: self.place.state(value) if isinstance(value, Tensor) else value for key, value in state.items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Continue exactly where `state_dict` was taken. ValueError where its groups, sizes or shapes do not fit.

        torch.optim would round the state to the parameter's dtype and share memory with `state_dict`; this copies every
        value as it is, moving tensors to where the state lives.
        """
        require({"state", "param_groups"} <= set(state_dict), "state_dict", sorted(state_dict), "an optimizer's")
        for group in state_dict["param_groups"]:
            wanted = set(self.defaults) | {"params"}
            require(wanted <= set(group), "param_groups of state_dict", sorted(group), f"with {sorted(wanted)}")
            self.check(group)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        require(len(saved) == len(params), "state_dict", len(saved), f"for {len(params)} parameters")
        states = {}
        for number, param in zip(saved, params, strict=True):
            state = state_dict["state"].get(number)
            if not state:
                continue
            first = self.first_state(param)
            require(set(state) == set(first), f"state of parameter {number}", sorted(state), f"made of {sorted(first)}")
            for key, value in state.items():
                shape, wanted = getattr(value, "shape", None), getattr(first[key], "shape", None)
                require(shape == wanted, f"{key} of parameter {number}", shape, f"of shape {wanted}")
            home = self.place.device(param)
            states[param] = {k: v.to(home, copy=True) if isinstance(v, Tensor) else v for k, v in state.items()}
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(states)
        self.place.forget()
