import torch
from torch import Tensor, nn

from nn.checks import at_least
from nn.context import Context
from nn.moe.routing import Router, Routing, tokens_of


def domains_of(model: nn.Module, told: int | None = None) -> int:
    """How many kinds of text the layers of a model tell apart; 1 where none does.

    ValueError where they do not agree, or where text of other than so many kinds (`told`) is what they would read.
    """
    found = {module.domains for module in model.modules() if isinstance(module, HashRouter)} - {1} or {1}
    if len(found) > 1:
        raise ValueError(f"domains: layers of one model tell {' and '.join(map(str, sorted(found)))} kinds of text apart")
    (many,) = found
    if told is not None and many not in (1, told):
        raise ValueError(f"domains: layers tell {many} kinds of text apart, the text has {told}; with --domains, an entry each")
    return many


class HashRouter(Router):
    """A fixed table from token ids to experts: nothing is learned, nothing has to be balanced.

    Roller et al. 2021, "Hash Layers For Large Sparse Models" (arXiv:2106.04426): each expert owns as many ids as any other,
    up to one, drawn at random a layer; equal shares of ids are not equal shares of tokens, which are Zipfian. With `domains`
    it is the random routed experts of Ren et al. 2023, "PanGu-Sigma" (arXiv:2303.10845), section 3.2: a token goes to the
    group of experts of its domain (`context.domains`), and in it to the one that its id has there; so the experts of one
    domain can be cut out as a model of their own (`eval.py --domain 1`). `top_k` tables give as many choices of equal weight
    (their "MultiHash" adds the outputs of several, too). `seed` and the number of the layer draw the tables.
    ValueError where experts cannot be shared among the domains, or the tokens have no domains.
    """

    def __init__(
        self,
        dim: int,
        experts: int = 8,
        top_k: int = 1,
        vocab_size: int | None = None,
        layer: int = 1,
        *,
        domains: int = 1,
        seed: int = 0,
    ):
        super().__init__(experts, top_k)
        at_least(1, domains=domains)
        if vocab_size is None:
            raise ValueError("vocab_size: a table of token ids needs it")
        if experts % domains or experts // domains < top_k:
            raise ValueError(f"domains: {experts} experts are not {domains} equal groups of at least {top_k}")
        self.group, self.domains, self.seed, self.layer = experts // domains, domains, seed, layer
        self.register_buffer("table", torch.empty(domains, vocab_size, top_k, dtype=torch.int32))
        self.own_init()

    @torch.no_grad()
    def own_init(self, generator: torch.Generator | None = None) -> None:
        """Draw the tables; the choices of one id are different experts, a random step apart."""
        own = torch.Generator().manual_seed(1_000_003 * self.seed + self.layer)
        for domain, table in enumerate(self.table):
            first = torch.randperm(table.shape[0], generator=own) % self.group
            steps = torch.randperm(self.group, generator=own)[: self.top_k]  # different ones, so that the experts are
            table.copy_(domain * self.group + (first[:, None] + steps) % self.group)

    def forward(self, x: Tensor, context: Context) -> Routing:
        tokens, domains = tokens_of(context), 0
        if self.domains > 1:
            if context.domains is None:
                raise ValueError(f"domains: the router has {self.domains}, but the tokens were given none (--domain N)")
            domains = context.domains.expand(context.tokens.shape).flatten()
        experts = self.table[domains, tokens].long()  # (N, K)
        wide = torch.promote_types(x.dtype, torch.float32)
        return Routing(experts, torch.full(experts.shape, 1 / self.top_k, dtype=wide, device=x.device))
