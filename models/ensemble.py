"""A sparse mixture of experts that never met: whole language models, weighed anew as the context grows.

    p(x_t | x_<t) = sum_j p_j(x_t | x_<t) p(j | x_<t)
    p(j | x_<t) ∝ exp(-dist(h(x_<t), c_j)^2 / T) for the top_k nearest experts, 0 for the others

h(x_<t) is the context as a point, c_j the centre of the cluster that expert j learned from. What the distances are made of is
not known here: they are given as a function of contexts, or measured in a file (`data.contexts`). Gururangan, Li,
Lewis, Shi, Althoff, Smith and Zettlemoyer 2023, "Scaling Expert Language Models with Unsupervised Domain Discovery"
(arXiv:2303.14177). By Jensen's inequality the mixture never needs more nats than its experts do on a weighted
average: -log sum_j w_j p_j <= -sum_j w_j log p_j.

    python -m models.ensemble contexts.safetensors --experts runs/0,runs/1,runs/2,runs/3 --top-k 1,2,4 --temperature 0.1
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from models.checkpoint import find, read_tensors
from models.config import Parser
from models.language_model import DecodingState, LanguageModel
from models.machine import choose_device
from models.weights import load_model
from nn.objective import IGNORED

# B batch, T time, V vocabulary, k experts, P points of the context where weights are made anew

CONTEXTS = ("inputs", "targets", "documents", "distances", "stride", "token_bytes")
Distances = Callable[[Sequence[Tensor]], Tensor]  # contexts, each (t,) int64, to (n, k): from the experts' centres


def expert_weights(distances: Tensor, temperature: float, top_k: int) -> Tensor:
    """(…, k) of distances (…, k): at least 0, summing to 1, at most top_k of them not 0.

    A temperature of infinity weighs the top_k nearest alike, one of 0 gives all to the nearest. ValueError for a top_k outside
    1 to k or a temperature below 0.
    """
    experts = distances.shape[-1]
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k: {top_k} of {experts} experts; at least 1 and no more than there are")
    if not temperature >= 0:
        raise ValueError(f"temperature: {temperature} is not at least 0")
    nearest = distances.topk(1 if temperature == 0 else top_k, largest=False)  # (…, top_k), ascending
    further = nearest.values**2 - nearest.values[..., :1] ** 2  # the nearest keeps a weight however small the temperature
    weights = (-further / (temperature or 1)).softmax(-1)
    return torch.zeros_like(distances).scatter(-1, nearest.indices, weights)


@dataclass
class EnsembleState:
    """What decoding remembers: the tokens so far, the experts' states, each as far as that one was asked, the last weights."""

    tokens: Tensor  # (B, t)
    experts: list[DecodingState]
    weights: Tensor  # (B, k)

    def bytes(self) -> int:
        return sum(state.bytes() for state in self.experts)


