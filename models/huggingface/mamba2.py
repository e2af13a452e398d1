"""Mamba-2 checkpoints: a stack of state space duality alone. Those of the authors' package mamba_ssm are read too."""

import math

from models.huggingface.mamba import IGNORED, PREFIX, common_in, common_out, common_table, made_of, sizes_in
from models.huggingface.table import Entry
from models.language_model import LanguageModel
from nn.ssm import Mamba2

__all__ = ["IGNORED", "PREFIX", "config_in", "config_out", "fits", "table"]


def config_in(published: dict) -> dict:
    """Fields of config.json -> fields of ours."""
    heads, head_dim = published["num_heads"], published["head_dim"]
    inner = published.get("expand", 2) * published["hidden_size"]
    if heads * head_dim != inner:
        raise ValueError(f"config.json: num_heads = {heads} of head_dim = {head_dim} are not {inner} channels")
    least, most = (bound_in(value) for value in published.get("time_step_limit") or (0.0, math.inf))
    mixer = f"mamba2{common_in(published)}:head_dim={head_dim}:groups={published['n_groups']}"
    mixer += f":dt_min={least}:dt_max={most}:eps={published.get('layer_norm_epsilon', 1e-5)}"
    return sizes_in(published, "mamba2-130m", tie=False) | dict(mixer=mixer)


def bound_in(value: float | str | dict) -> float:
    """A number of config.json; newer files write infinity as {"__float__": "Infinity"}, older ones as Infinity."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def fits(model: LanguageModel) -> bool:
    """Whether the parts are those that `config_out` asks; that nothing else differs is seen by reading it again."""
    return made_of(model, Mamba2)


def config_out(model: LanguageModel) -> dict:
    mixer = model.stack[0].layer
    own = dict(
        architectures=["Mamba2ForCausalLM"],
        num_heads=mixer.heads,
        head_dim=mixer.head_dim,
        n_groups=mixer.groups,
        time_step_limit=[mixer.dt_min, mixer.dt_max],
    )
    return own | common_out(model)


def table(model: LanguageModel) -> list[Entry]:
    """Their tensors and ours, in the order of the file."""
    return common_table(model, {"dt_bias": "dt_bias", "A_log": "A_log", "D": "D", "norm.weight": "gain"})
