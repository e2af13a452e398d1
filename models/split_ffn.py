"""Split the feed-forward layers of a trained dense model into experts: fewer FLOPs a token from the same parameters.

    python -m models.split_ffn runs/20261120-121353 --experts 8 --top-k 2 --method random --out mixture
    python train.py --weights mixture --steps 500

Zhu et al. 2024, "LLaMA-MoE: Building Mixture-of-Experts from LLaMA with Continual Pre-training" (arXiv:2406.16554), section 3:
a gated layer is a sum over its F neurons, so that n experts with F / n of them each are, all together, the layer that was:

    y = sum_j w_down,j f(w_gate,j x) (w_up,j x) = sum_e E_e(x);     now y = s sum over the k chosen of g_e E_e(x)

The noisy router g of Shazeer et al. 2017 has the sum 1 over the chosen, with both losses of balance at 0.01; s is n / k, as in
the authors' released models. What was left out has to be learned again. How neurons are shared out:

    random   in equal parts, the paper's best
    kmeans   by a balanced k-means of the unit rows of W_up: neurons that look at the same stand together
    inner    each expert takes the F / n neurons most important for a group of texts of its own; one may be in several
    inter    neurons that most experts would take so become `shared` experts, always on; the others go the way of inner

Importance needs texts, and is worked out by `neuron_importance`; as a command there are the first two.
"""

import sys
from collections.abc import Iterable
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from models.checkpoint import model_tensors
from models.config import Parser
from models.language_model import LanguageModel
from models.transform import command
from models.upcycle import Place, assembled, dense_ffns, moe_spec, router_tensors, shared_flags, with_specs
from nn.checks import at_least

METHODS = ("random", "kmeans", "inner", "inter")

# F neurons, E experts, W = F / E neurons of an expert


def split(
    model: LanguageModel,
    *,
    experts: int = 8,
    top_k: int = 2,
    method: str = "random",
    shared: int | None = None,
    importance: dict[str, Tensor] | None = None,
    scaling: float | None = None,
    layers: str = "all",
    every: int = 1,
    router_std: float = 0.02,
    seed: int = 0,
    options: str = "",
) -> LanguageModel:
    """A model in which the dense ffns of `layers`, of these each `every`-th, are mixtures of their own neurons.

    The layer's neurons are `experts` equal parts, and with `inter` as many as `shared` more (1), which is then also that
    option of moe. `scaling` is s, `importance` what `neuron_importance` gives for `experts` groups of texts, `options`
    are further ones of moe. ValueError where a width does not divide, and as `upcycle` says.
    """
    if method not in METHODS:
        raise ValueError(f"method: {method!r} is none of {', '.join(METHODS)}")
    shared = int(method == "inter") if shared is None else shared
    if bool(shared) != (method == "inter"):
        raise ValueError(f"shared: {shared} experts; inter has at least 1, the other methods have none")
    if (importance is None) == (method in ("inner", "inter")):
        raise ValueError(f"importance: inner and inter need it, random and kmeans do not; the method is {method}")
    at_least(1, experts=experts, top_k=top_k)
    places = dense_ffns(model, layers, every)
    scaling = experts / top_k if scaling is None else scaling
    further = (f"shared={shared}" * bool(shared), f"scaling={scaling}".removesuffix(".0"), options)
    further = ("router=noisy/importance=0.01/load=0.01:balance=0:z=0", *further)
    tensors, specs = {name: tensor.clone() for name, tensor in model_tensors(model).items()}, []
    for place in places:
        width, left = divmod(place.width, experts + shared)
        if left:
            raise ValueError(f"experts: {place.width} neurons are not {experts + shared} equal parts")
        specs.append(moe_spec(place, experts=experts, top_k=top_k, width=width, options=further))
        if importance is not None and place.prefix not in importance:
            raise ValueError(f"importance: there is none for {place.prefix}")
        weights = None if importance is None else importance[place.prefix]
        routed, always = neurons(place, method, experts, shared, weights, seed)
        for name in place.names:
            matrix = tensors.pop(f"{place.prefix}{name}.weight")
            tensors[f"{place.prefix}experts.{name}.weight"] = stacked(matrix, name, routed)
            if shared:
                tensors[f"{place.prefix}shared.{name}.weight"] = stacked(matrix, name, always[None])
        tensors |= router_tensors(place.layer.up.weight, place.prefix, experts, router_std, seed)
        tensors[f"{place.prefix}router.noise.weight"] = torch.zeros_like(tensors[f"{place.prefix}router.gate.weight"])
    return assembled(model, with_specs(model, places, specs), tensors)


def stacked(matrix: Tensor, name: str, chosen: Tensor) -> Tensor:
    """The experts' part of a dense layer's matrix: of `down` (dim, F) -> (E, dim, W), of others (F, dim) -> (E, W, dim)."""
    matrix = matrix.detach()
    return matrix[:, chosen].transpose(0, 1).contiguous() if name == "down" else matrix[chosen]


