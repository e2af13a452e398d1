"""Begin the last layers of a trained model anew, before it is fine-tuned on little data.

    python -m models.renew_layers runs/20261120-121353 --top 2 --out renewed
    python train.py --weights renewed --data notes.jsonl --steps 500

The layers next to the head are the ones most bound to what a model was trained for. Tinn et al. 2021, "Fine-Tuning Large
Neural Language Models for Biomedical Natural Language Processing" (arXiv:2112.07869), found this the most stable of their
remedies on the smallest data set. Of the others, layerwise learning rates and frozen layers, none is here.
"""

import sys

from models.config import Parser
from models.language_model import LanguageModel, build_model
from models.stack import layer_numbers
from models.transform import command


def renew(model: LanguageModel, top: int, *, seed: int = 0) -> LanguageModel:
    """A model with this one's weights, but in its last `top` layers those that its `init` draws from the seed.

    ValueError if it has fewer layers.
    """
    layers = layer_numbers(model.specs)
    depth = max(layers, default=0)
    if not 1 <= top <= depth:
        raise ValueError(f"top: {top} of {depth} layers; 1 to {depth} can begin anew")
    fresh = build_model(model.config, seed=seed).to(model.embedding.weight)
    renewed = tuple(f"stack.{place}." for place, layer in enumerate(layers) if layer > depth - top)
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(renewed)}
    fresh.load_state_dict(fresh.state_dict() | kept)
    return fresh.train(model.training)


def flags(parser: Parser) -> None:
    parser.add_argument("--top", type=int, default=1, metavar="N", help="layers that begin anew, counted from the head [1]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of their weights [0]")


def main(argv: list[str] | None = None) -> int:
    return command(argv, "renew_layers", __doc__, flags, renew)


if __name__ == "__main__":
    sys.exit(main())
