"""Schedules of a pipeline, and a simulator that runs them: who works when, who waits, what must be remembered.

    python -m optim.parallel.schedules --ranks 4 --micro-batches 8 --schedule 1f1b

p ranks, m micro-batches, v stages a rank (chunks of its layers), L layers. A schedule is, for each rank, the order of its
forward (F) and backward (B) passes. How long a rank idles, beside the time it works:

    gpipe          all F, then all B                        (p - 1) / m        Huang et al. 2018, arXiv:1811.06965
    1f1b           a B as soon as there is one              (p - 1) / m        Narayanan et al. 2021, arXiv:2104.04473
    interleaved    the same with v > 1 stages a rank        (p - 1) / (v m)    the same, section 2.2
    looped         stage by stage, each of all m            (p - 1) / (v m)    Lamy-Poirier 2021, arXiv:2106.02679; and
                                                                               2022, arXiv:2211.05953 (for m >= p)

The last is layered gradient accumulation: a rank is done with a stage for all micro-batches before it begins the next, so that
weights that are shared out among replicas are gathered twice a step, not 2 m times, and gradients summed once, not m times.
It needs modular placement, stage s on rank s mod p: forward passes then take m L / p + p - 1 times that of a layer instead of
(m + p - 1) L / p. It remembers all m micro-batches; 1f1b remembers min(m, p - rank).
"""

import argparse
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple


class Action(NamedTuple):
    kind: str  # "F" forward or "B" backward
    stage: int  # which part of the layers
    micro_batch: int

    def __str__(self) -> str:
        return f"{'forward' if self.kind == 'F' else 'backward'} of stage {self.stage}, micro-batch {self.micro_batch}"


Order = list[Action]  # of one rank


def alternating(forwards: Order, backwards: Order, first: int) -> Order:
    """`first` forward passes, then one forward and one backward pass in turn, then the backward passes that are left."""
    first = min(first, len(forwards))
    pairs = zip(forwards[first:], backwards, strict=False)
    return [*forwards[:first], *(action for pair in pairs for action in pair), *backwards[len(forwards) - first :]]


def gpipe(ranks: int, micro_batches: int) -> list[Order]:
    return [[Action(kind, rank, i) for kind in "FB" for i in range(micro_batches)] for rank in range(ranks)]


def one_f_one_b(ranks: int, micro_batches: int) -> list[Order]:
    passes = lambda kind, rank: [Action(kind, rank, i) for i in range(micro_batches)]  # noqa: E731
    return [alternating(passes("F", rank), passes("B", rank), ranks - 1 - rank) for rank in range(ranks)]


