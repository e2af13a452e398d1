"""Fold norms that are fixed linear maps into the matrices behind them: the same logits with no norm left.

    python -m models.fold_norm runs/20261120-121353 --out folded

Outside of training PowerNorm and UnifiedNorm are y = a x + b by feature, and a removed FakeNorm, with its centring, is
y = A x + b: a linear layer W behind it becomes W A with the bias W b (Shen et al. 2020, arXiv:2003.07845; Yang et al.
2022, arXiv:2208.01313; Baroni et al. 2025, arXiv:2507.02559).
"""

import sys

import torch

from models.language_model import LanguageModel
from models.recast import norms_of, recast
from models.transform import command


def fold(model: LanguageModel) -> LanguageModel:
    """A new model without norms, with the logits that this one has outside of training, up to rounding.

    Where the norms have biases that are not zero, the stream gets one coordinate more, which is 1 in every embedding and
    which nothing writes to: its column in a matrix holds W b, also in layers, and in a head, that have no bias.
    ValueError for norms that are no fixed linear maps.
    """
    forms = [linear_form(norm, model.config.norm) for norm in norms_of(model)]
    device, n = model.embedding.weight.device, model.config.dim
    reads, biases = [form[0].to(device) for form in forms], [form[1].to(device) for form in forms]
    write, origin = torch.eye(n, dtype=torch.float64, device=device), None
    if any(bias.any() for bias in biases):
        reads = [torch.cat([read, bias[:, None]], 1) for read, bias in zip(reads, biases, strict=True)]
        write, origin = torch.cat([write, 0 * write[:1]]), torch.eye(n + 1, dtype=torch.float64, device=device)[-1]
    return recast(model, "none", [{}] * len(reads), reads, write, origin)


def linear_form(norm: torch.nn.Module, spec: str) -> tuple[torch.Tensor, torch.Tensor]:
    if not hasattr(norm, "linear_form"):
        raise ValueError(f"norm: {spec!r} is no fixed linear map; powernorm, unifiednorm and a removed fakenorm are")
    return norm.linear_form()


def main(argv: list[str] | None = None) -> int:
    return command(argv, "fold_norm", __doc__, lambda parser: None, fold)


if __name__ == "__main__":
    sys.exit(main())
