"""Turn a pre-LN model into an equal one with RMSNorm, or with CRMSNorm in a stream one coordinate narrower.

    python -m models.convert_norm runs/20261120-121353 --to crmsnorm --out converted

LayerNorm is RMSNorm of x - mean(x), so once the residual stream has zero mean, centring it again does nothing: embeddings,
positions and all output projections are centred once and for all. Of n coordinates that sum to zero the last is minus the
sum of the others and need not be carried: what reads them gets W[:, :-1] - W[:, -1:].

Jiang, Gu, Zhu, Pan 2023, "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers"
(arXiv:2305.14858).
"""

import sys
from typing import Literal

import torch

from models.language_model import LanguageModel
from models.recast import norms_of, recast
from models.transform import command
from nn.norm import LayerNorm


def convert(model: LanguageModel, to: Literal["rmsnorm", "crmsnorm"]) -> LanguageModel:
    """A new model with the same logits up to rounding. ValueError for a model whose norms are not all pre-LN.

    To `rmsnorm`: gains and biases stay in the norms. To `crmsnorm`: both fold into the matrices that follow, and the stream
    of width n gets n - 1 numbers. Biases need a constant for these matrices to multiply: where the norms have any that are
    not zero, one coordinate more is carried that is always 0 and gets its 1 from the norm, so that the width is n again.
    """
    norms = norms_of(model)
    if not all(isinstance(norm, LayerNorm) for norm in norms):
        raise ValueError(f"norm: {model.config.norm!r}, but only layernorm can be converted")
    return dict(rmsnorm=to_rmsnorm, crmsnorm=to_crmsnorm)[to](model, norms)


def to_rmsnorm(model: LanguageModel, norms: list[LayerNorm]) -> LanguageModel:
    n, first = model.config.dim, norms[0]
    eye = torch.eye(n, dtype=torch.float64, device=model.embedding.weight.device)
    gain, bias = (str(p is not None).lower() for p in (first.weight, first.bias))
    states = [dict(norm.state_dict()) for norm in norms]
    return recast(model, f"rmsnorm:eps={first.eps}:gain={gain}:bias={bias}", states, [eye] * len(norms), eye - 1 / n)


def to_crmsnorm(model: LanguageModel, norms: list[LayerNorm]) -> LanguageModel:
    n, eps = model.config.dim, norms[0].eps
    if n < 2:
        raise ValueError("dim: a stream of one number has none left when it is compressed")
    eye = torch.eye(n, dtype=torch.float64, device=model.embedding.weight.device)
    expand = torch.cat([eye[:-1, :-1], -torch.ones_like(eye[:1, :-1])])  # (n, n - 1): the last is minus the others' sum
    write, state, factor = (eye - 1 / n)[:-1], {}, 1.0
    constant = any(norm.bias is not None and norm.bias.any() for norm in norms)
    if constant:  # of n numbers CRMSNorm takes the mean of n + 1 squares where n are meant: eps and a factor make up for it
        write, state = torch.cat([write, 0 * write[:1]]), dict(bias=eye[-1])
        eps, factor = eps * n / (n + 1), (n / (n + 1)) ** 0.5
    reads = []
    for norm in norms:
        read = factor * expand if norm.weight is None else factor * norm.weight.detach().double()[:, None] * expand
        reads.append(torch.cat([read, norm.bias.detach().double()[:, None]], 1) if constant else read)
    spec = f"crmsnorm:eps={eps}:gain=false" + ":bias=true" * constant
    return recast(model, spec, [state] * len(norms), reads, write)


def main(argv: list[str] | None = None) -> int:
    def flags(parser):
        parser.add_argument("--to", required=True, choices=("rmsnorm", "crmsnorm"), help="the norm to have")

    return command(argv, "convert_norm", __doc__, flags, lambda model, to: convert(model, to))


if __name__ == "__main__":
    sys.exit(main())