def interleaved(ranks: int, micro_batches: int, chunks: int) -> list[Order]:
    """Micro-batches in groups of p: a group goes through the first stage of a rank, then through its second, …

    ValueError where p does not divide m.
    """
    if micro_batches % ranks:
        raise ValueError(f"micro_batches: interleaved needs a multiple of the {ranks} ranks, not {micro_batches}")

    def passes(kind: str, rank: int) -> Order:
        turns = [(i // ranks % chunks, i // (ranks * chunks) * ranks + i % ranks) for i in range(micro_batches * chunks)]
        return [Action(kind, (chunk if kind == "F" else chunks - 1 - chunk) * ranks + rank, i) for chunk, i in turns]

    first = [(chunks - 1) * ranks + 2 * (ranks - 1 - rank) for rank in range(ranks)]
    return [alternating(passes("F", rank), passes("B", rank), first[rank]) for rank in range(ranks)]


def looped(ranks: int, micro_batches: int, chunks: int, placement: str = "modular") -> list[Order]:
    """`modular`: stage s on rank s mod p; `contiguous`: stages v r to v (r + 1) - 1 on rank r, waiting for rank r - 1."""
    orders = []
    for rank in range(ranks):
        first, stride = (rank, ranks) if placement == "modular" else (rank * chunks, 1)
        own = [first + stride * chunk for chunk in range(chunks)]
        forwards = [Action("F", stage, i) for stage in own for i in range(micro_batches)]
        orders.append(forwards + [Action("B", stage, i) for _, stage, i in reversed(forwards)])
    return orders


SCHEDULES: dict[str, Callable[..., list[Order]]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "looped": looped,
}
CHUNKED = ("interleaved", "looped")


def make_orders(schedule: str, ranks: int, micro_batches: int, chunks: int = 1, placement: str = "modular") -> list[Order]:
    """The orders of a schedule by its name. ValueError for a number below 1 or what the schedule does not know."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: there is no {schedule!r}; there are {', '.join(SCHEDULES)}")
    for name, number in dict(ranks=ranks, micro_batches=micro_batches, chunks=chunks).items():
        if number < 1:
            raise ValueError(f"{name}: at least 1, not {number}")
    if schedule not in CHUNKED and chunks > 1:
        raise ValueError(f"chunks: {schedule} has one stage a rank; more are for {' and '.join(CHUNKED)}")
    if placement not in ("modular", "contiguous"):
        raise ValueError(f"placement: modular or contiguous, not {placement!r}")
    if placement == "contiguous" and schedule == "interleaved":
        raise ValueError("placement: interleaved has its stages in modular placement")
    options = dict(chunks=chunks) if schedule in CHUNKED else {}
    options |= dict(placement=placement) if schedule == "looped" else {}
    return SCHEDULES[schedule](ranks, micro_batches, **options)


class Span(NamedTuple):
    action: Action
    start: float
    end: float


def simulate(orders: list[Order], forward: float = 1.0, backward: float = 2.0, latency: float = 0.0) -> list[list[Span]]:
    """When each rank does what, if each takes up the next of its order as soon as what this needs is there.

    A forward pass needs that of the stage before; a backward pass its own forward pass and the backward pass of the stage
    behind. forward, backward: time of one stage and micro-batch; latency: on the way to another rank. ValueError where orders
    wait for each other or for what nobody does, with the place, and for an action that stands there twice.
    """
    actions = [action for order in orders for action in order]
    if len(actions) != len(set(actions)):
        raise ValueError(f"orders: {next(a for a in actions if actions.count(a) > 1)} stands there twice")
    last = max((action.stage for action in actions), default=0)
    spans: list[list[Span]] = [[] for _ in orders]
    ended: dict[Action, tuple[float, int]] = {}  # when, and on which rank

    def needs(action: Action) -> list[Action]:
        kind, stage, i = action
        if kind == "F":
            return [Action("F", stage - 1, i)] if stage else []
        return [Action("F", stage, i)] + ([Action("B", stage + 1, i)] if stage < last else [])

    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            for action in order[len(spans[rank]) :]:
                if not all(need in ended for need in needs(action)):
                    break
                arrivals = [time + latency * (at != rank) for time, at in map(ended.get, needs(action))]
                start = max([spans[rank][-1].end if spans[rank] else 0.0, *arrivals])
                end = start + (forward if action.kind == "F" else backward)
                spans[rank].append(Span(action, start, end))
                ended[action] = end, rank
                moved = True
    for rank, order in enumerate(orders):
        if len(spans[rank]) < len(order):
            action = order[len(spans[rank])]
            missing = next(need for need in needs(action) if need not in ended)
            raise ValueError(f"orders: rank {rank} waits for ever before its {action}: the {missing} never comes")
    return spans


def total_time(spans: list[list[Span]]) -> float:
    return max((own[-1].end for own in spans if own), default=0.0)


def bubble(spans: list[list[Span]]) -> float:
    """Idle time of the busiest rank beside the time it works."""
    busiest = max(sum(span.end - span.start for span in own) for own in spans)
    return total_time(spans) / busiest - 1


def idle_share(spans: list[list[Span]]) -> float:
    """Which share of the ranks' time together is idle."""
    work = sum(span.end - span.start for own in spans for span in own)
    return 1 - work / (len(spans) * total_time(spans))


def held(order: Order) -> int:
    """The most activations that a rank holds at once, each those of one stage for one micro-batch."""
    now = most = 0
    for action in order:
        now += 1 if action.kind == "F" else -1
        most = max(most, now)
    return most


def gathers(order: Order) -> int:
    """How often a rank gathers weights that are shared out among replicas, if it lets a stage's go as soon as it turns to
    another, or from forward to backward passes.
    """
    return bool(order) + sum(a[:2] != b[:2] for a, b in pairwise(order))


def reductions(order: Order) -> int:
    """How often it sums gradients over replicas, if it keeps those of one stage at a time."""
    return gathers([action for action in order if action.kind == "B"])


def draw_text(spans: list[list[Span]], unit: float) -> str:
    """A line a rank, a column a `unit` of time: F as ` 3`, B as `-3`, by micro-batch; if a rank has chunks, their letters."""
    chunks = [sorted({span.action.stage for span in own}) for own in spans]
    several = max(map(len, chunks)) > 1
    width = len(str(max(span.action.micro_batch for own in spans for span in own))) + 1 + several
    lines = []
    for rank, own in enumerate(spans):
        line, column = "", 0
        for action, start, end in own:
            chunk = chr(97 + chunks[rank].index(action.stage) % 26) if several else ""
            begin, stop = round(start / unit), round(end / unit)
            line += " " * width * (begin - column)
            line += f"{action.micro_batch}{chunk}".rjust(width * (stop - begin), "-" if action.kind == "B" else " ")
            column = stop
        lines.append(f"rank {rank} |{line.ljust(width * round(total_time(spans) / unit))}|")
    return "\n".join(lines)


def draw(axes, spans: list[list[Span]], title: str = "") -> None:
    """The same on matplotlib axes: forward passes blue, backward passes orange, the paler the later the chunk."""
    for rank, own in enumerate(spans):
        stages = sorted({span.action.stage for span in own})
        for action, start, end in own:
            colour, pale = (
                "tab:blue" if action.kind == "F" else "tab:orange",
                0.9 - 0.6 * stages.index(action.stage) / len(stages),
            )
            axes.barh(rank, end - start, left=start, height=0.9, color=colour, alpha=pale, edgecolor="white", linewidth=0.5)
            axes.text((start + end) / 2, rank, str(action.micro_batch), ha="center", va="center", fontsize=6)
    axes.set(yticks=range(len(spans)), ylabel="rank", xlim=(0, total_time(spans)), title=title)
    axes.invert_yaxis()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m optim.parallel.schedules", description=__doc__.splitlines()[0])
    parser.add_argument("--schedule", default="1f1b", help=", ".join(SCHEDULES))
    parser.add_argument("--ranks", "--stages", type=int, default=4, metavar="N", help="p, ranks of the pipeline [4]")
    parser.add_argument("--micro-batches", type=int, default=8, metavar="N", help="m, parts of a step's batch [8]")
    parser.add_argument("--chunks", type=int, default=1, metavar="N", help="v, stages a rank [1]")
    parser.add_argument("--placement", default="modular", help="modular or contiguous, of looped [modular]")
    parser.add_argument("--backward", type=float, default=2.0, metavar="X", help="time of B, that of F being 1 [2]")
    parser.add_argument("--latency", type=float, default=0.0, metavar="X", help="time between ranks [0]")
    parser.add_argument("--picture", metavar="FILE", help="draw it into this file too")
    given = parser.parse_args(argv)
    try:
        if not (0 < given.backward < 100 and 0 <= given.latency < 100):
            raise ValueError(f"backward and latency: times below 100, not {given.backward} and {given.latency}")
        orders = make_orders(given.schedule, given.ranks, given.micro_batches, given.chunks, given.placement)
        spans = simulate(orders, 1.0, given.backward, given.latency)
        if given.picture:
            save(spans, given.schedule, given.picture)
    except (ValueError, OSError) as error:
        print(f"schedules: {error}", file=sys.stderr)
        return 2
    print(draw_text(spans, 1.0))
    print(f"time {total_time(spans):g}, idle beside work {bubble(spans):.3f}, idle share {idle_share(spans):.3f}")
    for words, count in (
        ("activations held at most", held),
        ("gathers of weights", gathers),
        ("sums of gradients", reductions),
    ):
        print(f"{words + ', by rank':36}{' '.join(f'{count(order):4}' for order in orders)}")
    return 0


def save(spans: list[list[Span]], title: str, path: str) -> None:
    import matplotlib.pyplot as plt  # slow to load, and only wanted here

    figure, axes = plt.subplots(figsize=(12, 0.5 * len(spans) + 1), layout="constrained")
    draw(axes, spans, title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