def neurons(
    place: Place, method: str, experts: int, shared: int, importance: Tensor | None, seed: int
) -> tuple[Tensor, Tensor]:
    """Which neurons each expert has, (E, W), and which the shared ones have, (shared W,); `importance` (E, F)."""
    F, none = place.width, torch.empty(0, dtype=torch.int64)
    width = F // (experts + shared)
    if method == "random":
        random = np.random.default_rng([seed, place.number, place.part])
        return torch.from_numpy(random.permutation(F)).view(experts, width), none
    if method == "kmeans":
        rows = place.layer.up.weight.detach().double().cpu().numpy()  # (F, dim)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        labels = balanced_kmeans(rows / np.maximum(lengths, np.finfo(float).tiny), experts, seed=seed)
        return torch.from_numpy(np.argsort(labels, kind="stable")).view(experts, width), none
    if importance.shape != (experts, F):
        raise ValueError(f"importance: it is {tuple(importance.shape)} for {place.prefix}, not ({experts}, {F})")
    importance = importance.double()
    wanted = torch.zeros_like(importance).scatter(-1, importance.topk(width).indices, 1.0)
    votes = wanted.sum(0) + importance.sum(0) / (importance.sum() + 1e-300)  # the sum decides between equal votes
    always = votes.topk(shared * width).indices
    return importance.index_fill(-1, always, -torch.inf).topk(width).indices, always


def balanced_kmeans(points: np.ndarray, clusters: int, *, seed: int = 0, rounds: int = 100) -> np.ndarray:
    """Labels (n,) of points (n, d) in clusters of equal size, which minimise the squared distances to the clusters' means.

    From a random start two clusters at a time exchange those pairs of points that gain most, as long as they gain, and the
    means follow: no step makes the sum of squares larger, so it ends, in a minimum of its neighbourhood. (The authors solve
    the assignment as a flow of least cost.) ValueError where the sizes cannot be equal.
    """
    if len(points) % clusters:
        raise ValueError(f"clusters: {len(points)} points are not {clusters} equal parts")
    labels = np.random.default_rng(seed).permutation(len(points)) % clusters
    for _ in range(rounds):
        centres = np.stack([points[labels == c].mean(0) for c in range(clusters)])
        nearness = points @ centres.T  # (n, clusters): what else is in a squared distance cancels in an exchange
        before = labels.copy()
        for a, b in combinations(range(clusters), 2):
            gain = nearness[:, b] - nearness[:, a]  # of a point that goes from a to b; one that comes back loses it
            ours, theirs = np.flatnonzero(labels == a), np.flatnonzero(labels == b)
            ours, theirs = ours[np.argsort(-gain[ours])], theirs[np.argsort(gain[theirs])]
            pairs = (gain[ours] - gain[theirs] > 1e-12).sum()  # the best come first
            labels[ours[:pairs]], labels[theirs[:pairs]] = b, a
        if (labels == before).all():
            break
    return labels


def neuron_importance(model: LanguageModel, groups: Iterable[Iterable[tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    """For each dense ffn, by the prefix of its tensors, how much each neuron matters to each group of texts: (groups, F).

    A group is batches of inputs and targets (B, T). With h (B, T, F) what `down` reads, a neuron's importance is
    sum |h dL/dh|: how much the loss would change, to first order, without it (the paper's equation 8).
    """
    places, seen, found = dense_ffns(model), {}, {}

    def remember(prefix: str):
        return lambda layer, given: seen.update({prefix: given[0]})

    hooks = [place.layer.down.register_forward_pre_hook(remember(place.prefix)) for place in places]
    try:
        for group in groups:
            totals = dict.fromkeys((place.prefix for place in places), 0)
            for inputs, targets in group:
                loss = model(inputs, targets)
                gradients = torch.autograd.grad(loss, list(seen.values()))
                for (prefix, hidden), gradient in zip(seen.items(), gradients, strict=True):
                    totals[prefix] = totals[prefix] + (hidden * gradient).abs().sum((0, 1)).detach()
            for prefix, total in totals.items():
                found.setdefault(prefix, []).append(total)
    finally:
        for hook in hooks:
            hook.remove()
    return {prefix: torch.stack(rows) for prefix, rows in found.items()}


def flags(parser: Parser) -> None:
    shared_flags(parser)
    parser.add_argument("--method", default="random", choices=METHODS[:2], help="how neurons are shared out [random]")
    parser.add_argument("--scaling", type=float, default=None, metavar="X", help="of what experts say [experts / top-k]")


def main(argv: list[str] | None = None) -> int:
    return command(argv, "split_ffn", __doc__, flags, split)


if __name__ == "__main__":
    sys.exit(main())
