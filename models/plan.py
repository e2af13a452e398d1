"""A training run on many ranks, before any of them starts: bytes a rank, bytes sent, and how busy the ranks could be.

    python -m models.describe --model llama-70b --mesh "fsdp=64,tp=8" --seq-len 8192

Numbers in, numbers out; models/describe.py counts the parts of a model. Memory is that of mixed precision as Rajbhandari et al.
2019, "ZeRO" (arXiv:1910.02054), section 3 count it: a parameter has 2 bytes, its gradient 2, and the optimizer 12 for it (the
parameter in float32 and Adam's two means). What a rank sends, of n, is that of the usual rings:

    all-reduce       2 (n - 1) / n of the whole
    all-gather         (n - 1) / n of the whole, and so a reduce-scatter
    all-to-all         (n - 1) / n of its own
    passing round      (n - 1) times its own

Letters: b rows of a micro-batch, m micro-batches a step, T tokens of a row.
"""

import math
from collections import Counter
from typing import NamedTuple

WEIGHT, GRADIENT, OPTIMIZER, ACTIVATION = 2, 2, 12, 2  # bytes a number


class Part(NamedTuple):
    """A sublayer, or an end of the model: the embedding before the sublayers, the head behind them."""

    parameters: int
    cut: int = 0  # of these, how many tp shares out
    experts: int = 0  # of these, how many ep shares out
    flops: float = 0  # forward, of one row
    kept: float = 0  # bytes that the forward pass of one row keeps for the backward pass
    products: float = 0  # bytes of what its linear layers make of a row
    mixing: float = 0  # of the flops, those that are not a linear layer's
    shared: bool = True  # whether tp divides its work; if not, each rank does all of it
    # Numbers a token that a rank of tp sends where ranks share the tokens of a row, and to experts:
    exchanged: int = 0  # for heads, among the ranks of ulysses: queries, keys, values, outputs
    scanned: int = 0  # for heads, among all ranks of the row, as a scan needs it
    passed: int = 0  # round the ring: keys and values
    gathered: int = 0  # of a layer that must see the whole row and has no other way
    routed: int = 0  # to the experts of a token
    tied: int = 0  # of the parameters, those that the last stage of a pipeline has and the first too


class Stage(NamedTuple):
    """What a rank of one stage of the pipeline holds, sends and computes in a step."""

    bytes: dict[str, float]  # at once, by what they are
    sent: dict[str, float]  # bytes, by axis and collective
    flops: float
    moved: float  # bytes from and to its own memory
    host: dict[str, float] = {}  # bytes in the host's memory, and those that go there and back in a step


def all_reduce(whole: float, n: int) -> float:
    """Bytes that each of n ranks sends to sum `whole` bytes."""
    return 2 * whole * (n - 1) / n


def all_gather(whole: float, n: int) -> float:
    """Bytes that each of n ranks sends so that all have `whole`, or, in a reduce-scatter, each a part of the sum."""
    return whole * (n - 1) / n


def all_to_all(own: float, n: int) -> float:
    return own * (n - 1) / n


def pass_round(own: float, n: int) -> float:
    return own * (n - 1)


