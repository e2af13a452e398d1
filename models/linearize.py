"""Put mixers of another kind in the place of a trained model's attention, and keep every weight that fits.

    python -m models.linearize runs/20261120-121353 --mixer discrete_mamba2 --out student
    python train.py --weights student --teacher runs/20261120-121353 --match outputs

What a distillation begins with: embeddings, norms, ffns and head are the teacher's, and so are the projections of its
attention where the new mixer has tensors of the same names and shapes. So begins Zhang et al. 2024, "LoLCATs: On Low-Rank
Linearizing of Large Language Models" (arXiv:2410.10254), and Bick et al. 2024, "Transformers to SSMs" (arXiv:2408.10189),
with projections only in later code. With `--layers` some layers keep their attention: a hybrid.
"""

import sys
from dataclasses import replace

from torch import nn

from models.config import Config, Parser
from models.language_model import LanguageModel, build_model
from models.residual import BESIDE
from models.stack import MIXERS, cycled, layer_numbers, parse_stack
from models.transform import command
from nn.attention import ATTENTION
from nn.spec import arguments, resolve


def linearize(model: LanguageModel, mixer: str, *, layers: str = "all", seed: int = 0) -> LanguageModel:
    """A model whose `layers` (as `numbered` reads them) have this mixer instead of their attention; new weights of the seed.

    Options of the old mixer's spec that the new one has too are carried over where `mixer` does not give them. ValueError
    for layers that have no attention, or an option that the new mixer cannot have.
    """
    resolve(mixer, MIXERS, "mixer")
    numbers, specs = layer_numbers(model.specs), list(model.specs)
    attending = {n: i for i, n in enumerate(numbers) if any(name_of(part) in ATTENTION for part in BESIDE.split(specs[i]))}
    if not attending:
        raise ValueError(f"mixer: no layer has attention, in whose place {mixer!r} could stand")
    chosen = sorted(attending) if layers == "all" else numbered(layers, max(numbers))
    for number in chosen:
        if number not in attending:
            raise ValueError(f"layers: layer {number} has no attention; {', '.join(map(str, sorted(attending)))} have")
        i = attending[number]
        branches = getattr(model.stack[i].layer, "branches", [model.stack[i].layer])
        parts = zip(BESIDE.split(specs[i]), branches, strict=True)
        specs[i] = "+".join(carried(mixer, part, old) if name_of(part) in ATTENTION else part for part, old in parts)
    made = build_model(spelled(model.config, specs), seed=seed).to(model.embedding.weight)
    tensors, new = made.state_dict(), {*unmatched(made, model)}
    made.load_state_dict({name: fresh if name in new else model.state_dict()[name] for name, fresh in tensors.items()})
    return made.train(model.training)


def unmatched(model: nn.Module, other: nn.Module) -> list[str]:
    """The names of a model's tensors of which another has none of the same name and shape."""
    theirs = {name: tensor.shape for name, tensor in other.state_dict().items()}
    return [name for name, tensor in model.state_dict().items() if theirs.get(name) != tensor.shape]


def carried(mixer: str, old: str, layer: nn.Module) -> str:
    """The spec of the new mixer with the options that its place had; `mqa` says its one key/value head by its name alone."""
    new = arguments(resolve(mixer, MIXERS, "mixer")[0])
    given = {pair.partition("=")[0] for pair in mixer.split(":")[1:]}
    had = dict(pair.split("=", 1) for pair in old.split(":")[1:])
    if "kv_heads" not in arguments(MIXERS[name_of(old)]) and getattr(layer, "kv_heads", layer.heads) != layer.heads:
        had["kv_heads"] = str(layer.kv_heads)
    return ":".join([mixer, *(f"{key}={value}" for key, value in had.items() if key in new and key not in given)])


def name_of(spec: str) -> str:
    return spec.partition(":")[0]


def numbered(text: str, last: int) -> list[int]:
    """`first,3-5,last` -> [1, 3, 4, 5, last]: numbers of layers from 1 on. ValueError for what is none."""
    words, found = {"first": 1, "last": last}, set()
    for part in text.split(","):
        ends = [words.get(end, int(end) if end.isascii() and end.isdigit() else 0) for end in part.strip().split("-")]
        if len(ends) > 2 or not 1 <= ends[0] <= ends[-1] <= last:
            raise ValueError(f"layers: {part!r} is none of 1 to {last}, first, last, or a range as in 2-{last}")
        found.update(range(ends[0], ends[-1] + 1))
    return sorted(found)


def spelled(config: Config, specs: list[str]) -> Config:
    """The configuration whose sublayers are `specs`, of the kinds that its own are."""
    if config.stack:
        return replace(config, stack=" ".join(specs))
    stem = parse_stack(config.stem)
    kinds, rest, listed = (config.mixer.split(","), config.ffn.split(",")), specs[len(stem) :], ([], [])
    for i in range(config.depth):
        for names, found in zip(kinds, listed, strict=True):
            there = names[i % len(names)] != "none"
            found.append(rest[0] if there else "none")
            rest = rest[there:]
    stem = config.stem if specs[: len(stem)] == stem else " ".join(specs[: len(stem)])
    return replace(config, stem=stem, mixer=cycled(listed[0]), ffn=cycled(listed[1]))


def flags(parser: Parser) -> None:
    parser.add_argument("--mixer", required=True, metavar="…", help="what stands in the place of attention: discrete_mamba2")
    parser.add_argument("--layers", default="all", metavar="…", help="which layers change: first,3-5,last [all]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the new weights [0]")


def change(model: LanguageModel, **options) -> LanguageModel:
    """What `linearize` gives, with a line about the tensors that were copied, drawn and left behind."""
    made = linearize(model, **options)
    new, lost = unmatched(made, model), unmatched(model, made)
    print(f"{len(made.state_dict()) - len(new)} tensors copied, {len(new)} new: {kinds(new)}; left behind: {kinds(lost)}")
    return made


def kinds(names: list[str]) -> str:
    """The names without the places of their sublayers (stack.N.), each once."""
    return ", ".join(dict.fromkeys(name.split(".", 2)[-1] if name.startswith("stack.") else name for name in names)) or "none"


def main(argv: list[str] | None = None) -> int:
    return command(argv, "linearize", __doc__, flags, change)


if __name__ == "__main__":
    sys.exit(main())