class Ensemble(nn.Module):
    """Experts as one model: forward, init_state, head and causal are those of a `LanguageModel`; its logits are log p.

    distances: from contexts to the experts' centres. stride: the weights are made at every stride-th token and stay until the
    next; those that predict token t are of a context that ends before it. Experts whose weight is 0 throughout a row do not
    read it; in decoding, one that is asked for the first time first reads all it has missed.
    """

    causal = True

    def __init__(
        self,
        experts: Sequence[LanguageModel],
        distances: Distances,
        *,
        temperature: float = 0.1,
        top_k: int = 2,
        stride: int = 1,
    ):
        super().__init__()
        check_experts(experts)
        if stride < 1:
            raise ValueError(f"stride: {stride} is too small; at least 1")
        expert_weights(torch.zeros(len(experts)), temperature, top_k)  # the errors of its arguments
        self.experts, self.distances = nn.ModuleList(experts), distances
        self.temperature, self.top_k, self.stride = temperature, top_k, stride

    @property
    def head(self) -> nn.Module:
        return self.experts[0].head

    def weights(self, tokens: Tensor, points: Sequence[int]) -> Tensor:
        """(B, P, k): the weights that hold from each point on, made of the tokens (B, t) up to and with it."""
        contexts = [row[: point + 1] for row in tokens for point in points]
        distances = self.distances(contexts).double()
        if distances.shape[-1] != len(self.experts):
            raise ValueError(f"distances: from {distances.shape[-1]} centres, but there are {len(self.experts)} experts")
        weights = expert_weights(distances, self.temperature, self.top_k).to(self.head.weight)
        return weights.reshape(len(tokens), len(points), -1)

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        state: EnsembleState | None = None,
        last: bool = False,
    ) -> Tensor:
        """log p (B, T, V), or with `targets` (B, T) the sum of -log p(target) in nats; one of -100 does not count.

        `documents`, `state` and `last` are those of `LanguageModel.forward`.
        """
        start, time = (state.tokens.shape[1] if state else 0), tokens.shape[1]
        if state:
            state.tokens = torch.cat([state.tokens, tokens], 1)
        points = range(start // self.stride * self.stride, start + time, self.stride)[-1 if last else 0 :]
        known = [state.weights[:, None]] if points[0] < start else []  # those of an earlier token, which still hold
        new = points[len(known) :]
        made = torch.cat([*known, *([self.weights(state.tokens if state else tokens, new)] if new else [])], 1)  # (B, P, k)
        if state:
            state.weights = made[:, -1]
        asked = torch.arange(start, start + time, device=tokens.device)[-1 if last else 0 :]
        weights = made[:, asked // self.stride - points[0] // self.stride]  # (B, T, k)

        total = None
        for j, expert in enumerate(self.experts):
            log_weight = weights[..., j].log()  # (B, T), -inf for none
            rows = (log_weight > -math.inf).any(1)
            if not rows.any():
                continue
            if state:
                own = state.experts[j]
                logits = expert(state.tokens[:, own.length :], state=own, last=last)[:, -weights.shape[1] :]
                rows[:] = True
            else:
                logits = expert(tokens[rows], documents=None if documents is None else documents[rows], last=last)
            log_p = logits.to(weights.dtype).log_softmax(-1)  # (rows, T, V)
            if targets is not None:
                log_p = log_p.gather(-1, targets[rows].clamp(min=0)[..., None])  # (rows, T, 1)
            if total is None:
                total = log_p.new_full((len(tokens), *log_p.shape[1:]), -math.inf)
            total[rows] = torch.logaddexp(total[rows], log_weight[rows][..., None] + log_p)
        return total if targets is None else -total[..., 0][targets != IGNORED].sum()

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype | None = None) -> EnsembleState:
        """An empty decoding state with room for `max_len` tokens in each of `batch` sequences."""
        weight = self.head.weight
        none = torch.zeros(batch, 0, dtype=torch.int64, device=weight.device)
        experts = [expert.init_state(batch, max_len, dtype=dtype) for expert in self.experts]
        return EnsembleState(none, experts, weight.new_zeros(batch, len(self.experts)))


def check_experts(experts: Sequence[LanguageModel]) -> None:
    """ValueError unless these are models that read from left to right and know the same tokens."""
    if not experts:
        raise ValueError("experts: there are none")
    if not all(expert.causal for expert in experts):
        raise ValueError("experts: an encoder sees all tokens at once; a mixture asks models that read from left to right")
    known = sorted({expert.config.vocab_size for expert in experts})
    if len(known) > 1:
        raise ValueError(f"experts: they know {' and '.join(map(str, known))} tokens; their vocabulary must be one")


def mixture_nats(nats: Tensor, weights: Tensor) -> Tensor:
    """(…): -log p of the mixture for the -log p_j of its k experts (…, k) and their weights (…, k)."""
    return -torch.logsumexp(weights.log() - nats, -1)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m models.ensemble", description=__doc__)
    parser.add_argument("contexts", metavar="FILE", help="what python -m data.contexts wrote")
    parser.add_argument("--experts", required=True, metavar="RUN,RUN", help="runs or checkpoints, in the order of the clusters")
    parser.add_argument("--top-k", default="2", metavar="N,N", help="experts with a weight; several, one after the other [2]")
    parser.add_argument("--temperature", type=float, default=0.1, metavar="X", help="T; inf weighs the top k alike [0.1]")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="windows at once [16]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    args = parser.parse_args(argv)
    try:
        for line in judged(args):
            print(line)
    except ValueError as error:
        print(f"models.ensemble: {error}", file=sys.stderr)
        return 2
    return 0


@torch.inference_mode()
def judged(args) -> list[str]:
    """Bits per byte of each expert alone, of all weighed alike and of the mixture: lines of a table."""
    try:
        top_ks = [int(part) for part in args.top_k.split(",")]
    except ValueError:
        raise ValueError(f"top_k: whole numbers with commas between them, as 1,2,4, not {args.top_k!r}") from None
    found, places = read_tensors(Path(args.contexts)), args.experts.split(",")
    if found.keys() != set(CONTEXTS):
        raise ValueError(f"contexts: {args.contexts!r} holds {', '.join(found) or 'nothing'}; it takes {', '.join(CONTEXTS)}")
    device, distances, known = choose_device(args.device), found["distances"], len(found["token_bytes"])
    experts = [load_model(find(Path(place))).to(device).eval() for place in places]
    check_experts(experts)
    if distances.shape[-1] != len(experts):
        raise ValueError(f"experts: {len(experts)} of them, but the contexts are measured from {distances.shape[-1]} clusters")
    if known > experts[0].config.vocab_size:
        raise ValueError(f"experts: they know {experts[0].config.vocab_size} tokens, the tokenizer of the contexts {known}")

    counted = found["targets"] != IGNORED  # (N, T)
    nats = torch.stack([nats_of(expert, found, args.batch_size) for expert in experts], -1)[counted]  # (n, k)
    points = torch.arange(counted.shape[1]) // found["stride"]
    size = int(found["token_bytes"][found["targets"][counted]].sum())
    if not size:
        raise ValueError(f"contexts: the targets in {args.contexts!r} stand for no bytes of text")

    def line(nats: Tensor, of: str) -> str:
        return f"{nats.sum() / math.log(2) / size:>13.4f}  {of}"

    lines = ["bits per byte", *(line(nats[:, j], place) for j, place in enumerate(places))]
    lines.append(line(mixture_nats(nats, torch.full_like(nats, 1 / len(experts))), "all weighed alike"))
    for top_k in top_ks:
        weights = expert_weights(distances, args.temperature, top_k)[:, points][counted]  # (n, k)
        shares = ", ".join(f"{share:.0%}" for share in weights.mean(0))
        lines.append(line(mixture_nats(nats, weights), f"top {top_k}, temperature {args.temperature:g}; mean weights {shares}"))
    return lines


@torch.no_grad()
def nats_of(expert: LanguageModel, contexts: dict[str, Tensor], batch_size: int) -> Tensor:
    """(N, T) float64 on the CPU: -log p of each target, 0 where one does not count."""
    device, rows = expert.head.weight.device, []
    parts = (contexts[name].split(batch_size) for name in ("inputs", "targets", "documents"))
    for inputs, targets, documents in zip(*parts, strict=True):
        logits = expert(inputs.to(device), documents=documents.to(device) if expert.config.packed else None)  # (B, T, V)
        asked = targets.flatten().to(device)  # (B T,)
        losses = cross_entropy(logits.flatten(0, 1).float(), asked, reduction="none", ignore_index=IGNORED)  # (B T,)
        rows.append(losses.view(targets.shape).double().cpu())
    return torch.cat(rows)


if __name__ == "__main__":
    sys.exit(main())
