"""Cut one domain out of a model whose experts belong to domains: a small model that computes on this domain what the large did.

    python -m models.extract_domain runs/20261120-121353 --domain 2 --out small

Ren et al. 2023, "PanGu-Sigma" (arXiv:2303.10845), section 3.2: a router that sends a token to the experts of its domain, and
among them by its id (`--ffn moe:router=hash/domains=4`, nn/moe/hashed.py), never asks those of other domains. With D domains
the new model has a D-th of the experts, their tables of ids, all else as it was, and needs to be told no domain. Bounds on
what an expert takes (`capacity`) are shares of a D-th of the experts now, and stay the same numbers of tokens.
"""

import sys

import torch
from torch import Tensor, nn

from models.checkpoint import model_tensors
from models.config import Parser
from models.language_model import LanguageModel
from models.linearize import spelled
from models.residual import BESIDE
from models.transform import command
from models.upcycle import assembled
from nn.moe.experts import StackedLinear
from nn.moe.hashed import HashRouter


def extract(model: LanguageModel, *, domain: int = 0) -> LanguageModel:
    """A model of this domain alone, whose logits are those of `model(tokens, domains=[[domain]])`, bit for bit.

    ValueError where no layer has domains or one has not this one, and for an adapted model.
    """
    if model.config.adapt:
        raise ValueError("adapt: the model is adapted; python -m models.merge_adapter makes it plain")
    tensors, specs, found = dict(model_tensors(model)), [], 0
    for number, (sublayer, spec) in enumerate(zip(model.stack, model.specs, strict=True)):
        branches = getattr(sublayer.layer, "branches", None)
        parts = []
        for part, (layer, words) in enumerate(zip(branches or [sublayer.layer], BESIDE.split(spec), strict=True)):
            if has_domains(layer):
                prefix = f"stack.{number}.layer." + (f"branches.{part}." if branches else "")
                tensors |= {prefix + name: tensor for name, tensor in tensors_of_domain(layer, domain).items()}
                words, found = spec_of_domain(words, layer), found + 1
            parts.append(words)
        specs.append("+".join(parts))
    if not found:
        raise ValueError("domain: no layer has experts that belong to domains (moe:router=hash/domains=4)")
    return assembled(model, spelled(model.config, specs), {name: tensor.detach().clone() for name, tensor in tensors.items()})


def has_domains(layer: nn.Module) -> bool:
    router = getattr(layer, "router", None)
    return isinstance(router, HashRouter) and router.domains > 1


def tensors_of_domain(layer: nn.Module, domain: int) -> dict[str, Tensor]:
    """Of all that a layer has for each expert, and of its router, the part of a domain, by their names in the layer."""
    router = layer.router
    if not 0 <= domain < router.domains:
        raise ValueError(f"domain: {domain} is none of 0 to {router.domains - 1}")
    first, last = domain * router.group, (domain + 1) * router.group
    found = {"router.table": router.table[domain : domain + 1] - first}
    for name, module in layer.named_modules():
        if isinstance(module, StackedLinear) and len(module.weight) == router.experts:  # one that is shared stands alone
            found[f"{name}.weight"] = module.weight[first:last]
    if getattr(layer, "vectors", None) is not None:
        found["vectors"] = layer.vectors[first:last]
    return found


def spec_of_domain(spec: str, layer: nn.Module) -> str:
    """The spec of the layer with the experts of one domain."""
    name, *pairs = spec.split(":")
    options = dict(pair.split("=", 1) for pair in pairs) | {"experts": str(layer.router.group)}
    options["router"] = "/".join(word for word in options["router"].split("/") if not word.startswith("domains="))
    for bound in ("capacity", "eval_capacity"):
        if bound in options:
            options[bound] = repr(float(options[bound]) / layer.router.domains)
    return ":".join([name, *(f"{key}={value}" for key, value in options.items())])


def flags(parser: Parser) -> None:
    parser.add_argument("--domain", type=int, default=0, metavar="N", help="which of the domains, from 0 on [0]")


def main(argv: list[str] | None = None) -> int:
    return command(argv, "extract_domain", __doc__, flags, extract, told=lambda domain: dict(domains=torch.tensor([[domain]])))


if __name__ == "__main__":
    sys.exit(main())
