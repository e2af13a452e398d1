"""A larger dense model out of a trained one: deeper by copies of layers, wider by copies of channels, heads and neurons.

    python -m models.grow runs/20261120-121353 --width 512 --depth 6 --out grown
    python train.py --weights grown --steps 500

The first half, Scale-Up, of EfficientScale (Zhang et al. 2024, "AquilaMoE", arXiv:2408.06567), whose second, Scale-Out, is
`models.upcycle`. Width comes first (models/widen.py): `fpi` keeps what the model computes, `aki` breaks the symmetry of the
copies. Then depth, of L layers:

    interpolate   1 1 2 2 … L L     every copy next to its original, as in AquilaMoE's AKI-Pro
    stack         1 … L 1 … L       the whole stack again, as in bert2BERT (Chen et al. 2021, arXiv:2110.07143)

Neither keeps the function. A layer adds to the residual stream what suits its place; next to its original it reads nearly
what that one read, while layer 1 upon layer L reads something it has never seen.
"""

import sys
from dataclasses import replace

import torch

from models.checkpoint import load_weights, model_tensors
from models.config import Config, Parser
from models.language_model import LanguageModel
from models.stack import cycled, layer_numbers, names, parse_stack
from models.transform import command
from models.widen import widen
from nn.embedding import EMBEDDINGS

ORDERS = {
    "interpolate": lambda old, new: [place * old // new for place in range(new)],
    "stack": lambda old, new: [place % old for place in range(new)],
}


def grow(
    model: LanguageModel,
    *,
    depth: int | None = None,
    width: int | None = None,
    order: str = "interpolate",
    method: str = "fpi",
    ffn_width: int | None = None,
    seed: int = 0,
) -> LanguageModel:
    """A model of `width` and `depth`, each the same as before where it is None. ValueError as `widen` and `deepen` say."""
    if width is not None or ffn_width is not None:
        model = widen(model, width or model.config.dim, method=method, ffn_width=ffn_width, seed=seed)
    return model if depth is None else deepen(model, depth, order=order)


def deepen(model: LanguageModel, depth: int, *, order: str = "interpolate") -> LanguageModel:
    """A model of `depth` layers, of which each is a copy of one of this model's, in one of ORDERS.

    What stands before the first layer stays there once. ValueError for fewer layers than there are.
    """
    if order not in ORDERS:
        raise ValueError(f"order: {order!r} is none of {', '.join(ORDERS)}")
    if model.config.adapt:
        raise ValueError("adapt: the model is adapted; python -m models.merge_adapter makes it plain")
    if model.config.embedding_norm == "first":
        raise ValueError("embedding_norm: 'first' leaves the first layer without a norm that its copies would need")
    stem, groups = layers_of(model)
    if not groups:
        raise ValueError("depth: the model has no layer of which there could be more")
    if depth < len(groups):
        raise ValueError(f"depth: {depth} is less than the {len(groups)} layers that there are")
    sources = ORDERS[order](len(groups), depth)
    numbers = [*stem, *(number for source in sources for number in groups[source])]  # of the sublayer that each one copies
    with torch.device("meta"):
        made = LanguageModel(deeper(model.config, sources, [model.specs[number] for number in numbers]))
    ours, tensors = model.state_dict(), {}
    for name in model_tensors(made):
        head, *rest = name.split(".", 2)
        source = f"stack.{numbers[int(rest[0])]}.{rest[1]}" if head == "stack" else name
        tensors[name] = ours[source].clone()
    load_weights(made, tensors, "deepen")
    return made.train(model.training)


def layers_of(model: LanguageModel) -> tuple[list[int], list[list[int]]]:
    """The numbers of the sublayers before the first layer, and those of each layer."""
    config, first, groups = model.config, 0, {}
    if not config.stack:
        mixers, ffns, first = config.mixer.split(","), config.ffn.split(","), len(parse_stack(config.stem))
        sizes = [(mixers[i % len(mixers)] != "none") + (ffns[i % len(ffns)] != "none") for i in range(config.depth)]
        ends = [first + sum(sizes[: i + 1]) for i in range(config.depth)]
        return list(range(first)), [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    while first < len(model.specs) and names(model.specs[first])[0] in EMBEDDINGS:
        first += 1
    for number, layer in list(enumerate(layer_numbers(model.specs)))[first:]:
        groups.setdefault(layer, []).append(number)
    return list(range(first)), list(groups.values())


def deeper(config: Config, sources: list[int], specs: list[str]) -> Config:
    """The configuration whose layers are copies of those numbered `sources`; `specs` are then all sublayers."""
    if config.stack:
        return replace(config, stack=" ".join(specs))
    mixers, ffns = config.mixer.split(","), config.ffn.split(",")
    lists = [cycled([specs[source % len(specs)] for source in sources]) for specs in (mixers, ffns)]
    return replace(config, depth=len(sources), mixer=lists[0], ffn=lists[1])


def flags(parser: Parser) -> None:
    parser.add_argument("--depth", type=int, default=None, metavar="N", help="layers to have [as many as there are]")
    parser.add_argument("--width", type=int, default=None, metavar="N", help="channels of the stream to have [as there are]")
    parser.add_argument("--order", default="interpolate", choices=tuple(ORDERS), help="where copies stand [interpolate]")
    parser.add_argument("--method", default="fpi", choices=("fpi", "aki"), help="what new units get [fpi]")
    parser.add_argument("--ffn-width", type=int, default=None, metavar="N", help="neurons of an ffn [in proportion]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of which units are copied once more [0]")


def main(argv: list[str] | None = None) -> int:
    return command(argv, "grow", __doc__, flags, grow)


if __name__ == "__main__":
    sys.exit(main())
