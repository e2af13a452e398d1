"""Mamba checkpoints: a stack of selective state spaces alone. Those of the authors' package mamba_ssm are read too."""

import re

from torch import Tensor

from models.huggingface.table import Entry, check_options
from models.language_model import LanguageModel
from nn.norm import RMSNorm
from nn.position import NoPosition
from nn.ssm import Mamba

PREFIX = "backbone."
IGNORED = re.compile(r"(?!)")
FIRST_VALUES = {"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "conv_init"}
SPEED = {"use_fast_path", "use_mem_eff_path", "chunk_size"}
AUTHORS = {  # ssm_cfg of mamba_ssm -> what transformers calls it, with the default that mamba_ssm has
    "mamba": dict(
        d_state=("state_size", 16), d_conv=("conv_kernel", 4), expand=("expand", 2), dt_rank=("time_step_rank", "auto"),
        bias=("use_bias", False), conv_bias=("use_conv_bias", True),
    ),
    "mamba2": dict(
        d_state=("state_size", 128), d_conv=("conv_kernel", 4), expand=("expand", 2), headdim=("head_dim", 64),
        ngroups=("n_groups", 1), bias=("use_bias", False), conv_bias=("use_conv_bias", True),
        dt_limit=("time_step_limit", [0.0, float("inf")]),
    ),
}  # fmt: skip


class Taps(Entry):
    """The taps of a depthwise convolution: theirs (channels, 1, taps), ours (channels, taps)."""

    def split(self, tensor: Tensor, rows: list[int]) -> list[Tensor]:
        if tensor.ndim != 3 or tensor.shape[1] != 1:
            raise ValueError(f"tensor {self.theirs!r} has the shape {tuple(tensor.shape)}, not (channels, 1, taps)")
        return super().split(tensor[:, 0], rows)

    def join(self, tensors: list[Tensor]) -> Tensor:
        return super().join(tensors)[:, None].contiguous()


def is_authors(published: dict) -> bool:
    """Whether config.json is one of mamba_ssm, which does not name a model_type."""
    return "model_type" not in published and {"d_model", "n_layer", "vocab_size", "ssm_cfg"} <= set(published)


def from_authors(authors: dict) -> dict:
    """config.json of mamba_ssm as transformers would write it. ValueError for an option that is not known here."""
    check_options(authors, dict(rms_norm=True, d_intermediate=0, attn_layer_idx=([], None), attn_cfg=({}, None)))
    ssm = dict(authors["ssm_cfg"])
    layer = ssm.pop("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        raise ValueError(f"config.json: layer {layer!r} in ssm_cfg is not supported, only Mamba1, Mamba2")
    names = AUTHORS["mamba" if layer == "Mamba1" else "mamba2"]
    if unknown := set(ssm) - set(names) - FIRST_VALUES - SPEED:
        raise ValueError(f"config.json: {min(unknown)} in ssm_cfg is not supported, only {', '.join(names)}")
    published = {theirs: ssm.get(name, default) for name, (theirs, default) in names.items()}
    multiple = authors.get("pad_vocab_size_multiple", 8)
    published |= dict(
        model_type="mamba" if layer == "Mamba1" else "mamba2",
        hidden_size=authors["d_model"],
        num_hidden_layers=authors["n_layer"],
        vocab_size=-(-authors["vocab_size"] // multiple) * multiple,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=authors.get("tie_embeddings", True),
    )
    if layer == "Mamba2":
        published["num_heads"] = published["expand"] * published["hidden_size"] // published["head_dim"]
    return published


def sizes_in(published: dict, model: str, *, tie: bool) -> dict:
    """What both families say of a model beside its mixer."""
    check_options(published, dict(hidden_act="silu"))
    return dict(
        model=model,
        depth=published["num_hidden_layers"],
        dim=published["hidden_size"],
        vocab_size=published["vocab_size"],
        norm=f"rmsnorm:eps={published.get('layer_norm_epsilon', 1e-5)}",
        tie=published.get("tie_word_embeddings", tie),
    )


def common_in(published: dict) -> str:
    """The options of the mixer that both families have."""
    spec = f":state={published['state_size']}:expand={published.get('expand', 2)}:conv={published.get('conv_kernel', 4)}"
    return spec + f":bias={published.get('use_bias', False)}:conv_bias={published.get('use_conv_bias', True)}"


def config_in(published: dict) -> dict:
    """Fields of config.json -> fields of ours."""
    rank = published.get("time_step_rank", "auto")
    mixer = "mamba" + common_in(published) + ("" if rank == "auto" else f":dt_rank={rank}")
    return sizes_in(published, "mamba-130m", tie=True) | dict(mixer=mixer)


def made_of(model: LanguageModel, mixer: type) -> bool:
    """Whether a stack is sublayers of one kind of mixer and RMSNorm alone, without positions."""
    norms = [model.final_norm, *(s.norm for s in model.stack)]
    return (
        len(model.stack) > 0
        and all(type(s.layer) is mixer for s in model.stack)
        and all(type(norm) is RMSNorm for norm in norms)
        and type(model.position) is NoPosition
    )


def fits(model: LanguageModel) -> bool:
    """Whether the parts are those that `config_out` asks; that nothing else differs is seen by reading it again."""
    return made_of(model, Mamba)


def common_out(model: LanguageModel) -> dict:
    """The fields of config.json that both families have."""
    mixer = model.stack[0].layer
    return dict(
        num_hidden_layers=len(model.stack),
        hidden_size=model.config.dim,
        vocab_size=model.config.vocab_size,
        layer_norm_epsilon=model.stack[0].norm.eps,
        state_size=mixer.state,
        expand=mixer.inner // model.config.dim,
        conv_kernel=mixer.conv,
        use_bias=mixer.up.bias is not None,
        use_conv_bias=mixer.taps_bias is not None,
        hidden_act="silu",
        tie_word_embeddings=model.config.tie,
    )


def config_out(model: LanguageModel) -> dict:
    mixer = model.stack[0].layer
    own = dict(architectures=["MambaForCausalLM"], intermediate_size=mixer.inner, time_step_rank=mixer.dt_rank)
    return own | common_out(model)


def table(model: LanguageModel) -> list[Entry]:
    """Their tensors and ours, in the order of the file."""
    names = {"A_log": "A_log", "D": "D", "x_proj.weight": "select.weight", "dt_proj.weight": "dt.weight"}
    return common_table(model, names | {"dt_proj.bias": "dt_bias"})


def common_table(model: LanguageModel, names: dict[str, str]) -> list[Entry]:
    """The table of a stack whose mixers have these tensors beside those that both families have."""
    entries = [Entry("embeddings.weight", "embedding.weight")]
    for i, sublayer in enumerate(model.stack):
        theirs, ours = f"layers.{i}.mixer.", f"stack.{i}.layer."
        entries += [Entry(f"layers.{i}.norm.weight", f"stack.{i}.norm.weight")]
        entries += [Taps(f"{theirs}conv1d.weight", f"{ours}taps")]
        if sublayer.layer.taps_bias is not None:
            entries.append(Entry(f"{theirs}conv1d.bias", f"{ours}taps_bias"))
        for kind in ("weight", "bias")[: 1 + (sublayer.layer.up.bias is not None)]:
            pairs = (("in_proj", "up"), ("out_proj", "out"))
            entries += [Entry(f"{theirs}{name}.{kind}", f"{ours}{own}.{kind}") for name, own in pairs]
        entries += [Entry(theirs + name, ours + own) for name, own in names.items()]
    entries.append(Entry("norm_f.weight", "final_norm.weight"))
    return entries + ([] if model.config.tie else [Entry("lm_head.weight", "head.weight", prefixed=False)])
