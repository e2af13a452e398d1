"""Three routers in several sizes and with more and more experts, and the law that says their losses in four numbers.

    python -m lectures.routed --sizes 12,16,24,32 --experts 1,2,4,8,16

Clark et al. 2022 (arXiv:2202.01169), in small: a generated language, one layer, one expert a token.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from lectures.twins import DENSE, compute, learn, made, whole_numbers
from models import LanguageModel
from models.config import Parser, status_of
from models.laws.routed import RoutedLaw, fit
from models.machine import tune_cpu
from nn.checks import at_least

ROUTED = "moe:experts={experts}:top_k=1:width={width}:gated=false:activation=relu2:router={router}"
ROUTERS = ("sinkhorn", "rl", "hash")


class Chapters:
    """A book whose chapters have their own tables of which word follows which, drawn once: much to know, and little to infer.

    A row begins with the number of its chapter, as a word of its own. `floor`: nats a word that nobody can do without.
    """

    def __init__(self, chapters: int = 16, words: int = 64, *, sharpness: float = 3.0, seed: int = 0):
        drawn = torch.randn(chapters, words, words, generator=torch.Generator().manual_seed(seed))
        self.chances = (sharpness * drawn).softmax(-1)  # (chapters, words, words)
        self.chapters, self.words, self.vocab_size = chapters, words, words + chapters
        self.pools: dict[tuple[int, int], torch.Tensor] = {}
        self.floor = -(self.chances * self.chances.log()).sum(-1).mean().item()

    def rows(self, many: int, length: int, seed: int) -> torch.Tensor:
        """(many, length + 1) words."""
        own = torch.Generator().manual_seed(seed)
        chapter = torch.randint(self.chapters, (many,), generator=own)
        row = [self.words + chapter, torch.randint(self.words, (many,), generator=own)]
        for _ in range(length - 1):
            row.append(torch.multinomial(self.chances[chapter, row[-1]], 1, generator=own)[:, 0])
        return torch.stack(row, 1)

    def batches(self, length: int, many: int = 32, seed: int = 1) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and targets (many, length) without end; the first word of a chapter is not asked for."""
        if (length, seed) not in self.pools:
            self.pools[length, seed] = self.rows(4096, length, seed)
        pool, own = self.pools[length, seed], torch.Generator().manual_seed(seed)
        while True:
            rows = pool[torch.randint(len(pool), (many,), generator=own)]
            yield rows[:, :-1], rows[:, 1:].index_fill(1, torch.tensor([0]), -100)

    def judge(self, length: int) -> Callable[[LanguageModel], float]:
        """Nats a word on rows never seen."""
        rows = self.rows(256, length, seed=99)
        inputs, targets = rows[:, :-1], rows[:, 1:].index_fill(1, torch.tensor([0]), -100)
        return lambda model: torch.no_grad()(model)(inputs, targets).item() / int((targets >= 0).sum())


@dataclass(frozen=True)
class Point:
    """What one run says: its router, the parameters N of the dense model of its size, its experts E, nats a word, and the FLOPs
    of training on one word.
    """

    router: str
    size: int
    experts: int
    loss: float
    flops: float


def routed_runs(
    book: Chapters,
    dims: list[int],
    experts: list[int],
    routers: tuple[str, ...],
    *,
    steps: int,
    length: int = 32,
    seed: int = 0,
) -> list[Point]:
    """A run for each size, router and number of experts; one expert is the dense model, the same for all routers."""
    points, judge = [], book.judge(length)

    def run(dim: int, ffn: str) -> tuple[int, float, float]:
        sizes = dict(dim=dim, depth=1, heads=max(1, dim // 16), vocab_size=book.vocab_size, seq_len=length)
        trained = made(ffn, seed, **sizes)
        learn([trained], book.batches(length, seed=seed + 1), steps)
        return sum(p.numel() for p in trained.model.parameters()), judge(trained.model.eval()), compute(trained, 1)

    for dim in dims:
        size, *found = run(dim, DENSE.format(width=2 * dim))
        points += [Point(router, size, 1, *found) for router in routers]
        for router in routers:
            for many in [many for many in experts if many > 1]:
                found = run(dim, ROUTED.format(experts=many, width=2 * dim, router=router))[1:]
                points.append(Point(router, size, many, *found))
    return points


def law_of(points: list[Point]) -> tuple[RoutedLaw, float, float]:
    """The law of the runs of one router without saturation, and how far log10 L lies, root mean square, from it and from a
    straight line in log N alone.
    """
    N, E, L = (np.array([getattr(point, name) for point in points], dtype=np.float64) for name in ("size", "experts", "loss"))
    law = fit(N, E, L, start=1.0, most=np.inf)
    alone = np.log10(L) - np.polyval(np.polyfit(np.log10(N), np.log10(L), 1), np.log10(N))
    return law, float(np.sqrt(np.mean(np.log10(law.loss(N, E) / L) ** 2))), float(np.sqrt(np.mean(alone**2)))


def show_laws(points: list[Point]) -> dict[str, RoutedLaw]:
    """Print the losses of all runs and each router's law; the laws."""
    experts = sorted({point.experts for point in points})
    losses = {(point.router, point.size, point.experts): f"{point.loss:.4f}" for point in points}
    print(f"{'router':>9} {'N':>8} " + " ".join(f"{f'E={many}':>7}" for many in experts))
    for router, size in dict.fromkeys((point.router, point.size) for point in points):
        print(f"{router:>9} {size:>8,} " + " ".join(f"{losses.get((router, size, many), ''):>7}" for many in experts))
    print(f"{'router':>9} {'a':>8} {'b':>8} {'c':>8} {'d':>7} {'cut-off':>9} {'off the law':>12} {'off a line in N':>16}")
    laws = {}
    for router in dict.fromkeys(point.router for point in points):
        law, off, alone = law_of([point for point in points if point.router == router])
        laws[router] = law
        constants = f"{law.a:>8.4f} {law.b:>8.4f} {law.c:>8.4f} {law.d:>7.3f} {law.cutoff:>9.2g}"
        print(f"{router:>9} {constants} {off:>12.5f} {alone:>16.5f}")
    return laws


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m lectures.routed", description=__doc__)
    parser.add_argument("--sizes", default="12,16,24,32", metavar="N,N", help="dims [%(default)s]")
    parser.add_argument("--experts", default="1,2,4,8,16", metavar="N,N", help="how many experts [%(default)s]")
    parser.add_argument("--routers", default=",".join(ROUTERS), metavar="NAME,NAME", help="which routers [%(default)s]")
    number = partial(parser.add_argument, type=int, metavar="N")
    number("--steps", default=400, help="of training [%(default)s]")
    number("--chapters", default=16, help="of the book [%(default)s]")
    number("--words", default=64, help="it is written in [%(default)s]")
    number("--seed", default=0, help="of the book, weights and batches [%(default)s]")
    args = parser.parse_args(argv)

    def compare() -> None:
        sizes, experts = whole_numbers("sizes", args.sizes), whole_numbers("experts", args.experts)
        at_least(1, steps=args.steps, chapters=args.chapters, words=args.words)
        at_least(0, seed=args.seed)
        tune_cpu()
        book = Chapters(args.chapters, args.words, seed=args.seed)
        print(f"{book.chapters} chapters, {book.floor:.3f} nats a word that nobody can do without, {args.steps} steps")
        show_laws(routed_runs(book, sizes, experts, tuple(args.routers.split(",")), steps=args.steps, seed=args.seed))

    return status_of("lectures.routed", compare)


if __name__ == "__main__":
    sys.exit(main())
