"""One flat configuration: it makes the command line, travels in every checkpoint as JSON, and rebuilds the model."""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, get_type_hints

from models.presets import PRESETS
from models.residual import PLACES
from nn.checks import at_least
from nn.init import INITS
from nn.spec import nearest


def flag(section: str, default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata=dict(section=section, help=help, choices=choices))


@dataclass
class Config:
    """Everything a run is made of. The fields of the section `model` are set by the preset that `model` names."""

    data: str = flag("data", "python",
                     "what to learn from: python (its standard library); files, folders, globs, URLs, joined by commas; or a "
                     "task, task:induction:length=64 (--list task)")
    val_data: str = flag("data", "", "what to validate on (default: a tenth of the documents)")
    domains: bool = flag("data", False, "each entry of data is a kind of text of its own (moe:router=hash/domains=2)")
    tokenizer: str = flag("data", "bpe", "bpe (trained on the data), byte, a path, or the name of a tiktoken encoding")

    model: str = flag("model", "small", f"a preset, which sets all of this section: {', '.join(PRESETS)}")
    mixer: str = flag("model", "", "mixers, cycling over the depth: gqa or gqa:kv_heads=2,none")
    ffn: str = flag("model", "", "feed-forward layers, cycling over the depth: swiglu")
    stem: str = flag("model", "", "sublayers before the layers: ngram")
    stack: str = flag("model", "", 'every sublayer spelled out instead: "(gqa swiglu)*3 gqa mlp"')
    depth: int = flag("model", 0, "layers, each a mixer and an ffn")
    dim: int = flag("model", 0, "width of the residual stream")
    heads: int = flag("model", 0, "attention heads, where a mixer's spec does not say")
    vocab_size: int = flag("model", 0, "pieces of the tokenizer that is trained (others bring their own)")
    seq_len: int = flag("model", 0, "tokens a training sequence")
    norm: str = flag("model", "", "normalisation: rmsnorm, layernorm, powernorm, … (--list norm)")
    norm_place: str = flag("model", "pre", "where it stands: before a sublayer, on the residual sum, …", PLACES)
    embedding_norm: str = flag("model", "none", "a norm of the embeddings; first: which the first sublayer reads as it is",
                               ("none", "extra", "first"))
    position: str = flag("model", "", "position encoding: none, learned, sinusoidal, rope, alibi, t5, relative")
    head: str = flag("model", "linear", "what gives the logits: linear, transform (BERT's: dense, activation, norm, bias)")
    tie: bool = flag("model", False, "use the embedding as the output head too")
    embedding_scale: float = flag("model", 1.0, "multiply the embeddings by this")
    softcap: float = flag("model", 0.0, "squash logits into this bound by tanh (0: none)")
    objective: str = flag("model", "next", "what is learned: next (a decoder) or masked:rate=0.3 (an encoder)")
    init: str = flag("model", "", "initialisation", tuple(INITS))

    weights: str = flag("training", "", "start from these weights: a checkpoint or a Hugging Face folder")
    adapt: str = flag("training", "", "what learns instead of the weights, which are frozen: lora:rank=8 (--list adapter)")
    only: str = flag("training", "", "parameters that learn, the others staying as they are: *.layer.query.*,head.*")
    teacher: str = flag("training", "", "learn from this model instead of the targets: a checkpoint or a Hugging Face folder")
    match: str = flag("training", "", "what is to be as the teacher's: logits (the default), outputs, matrices (--list match)")
    steps: int = flag("training", 0, "optimizer steps (0: as many as the minutes allow)")
    minutes: float = flag("training", 3.3, "wall-clock time of training, where no steps are given")
    batch_size: int = flag("training", 16, "sequences a step, over all processes")
    accumulate: int = flag("training", 1, "split each step's batch into this many parts, one after the other")
    optimizer: str = flag("training", "muon:lr=0.02", "what moves the hidden matrices: muon, adamw, lamb, …")
    rest_optimizer: str = flag("training", "adamw:lr=0.004:betas=0.8+0.95:eps=1e-10:weight_decay=0",
                               "what moves head, embeddings and vectors")
    embedding_lr: float = flag("training", 0.02, "learning rate of the embeddings")
    schedule: str = flag("training", "wsd:warmup=0:decay=0.5", "learning rate over the run: cosine, linear, wsd, rsqrt")
    backprop: str = flag("training", "plain",
                         "what is kept for the backward pass: plain, checkpoint, selective, stream:chunks=8")
    clip: float = flag("training", 0.0, "largest norm of the gradient (0: no limit)")
    packed: bool = flag("training", False, "tokens attend only within their own document")
    seed: int = flag("training", 0, "of weights and batches")

    device: str = flag("machine", "auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = flag("machine", "auto",
                      "of matrix products; auto: bfloat16 where it is faster", ("auto", "float32", "bfloat16", "float16"))
    mesh: str = flag("machine", "", "how processes share the work: fsdp=4,tp=2, of pp, dp, ep, fsdp, ring, ulysses, tp")
    pipeline: str = flag("machine", "1f1b", "the schedule of pp: gpipe, 1f1b, interleaved:stages=2, looped (--list pipeline)")
    offload: bool = flag("machine", False, "the optimizer's state and its steps live in the host's memory")
    tp_overlap: bool = flag("machine", False, "tp computes while its messages travel, in chunks (attention, ffns)")
    compile: bool = flag("machine", False, "compile the model with torch.compile (CPU: needs a C++ compiler)")

    out: str = flag("output", "", "folder of the run (default: runs/<date>-<time>)")
    eval_every: int = flag("output", 100, "steps between evaluations (0: only at the end)")
    eval_tokens: int = flag("output", 32768, "tokens of such an evaluation; the last one reads all")
    save_every: int = flag("output", 500, "steps between checkpoints (0: only at the end)")
    save_behind: bool = flag("output", False, "write checkpoints while the run goes on, from copies in the host's memory")
    keep: int = flag("output", 2, "checkpoints kept")
    sample: int = flag("output", 200, "tokens of the sample at the end")

    def __post_init__(self):
        for name, kind in get_type_hints(Config).items():
            value = getattr(self, name)
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(f"{name}: {value!r} is not of type {kind.__name__}")
        if self.model not in PRESETS:
            raise ValueError(f"model: no preset {self.model!r}{nearest(self.model, PRESETS)}; there are: {', '.join(PRESETS)}")
        for name, least in LEAST.items():
            at_least(least, **{name: getattr(self, name)})
        if self.domains and self.data.startswith("task:"):
            raise ValueError("domains: a task is of one kind; texts are what may be of several")
        for spec in dataclasses.fields(self):
            choices = spec.metadata["choices"]
            if choices and getattr(self, spec.name) not in choices:
                raise ValueError(f"{spec.name}: {getattr(self, spec.name)!r} is not one of {', '.join(choices)}")

    @classmethod
    def of(cls, **given: Any) -> "Config":
        """The configuration of a preset (`model`, default small) with the given fields changed."""
        preset = PRESETS.get(given.get("model", cls.model), {})
        return cls(**preset | given)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Config":
        """Rebuild what `to_json` gave. ValueError for a field that does not exist or a value of the wrong type."""
        fields = get_type_hints(cls)
        for name in values:
            if name not in fields:
                raise ValueError(f"config: there is no field {name!r}{nearest(name, fields)}")
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