def model_state_bytes(parameters: float, ranks: int, stage: int) -> dict[str, float]:
    """Bytes a rank of n that are copies of each other, by ZeRO stage.

    0 shares out nothing, 1 the optimizer's state, 2 the gradients too, 3 the parameters too: 16 P, 4 P + 12 P / n,
    2 P + 14 P / n, 16 P / n in all. ValueError for another stage.
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"zero: a stage from 0 to 3, not {stage}")
    share = lambda begin: ranks if stage >= begin else 1  # noqa: E731
    return {
        "weights": WEIGHT * parameters / share(3),
        "gradients": GRADIENT * parameters / share(2),
        "optimizer": OPTIMIZER * parameters / share(1),
    }


class Run(NamedTuple):
    """What a plan is made for. sizes: of every axis, as nn.parallel.mesh.parse_mesh gives them."""

    sizes: dict[str, int]
    dim: int
    tokens: int  # T
    rows: int = 1  # b, of a rank
    micro_batches: int = 1  # m
    zero: int = 0  # how the copies that the axes leave hold the state
    backprop: str = "plain"  # what is kept for the backward pass, a name of models.backprop
    offload: bool = False  # whether the optimizer's state and steps are on the host (optim/offload.py)

    @property
    def sharded(self) -> bool:
        """Whether ranks hold shares of weights: fsdp, and whatever it is combined with by tp or pp."""
        apart = math.prod(self.sizes[axis] for axis in ("dp", "ep", "fsdp", "ring", "ulysses"))
        return self.sizes["fsdp"] > 1 or self.sizes["tp"] * self.sizes["pp"] > 1 and apart > 1

    @property
    def shards(self) -> int:
        return self.sizes["fsdp"] * self.positions if self.sharded else 1

    @property
    def copies(self) -> int:
        return self.sizes["dp"] * self.sizes["ep"] * (1 if self.sharded else self.positions)

    @property
    def positions(self) -> int:
        """Ranks that share the tokens of a row and are not tp."""
        return self.sizes["ring"] * self.sizes["ulysses"]


class Share(NamedTuple):
    """The parts of a stage, and how many parameters a rank of it works with: before copies and shards."""

    index: int
    layers: list[Part]
    ends: list[Part]
    own: list[float]  # of each layer
    root: float  # of the ends
    experts: float  # of all these, those of experts
    tied: float  # and those that another stage has too

    @property
    def total(self) -> float:
        return sum(self.own) + self.root


def shares(parts: list[Part], run: Run) -> list[Share]:
    """Of each stage: sublayers in order, as many each as possible; the first has the embedding, the last the head."""
    first, *layers, last = parts
    stages, tp, ep = (run.sizes[axis] for axis in ("pp", "tp", "ep"))
    if stages > len(layers):
        raise ValueError(f"mesh: pp={stages} cannot share out {len(layers)} sublayers")
    size, more = divmod(len(layers), stages)
    bounds, found = [i * size + min(i, more) for i in range(stages + 1)], []
    for i in range(stages):
        mine, ends = layers[bounds[i] : bounds[i + 1]], [first] * (i == 0) + [last] * (i == stages - 1)
        own = [part.parameters - part.cut * (1 - 1 / tp) - part.experts * (1 - 1 / ep) for part in mine]
        experts = sum(part.experts for part in mine) / ep
        tied = last.tied if i in (0, stages - 1) else 0
        found.append(Share(i, mine, ends, own, sum(part.parameters for part in ends), experts, tied))
    return found


def plan(parts: list[Part], run: Run) -> list[Stage]:
    """For each stage of the pipeline what one of its ranks does. parts: embedding, sublayers, head. ValueError for a mesh that
    does not fit the model.
    """
    for name in ("rows", "micro_batches", "tokens"):
        if getattr(run, name) < 1:
            raise ValueError(f"{name}: at least 1, not {getattr(run, name)}")
    sizes = run.sizes
    chunks = run.positions * sizes["tp"] * (2 if sizes["ring"] > 1 else 1)
    if run.tokens % chunks:
        raise ValueError(f"mesh: {run.tokens} tokens of a row cannot be shared out in {chunks} parts evenly")
    return [on_host(Stage(memory(share, run), traffic(share, run), *work(share, run)), run) for share in shares(parts, run)]


def on_host(stage: Stage, run: Run) -> Stage:
    """With `offload` the optimizer's bytes are the host's: gradients go down to it, parameters come up."""
    if not run.offload:
        return stage
    held = stage.bytes["optimizer"]
    size = (GRADIENT + WEIGHT) * held / OPTIMIZER
    return stage._replace(bytes=stage.bytes | {"optimizer": 0.0}, host={"optimizer": held, "down and up": size})


def kept_bytes(share: Share, run: Run) -> list[float]:
    """Bytes that each sublayer keeps of a micro-batch: its share, and the row that tp gathered for it, whole."""
    tp = run.sizes["tp"]
    gathered = ACTIVATION * run.dim * run.tokens * (1 - 1 / tp)
    return [run.rows * (part.kept / (tp if part.shared else 1) + gathered) / run.positions for part in share.layers]


def kept_at_ends(share: Share, run: Run) -> float:
    return sum(part.kept for part in share.ends) * run.rows / (run.positions * run.sizes["tp"])


def memory(share: Share, run: Run) -> dict[str, float]:
    """Bytes that a rank holds at once.

    activations: of as many micro-batches as 1F1B holds; where sublayers are run again, the most that one of them then keeps
    too, of which `stream` in truth has a chunk at a time. buffers: with shards the sublayer at work and the next one gathered
    and the gradient of one, and the ends (in a pipeline all that the stage has, from the first pass to the last, and its
    gradients); with tp a row gathered and a summand of a row.
    """
    pp, tp, ep = (run.sizes[axis] for axis in ("pp", "tp", "ep"))
    state = model_state_bytes((share.total - share.experts) / run.shards, run.copies, run.zero)
    for name, size in model_state_bytes(share.experts / run.shards, run.copies // ep, run.zero).items():
        state[name] += size
    kept, stream = kept_bytes(share, run), ACTIVATION * run.dim * run.rows * run.tokens / run.positions
    left = kept if run.backprop == "plain" else [stream / tp] * len(kept)  # until the backward pass: all, or inputs
    if run.backprop == "selective":
        left = [stream / tp + part.products * run.rows / (run.positions * (tp if part.shared else 1)) for part in share.layers]
    activations = min(run.micro_batches, pp - share.index) * sum(left)
    activations += max(most - part for most, part in zip(kept, left, strict=True))
    buffers = 2 * stream if tp > 1 else 0
    if run.shards > 1:
        largest = max(share.own)
        gathered, summed = (share.total, share.total) if pp > 1 else (2 * largest + share.root, largest + share.root)
        buffers += WEIGHT * gathered + GRADIENT * summed
    return state | {"activations": activations + kept_at_ends(share, run), "buffers": buffers}


def work(share: Share, run: Run) -> tuple[float, float]:
    """(FLOPs, bytes from and to memory) of a rank in a step: a backward pass is two forward passes.

    Weights are read in every pass; what is kept, and its gradient, is written once and read once; and the optimizer reads and
    writes its state.
    """
    tp, m, again = run.sizes["tp"], run.micro_batches, {"plain": 0, "selective": 0}.get(run.backprop, 1)
    flops = sum(3 * part.flops / tp for part in share.ends)
    for part in share.layers:
        twice = part.mixing if run.backprop == "selective" else again * part.flops
        flops += (3 * part.flops + twice) / (tp if part.shared else 1)
    moved = m * (4 * (sum(kept_bytes(share, run)) + kept_at_ends(share, run)) + (3 + again) * WEIGHT * share.total)
    step = GRADIENT + WEIGHT + (0 if run.offload else 2 * OPTIMIZER)
    moved += step * share.total / (run.shards * (run.copies if run.zero else 1))
    return flops * m * run.rows / run.positions, moved


def traffic(share: Share, run: Run) -> dict[str, float]:
    """Bytes that a rank sends in a step, by axis and collective. A second forward pass sends what the first sent, but for the
    sums behind tp's sublayers, which nothing in it needs.

    tp gathers a row before a sublayer and scatters the sum behind it, and the other way round in the backward pass; gradients
    of what it does not cut it adds up once a step. Shards are gathered before each pass of a sublayer, those of the ends once a
    micro-batch, in a pipeline all of them once a step; gradients are summed every micro-batch, in a pipeline once, and so are
    those of experts that ep shares out. The ring sends keys and values in each pass and their gradients, in float32, in one.
    Experts are taken to be chosen evenly. Left out are a few numbers: of a learned bias of positions, which the stages of a
    pipeline add up, of buffers that change, of statistics of routing.
    """
    sizes, m, tp = run.sizes, run.micro_batches, run.sizes["tp"]
    forward = 1 if run.backprop == "plain" else 2
    passes, sums = forward + 1, 1 if sizes["pp"] > 1 else m
    stream = m * ACTIVATION * run.rows * run.tokens / run.positions  # bytes for each number a token
    every = "ring" if sizes["ring"] > 1 else "ulysses"  # the axis that stands for all ranks of a row
    sent: Counter[str] = Counter()

    def add(axis: str, collective: str, size: float) -> None:
        sent[f"{axis} {collective}"] += size

    weights = share.total if sizes["pp"] > 1 else m * (2 * sum(share.own) + share.root)
    add("fsdp", "all-gather", all_gather(WEIGHT * weights, run.shards))
    add("fsdp", "reduce-scatter", sums * all_gather(GRADIENT * share.total, run.shards))
    once = 1 if sizes["ep"] > 1 else sums
    others = share.total - share.experts
    for count, n, times in (others, run.copies, sums), (share.experts, run.copies // sizes["ep"], once):
        gradients, weights = (size * count / run.shards for size in (GRADIENT, WEIGHT))
        if run.zero == 0:
            add("dp", "all-reduce", times * all_reduce(gradients, n))
        else:
            add("dp", "reduce-scatter", times * all_gather(gradients, n))
            add("dp", "all-gather", (2 * m if run.zero == 3 else 1) * all_gather(weights, n))
    for part in share.layers:
        row = all_gather(stream * run.dim, tp)
        add("tp", "all-gather", (passes if part.shared else forward) * row)
        add("tp", "reduce-scatter", (2 if part.shared else 1) * row)
        row = all_gather(stream * run.positions * part.gathered, run.positions)
        add(every, "all-gather", forward * row)
        add(every, "reduce-scatter", row)
        add("ulysses", "all-to-all", passes * all_to_all(stream * part.exchanged, sizes["ulysses"]))
        add(every, "all-to-all", passes * all_to_all(stream * part.scanned, run.positions))
        add("ring", "send", (passes + 4 / ACTIVATION) * pass_round(stream * part.passed, sizes["ring"]))
        add("ep", "all-to-all", 2 * passes * all_to_all(stream * part.routed, sizes["ep"]))
    whole = sum(part.parameters - part.cut for part in (*share.layers, *share.ends))
    add("tp", "all-reduce", all_reduce(GRADIENT * whole / run.shards, tp))
    neighbours = (share.index > 0) + (share.index < sizes["pp"] - 1)
    add("pp", "send", neighbours * stream * run.dim / tp)
    add("pp", "all-reduce", all_reduce(GRADIENT * share.tied / run.shards, 2))
    return {name: size for name, size in sent.items() if size}
