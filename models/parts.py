"""The parts of a model as models.plan takes them: what each holds, computes, keeps and sends on a mesh of ranks."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import lcm

import torch
from torch import Tensor, nn

from models.config import Config
from models.describe import kept_bytes, linear_flops
from models.language_model import LanguageModel
from models.parallel import check as check_mesh
from models.plan import ACTIVATION, Part
from models.residual import Residual
from models.weights import skeleton
from nn.attention.gqa import GQA
from nn.attention.mhe import MHE
from nn.attention.mla import MLA
from nn.attention.tpa import TPA
from nn.context import Context
from nn.embedding.ngram import NgramEmbedding
from nn.moe.moa import MoA
from nn.moe.moe import MoE
from nn.parallel.tensor import Cut, cutter_of
from nn.ssm.mamba2 import Mamba2

# H query heads of width D, K key/value heads whose values are Dv wide


def parts_of(config: Config, sizes: dict[str, int]) -> list[Part]:
    """Embedding, sublayers and head of a model for a mesh with these sizes. ValueError where they cannot share it out."""
    model = skeleton(config)
    check_mesh(sizes, False, model)
    *kept, rest = kept_bytes(replace(config, backprop="plain"), config.seq_len, torch.bfloat16)
    heads, seen = heads_of(model), set()
    layers = [sublayer_part(s, own, heads, config, sizes, seen) for s, own in zip(model.stack, kept, strict=True)]
    embedding = numbers_of([model.embedding, model.position, model.embedding_norm], seen)
    head = numbers_of([model.final_norm, model.transform, model.head], seen)
    tied = model.head.weight.numel() if config.tie and sizes["pp"] > 1 else 0  # the last stage has a copy
    flops = linear_flops([*model.transform.modules(), model.head]) * config.seq_len
    return [Part(embedding), *layers, Part(head + tied, flops=flops, kept=rest, tied=tied)]


def numbers_of(modules: list[nn.Module], seen: set[int]) -> int:
    """How many parameters they have that are not in `seen`, where they are then put."""
    return sum(p.numel() for m in modules for p in m.parameters() if not (id(p) in seen or seen.add(id(p))))


def heads_of(model: LanguageModel) -> dict[nn.Module, tuple[int, int, int, int]]:
    """(H, D, K, Dv) of each layer whose attention ranks can share, as seen when a few tokens go through."""
    found: dict[nn.Module, tuple[int, int, int, int]] = {}

    def watch(layer: nn.Module, attend: Callable) -> None:
        def watched(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
            found[layer] = q.shape[1], q.shape[-1], k.shape[1], v.shape[-1]
            return attend(q, k, v, context)

        layer.attend = watched

    for layer in model.stack.modules():
        own = isinstance(layer, GQA) and (type(layer).forward, type(layer).attend) == (GQA.forward, GQA.attend)
        if own or isinstance(layer, (MLA, TPA, MHE, MoA)):  # as nn/parallel/mixers.py has it
            watch(layer, layer.attend)
    model(torch.zeros(1, 2, dtype=torch.int64, device="meta"))
    return found


def sublayer_part(residual: Residual, kept: int, heads: dict, config: Config, sizes: dict[str, int], seen: set[int]) -> Part:
    """Changes the residual's layers: afterwards they are those of a rank of tp."""
    layers, tp, seq_len = list(getattr(residual.layer, "branches", [residual.layer])), sizes["tp"], config.seq_len
    mixing = residual.layer.mixing_flops(seq_len, seq_len) if residual.is_mixer else 0
    flops = linear_flops(residual.modules()) * seq_len + mixing
    products = ACTIVATION * seq_len * sum(m.out_features for m in residual.modules() if isinstance(m, nn.Linear))
    mixtures = [layer for layer in layers if isinstance(layer, MoE)]
    for layer in mixtures:
        if layer.experts.experts % sizes["ep"]:
            raise ValueError(f"mesh: ep={sizes['ep']} cannot share out {layer.experts.experts} experts evenly")
    experts = sum(p.numel() for layer in mixtures for p in layer.experts.parameters())
    cuts = cuts_of(layers, tp) if tp > 1 else []
    shared = cuts is not None
    pairs = zip(layers, cuts or [], strict=False)
    cut = sum(p.numel() for layer, made in pairs for name, p in layer.named_parameters() if name in made.along)
    sent = Counter(routed=sum(layer.main * config.dim for layer in mixtures))
    for layer in layers:
        if hasattr(layer, "init_state"):
            sent.update(messages_of(layer, heads, config.dim, sizes, tp if shared else 1))
    return Part(numbers_of([residual], seen), cut, experts, flops, kept, products, mixing, shared, **sent)


def cuts_of(layers: list[nn.Module], tp: int) -> list[Cut] | None:
    """How tp cuts each layer of a sublayer, as nn/parallel/tensor.py does it; None where it does not."""
    cutters = [cutter_of(layer) for layer in layers]
    cuts = [cutter(layer, 0, tp, None) for cutter, layer in zip(cutters, layers, strict=True)] if all(cutters) else [None]
    return None if None in cuts else cuts


def messages_of(mixer: nn.Module, heads: dict, dim: int, sizes: dict[str, int], tp: int) -> dict[str, int]:
    """Numbers a token that a mixer sends where ranks share the positions, as nn/parallel/mixers.py does it: fields of Part."""
    ulysses, ranks = sizes["ulysses"], sizes["ulysses"] * sizes["ring"]
    if mixer in heads:
        H, D, K, Dv = heads[mixer]
        H, K = H // tp, K // tp
        check("ulysses", ulysses, H)
        K = lcm(K, ulysses)  # each is sent to all that need it
        return dict(exchanged=H * (D + Dv) + K * (D + Dv), passed=K * (D + Dv))
    if isinstance(mixer, Mamba2) and type(mixer).forward is Mamba2.forward:
        check("ring x ulysses", ranks, mixer.heads)
        return dict(scanned=2 * mixer.inner + 2 * lcm(mixer.groups, ranks) * mixer.state + mixer.heads)
    return {} if isinstance(mixer, NgramEmbedding) else dict(gathered=dim)


def check(axis: str, ranks: int, heads: int) -> None:
    if heads % ranks:
        raise ValueError(f"mesh: {axis}={ranks} cannot share out {heads} heads of a rank evenly")