LEAST = dict(depth=0, dim=1, heads=1, vocab_size=1, seq_len=1, softcap=0, steps=0, minutes=0, batch_size=1, accumulate=1,
             embedding_lr=0, clip=0, eval_every=0, eval_tokens=1, save_every=0, keep=1, sample=0)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one line, and whose flags cannot be abbreviated."""

    def __init__(self, **options: Any):
        formatter = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=118)  # noqa: E731
        super().__init__(allow_abbrev=False, formatter_class=formatter, **options)

    def error(self, message: str) -> NoReturn:
        flags = [option for action in self._actions for option in action.option_strings]
        unknown = message.removeprefix("unrecognized arguments: ")
        hint = nearest(unknown.split("=")[0].partition(" ")[0], flags) if unknown != message else ""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}{hint}\n")


def status_of(name: str, act: Callable[[], None]) -> int:
    """Do it: 0, or after a ValueError 2, which is told in one line."""
    try:
        act()
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return 0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each field, in sections; one that is not given leaves no trace in the parsed namespace."""
    hints, groups = get_type_hints(Config), {}
    for spec in dataclasses.fields(Config):
        section, help, choices = (spec.metadata[key] for key in ("section", "help", "choices"))
        group = groups.get(section) or groups.setdefault(section, parser.add_argument_group(section))
        name, kind = "--" + spec.name.replace("_", "-"), hints[spec.name]
        by_preset = spec.name in PRESETS["small"]
        shown = PRESETS["small"][spec.name] if by_preset else spec.default
        help = f"{help} [{shown}]" if shown != "" else help
        options = dict(default=argparse.SUPPRESS, help=help.replace("%", "%%"))
        if kind is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, **options)
        else:
            metavar = None if choices else {int: "N", float: "X", str: "…"}[kind]
            group.add_argument(name, type=kind, choices=choices, metavar=metavar, **options)



def numbers(text: str, name: str) -> list[float]:
    """The numbers of a flag that takes several, as 1,2,4. ValueError that names the flag."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 <= value < 1e9 for value in values):
        raise ValueError(f"{name}: numbers with commas between them, as 1,2,4, not {text!r}")
    return values
