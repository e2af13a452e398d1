"""The language model: embeddings, a stack of residual sublayers, a final norm, a head."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.auxiliary import auxiliary_loss
from models.backprop import Plain, backprop
from models.config import Config
from models.heads import HEADS
from models.residual import Residual, ends_normed, make_sublayer
from models.stack import SUBLAYERS, layer_numbers, layers, parse_stack
from nn.adapt import ADAPTERS
from nn.context import Context
from nn.init import INITS, own_values
from nn.linear import Linear
from nn.norm import NORMS
from nn.objective import IGNORED, OBJECTIVES, next_token_loss
from nn.parallel.sequence import Sequence
from nn.position import POSITIONS
from nn.spec import build

# B batch, T time, C model dim, V vocabulary


@dataclass
class DecodingState:
    """What decoding remembers: the state of each sublayer (None for an ffn) and how many tokens they have seen."""

    sublayers: list[Any]
    length: int = 0

    def bytes(self) -> int:
        return sum(state.bytes() for state in self.sublayers if state is not None)


class LanguageModel(nn.Module):
    """A language model made of the sublayers that a configuration spells out: a decoder, or an encoder if its objective is."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        backprop(config.backprop)  # a mistake in it is told now
        self.sequences: list[Sequence] = []  # how processes share the positions of a row: models.parallel puts them here
        self.causal = build(config.objective, OBJECTIVES, "objective").causal
        self.specs = parse_stack(config.stack or config.stem)
        self.specs += [] if config.stack else layers(config.mixer, config.ffn, config.depth)
        if config.embedding_norm == "first" and config.norm_place not in ("pre", "scaled"):
            raise ValueError(f"embedding_norm: 'first' leaves away a norm before a sublayer; {config.norm_place!r} has none")
        for name in self.part_names():
            self.put_part(name, self.make_part(name))
        share_among_layers(self.stack)
        if config.tie:
            self.head.weight = self.embedding.weight
        if config.adapt:
            build(config.adapt, ADAPTERS, "adapter", self)

    def part_names(self) -> list[str]:
        """The names of the parts it is made of, in the order in which they are made and initialised."""
        stack = (f"stack.{number}" for number in range(len(self.specs)))
        return ["embedding", "position", "embedding_norm", "stack", *stack, "final_norm", "transform", "head"]

    def put_part(self, name: str, part: nn.Module) -> None:
        """A part in its place."""
        of, _, last = name.rpartition(".")
        self.get_submodule(of).add_module(last, part)

    def make_part(self, name: str) -> nn.Module:
        """A part by its name, new: what layers share and what is tied is its own still."""
        config, dim, vocab_size = self.config, self.config.dim, self.config.vocab_size
        if name == "embedding":
            return nn.Embedding(vocab_size, dim)
        if name == "stack":
            return nn.ModuleList()
        if name == "position":
            return build(config.position, POSITIONS, "position", dim=dim, heads=config.heads, seq_len=config.seq_len)
        if name == "transform":
            return build(config.head, HEADS, "head", dim=dim, norm=config.norm)
        if name == "head":
            head = Linear(dim, vocab_size, bias=self.transform.decoder_bias)
            if head.bias is not None:
                nn.init.zeros_(head.bias)
            return head
        if name in ("embedding_norm", "final_norm"):
            there = not ends_normed(config.norm_place) if name == "final_norm" else config.embedding_norm != "none"
            return build(config.norm, NORMS, "norm", dim) if there else nn.Identity()
        number, numbers = int(name.removeprefix("stack.")), layer_numbers(self.specs)
        offered = dict(heads=config.heads, position=self.position, vocab_size=vocab_size, layers=max(numbers, default=1))
        layer = make_sublayer(self.specs[number], SUBLAYERS, dim, layer=numbers[number], **offered)
        norm = "none" if config.embedding_norm == "first" and number == 0 else config.norm
        place = dict(place=config.norm_place, sublayers=len(self.specs))
        return Residual(layer, dim, norm=norm, number=numbers[number], **place)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        domains: Tensor | None = None,
        state: DecodingState | None = None,
        last: bool = False,
    ) -> Tensor:
        """Logits (B, T, V), or with `targets` the sum of -log p(target) in nats, a scalar.

        tokens and targets (B, T) int64, as the objective gives them; a target of -100 does not count. `documents` (B, T):
        tokens see only their own document. `domains` (B, 1) or (B, T): the kind of text, where a layer asks for it. `state`:
        these tokens follow those it has seen, and it remembers them. `last`: only the last logits.

        Auxiliary losses, which layers leave while they learn, add to the gradient of the sum, each token's share to that of
        its target, and not to its value, which stays that of the predictions. Where processes share the positions of a row,
        logits and sum are those of this process's own.
        """
        x = self.hidden(tokens, documents=documents, domains=domains, state=state)
        if targets is not None:
            return self.loss(x, targets)
        return self.logits(self.transform(self.final_norm(x[:, -1:] if last else x)))

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """The sum of -log p(target), a scalar, of the stream x behind the last sublayer, with gradients of auxiliary losses."""
        x = self.transform(self.final_norm(x))
        share = (targets >= 0).sum()  # of the auxiliary losses: processes have as many tokens, if not as many targets
        for sequence in self.sequences:
            targets, share = sequence.part(targets), share / sequence.size
        head = dict(bias=self.head.bias, softcap=self.config.softcap)
        loss = next_token_loss(x.flatten(0, 1), self.head.weight, targets.flatten(), **head)
        auxiliary = auxiliary_loss(self.stack, partial(self.costs, x.detach(), targets))
        return loss if auxiliary is None else loss + share * (auxiliary - auxiliary.detach())

    @torch.no_grad()
    def costs(self, x: Tensor, targets: Tensor) -> Tensor:
        """(B T,): -log p of each target, of what the head reads, (B, T, C); 0 where a target does not count."""
        return F.cross_entropy(self.logits(x).flatten(0, 1).float(), targets.flatten(), reduction="none", ignore_index=IGNORED)

    def hidden(
        self,
        tokens: Tensor,
        *,
        documents: Tensor | None = None,
        domains: Tensor | None = None,
        state: DecodingState | None = None,
    ) -> Tensor:
        """The residual stream (B, T, C) behind the last sublayer."""
        context = self.context(tokens, documents, state, domains)
        x = self.embedded(context)
        through = backprop(self.config.backprop) if torch.is_grad_enabled() and state is None else Plain()
        for i, sublayer in enumerate(self.stack):
            context.state = state.sublayers[i] if state is not None else None
            x = through(sublayer, x, context)
        if state is not None:
            state.length += tokens.shape[1]
        return x

    def embedded(self, context: Context) -> Tensor:
        """The residual stream (B, T, C) before the first sublayer."""
        x = self.embedding(context.tokens)
        x = self.position.embed(x if self.config.embedding_scale == 1 else x * self.config.embedding_scale, context)
        return self.embedding_norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """(…, V) of what the head reads, (…, C)."""
        logits = self.head(x)
        return logits if not self.config.softcap else self.config.softcap * torch.tanh(logits / self.config.softcap)

    def context(
        self, tokens: Tensor, documents: Tensor | None, state: DecodingState | None, domains: Tensor | None = None
    ) -> Context:
        """Where these tokens stand; where processes share the positions of a row, of this process's own."""
        if documents is not None and state is not None:
            raise ValueError("documents: a decoding state remembers one document a row; give one or the other")
        if state is not None and not self.causal:
            raise ValueError("state: an encoder sees all tokens at once; it cannot go on from earlier ones")
        if state is not None and self.sequences:
            raise ValueError("state: processes that share the positions of a row read whole rows; decode with one process")
        start = state.length if state is not None else 0
        end = start + tokens.shape[1]
        if self.position.max_len is not None and end > self.position.max_len:
            raise ValueError(f"tokens: {end} positions, but {self.config.position} ends at {self.position.max_len}")
        positions = torch.arange(start, end, device=tokens.device)
        if documents is not None:
            begins = torch.diff(documents, dim=1, prepend=documents[:, :1] - 1) != 0
            positions = positions - torch.where(begins, positions, 0).cummax(dim=1).values
        context = Context(tokens, positions, documents, domains, causal=self.causal)
        for sequence in self.sequences:
            context = sequence.share(context)
        return context

    def alternates(self, mixer: type | tuple[type, ...], ffn: type, norm: type, *, bare: bool = False) -> bool:
        """Whether the stack is layers of one kind of mixer, of ffn and of norm: what published families look like.

        `bare`: whether the first sublayer has no norm of its own.
        """
        if self.config.stack or len(self.stack) != 2 * self.config.depth or not self.stack:
            return False
        norms = [s.norm for s in self.stack][bare:]
        norms += [] if ends_normed(self.config.norm_place) else [self.final_norm]
        kinds = [(s.layer, (mixer, ffn)[i % 2]) for i, s in enumerate(self.stack)] + [(module, norm) for module in norms]
        return all(isinstance(module, kind) for module, kind in kinds)

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype | None = None) -> DecodingState:
        """An empty decoding state with room for `max_len` tokens in each of `batch` sequences."""
        weight = self.head.weight
        options = dict(dtype=dtype or weight.dtype, device=weight.device)
        return DecodingState([s.layer.init_state(batch, max_len, **options) if s.is_mixer else None for s in self.stack])


def share_among_layers(stack: nn.ModuleList) -> None:
    """Modules that a class names in `shared_by_layers` are one and the same in all layers: those of the first."""
    first: dict[tuple[type, str], nn.Module] = {}
    for module in list(stack.modules()):
        for name in getattr(module, "shared_by_layers", ()):
            setattr(module, name, first.setdefault((type(module), name), getattr(module, name)))


def build_model(config: Config, *, seed: int = 0) -> LanguageModel:
    """A freshly initialised model on the CPU; the same seed gives the same weights."""
    model = LanguageModel(config)
    generator = torch.Generator().manual_seed(seed)
    INITS[config.init](model, model.modules(), generator)
    own_values(model.modules(), generator)
    return model
