"""Make an adapted model plain: what its adapter learned becomes part of the weights.

    python train.py --weights path/to/Llama-3.2-1B --data notes.jsonl --adapt lora:rank=8 --steps 500 --out runs/notes
    python -m models.merge_adapter runs/notes --out merged

W + (alpha / rank) B A is one matrix, so that nothing is computed beside it any more (Hu et al. 2021, "LoRA: Low-Rank Adaptation
of Large Language Models", arXiv:2106.09685, section 4.1). The plain model can be exported, converted, and adapted anew.
"""

import sys
from copy import deepcopy
from dataclasses import replace

from models.language_model import LanguageModel
from models.transform import command
from nn.adapt.lora import merge


def merged(model: LanguageModel) -> LanguageModel:
    """A plain model that computes the same. ValueError for one that is not adapted."""
    if not model.config.adapt:
        raise ValueError("checkpoint: this model is not adapted; there is nothing to merge")
    made = deepcopy(model)
    merge(made)
    made.config = replace(model.config, adapt="")
    return made


def main(argv: list[str] | None = None) -> int:
    return command(argv, "merge_adapter", __doc__, lambda parser: None, merged)


if __name__ == "__main__":
    sys.exit(main())
