"""Dense models beside mixtures that cost as much a token, in several sizes: losses, speed-up factors, and after fine-tuning.

    python -m lectures.twins --sizes 32,64,96 --more 128 --steps 400

Artetxe et al. 2021 (arXiv:2112.10684). Each pair learns the same batches of text (--data) in turns and is judged on text of
that kind and on text of another (--other; by default C++ headers that come with PyTorch), before and after it learns a little
of the other.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from data import Loader, load, open_text, windows
from models import Config, LanguageModel, build_model
from models.auxiliary import after_step
from models.config import Parser, numbers, status_of
from models.describe import active, training_flops
from models.laws.speedup import speedup
from models.machine import autocast, choose_device, choose_dtype, tune_cpu
from models.score import bits_per_byte
from nn.checks import at_least
from optim import Combined
from train import build_optimizer

DENSE = "mlp:activation=relu2:width={width}"
EXPERTS = "moe:experts=8:top_k=2:width={half}:gated=false:activation=relu2:capacity=2:balance=0.01:scaling=2"
CPU = torch.device("cpu")


@dataclass
class Run:
    """A model that learns, what moves it and the processor time that it has taken."""

    model: LanguageModel
    optimizer: Combined
    seconds: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)  # how it is judged, by the kind of text

    def step(self, inputs: torch.Tensor, targets: torch.Tensor, rate: float, dtype: torch.dtype) -> None:
        began = time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate
        with autocast(CPU, dtype):
            loss = self.model(inputs, targets) / (targets >= 0).sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        after_step(self.model)
        self.seconds += time.process_time() - began


def made(ffn: str, seed: int = 0, **sizes) -> Run:
    """A model of such ffns and attention, with the optimizers that train.py has."""
    config = Config.of(stem="", mixer="gqa:qk_norm=unit", ffn=ffn, seed=seed, **sizes)
    model = build_model(config, seed=seed)
    return Run(model, build_optimizer(config, model))


def learn(runs: list[Run], batches: Iterator, steps: int, *, rate: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
    """All runs take each step in turn, on the same batch, so that what else the machine does is the same to all of them.

    The rate is constant for half of the steps and then falls on a straight line to zero.
    """
    for step in range(steps):
        inputs, targets = next(batches)[:2]
        for run in runs:
            run.model.train()
            run.step(inputs, targets, rate * min(1.0, 2 * (1 - (step + 0.5) / steps)), dtype)


def compute(run: Run, tokens: int) -> float:
    """FLOPs of training on so many tokens, of what a token goes through."""
    seq_len = run.model.config.seq_len
    return training_flops(run.model, seq_len) / seq_len * tokens


Judge = Callable[[LanguageModel], float]


def judged(run: Run, judges: dict[str, Judge]) -> Run:
    run.model.eval()
    run.losses = {kind: judge(run.model) for kind, judge in judges.items()}
    return run


def factors(dense: dict[int, Run], mixtures: dict[int, Run], kind: str, tokens: int) -> dict[int, float | None]:
    """The speed-up factor of each mixture on text of this kind; None where its loss is beyond the dense curve."""
    curve = [(compute(run, tokens), run.losses[kind]) for run in dense.values()]
    found = {}
    for size, run in mixtures.items():
        inside = min(loss for _, loss in curve) <= run.losses[kind] <= max(loss for _, loss in curve)
        found[size] = speedup(run.losses[kind], compute(run, tokens), *zip(*curve, strict=True)) if inside else None
    return found


def twins(args: Namespace) -> None:
    """Print what the pairs say, one after the other, and the speed-up factors of the mixtures."""
    dtype = choose_dtype("auto", choose_device("cpu"))
    tokenizer, *own = open_text(args.data, vocab_size=args.vocab_size)
    texts = {"own": own, "other": load(args.other or str(headers()), tokenizer)}
    shape = dict(seq_len=args.seq_len, batch_size=args.batch_size)
    tokens = args.steps * args.seq_len * args.batch_size

    def judge(held, model: LanguageModel) -> float:
        with autocast(CPU, dtype):
            return bits_per_byte(model, windows(held, **shape, limit=args.eval_tokens), tokenizer.token_bytes)

    judges = {kind: partial(judge, held) for kind, (_, held) in texts.items()}
    ladders = {"dense": {}, "mixture": {}}
    print(f"{tokens:,} tokens of {args.data}, {dtype}; bits per byte of such text, of another, after {args.tune} steps of that")
    print("dim          parameters    active    FLOPs  us/token     own   other   tuned")
    for dim in args.sizes + args.more:
        sizes = dict(dim=dim, depth=args.depth, heads=max(1, dim // 32), vocab_size=args.vocab_size, seq_len=args.seq_len)
        ffns = dict(dense=DENSE) | (dict(mixture=args.mixture) if dim in args.sizes else {})
        pair = {kind: made(ffn.format(width=4 * dim, half=2 * dim), args.seed, **sizes) for kind, ffn in ffns.items()}
        learn([*pair.values()], Loader(texts["own"][0], **shape, seed=args.seed), args.steps, dtype=dtype)
        pace = {kind: 1e6 * run.seconds / tokens for kind, run in pair.items()}
        for kind, run in pair.items():
            ladders[kind][dim] = judged(run, judges)
        if args.tune:
            learn([*pair.values()], Loader(texts["other"][0], **shape, seed=args.seed), args.tune, rate=0.25, dtype=dtype)
        for kind, run in pair.items():
            tuned = f"{judges['other'](run.model.eval()):.4f}" if args.tune else "-"
            whole = sum(p.numel() for p in run.model.parameters())
            print(f"{dim:>3} {kind:>8} {whole:>10,} {active(run.model):>9,} {compute(run, tokens):>8.2g} {pace[kind]:>9.1f} "
                  f"{run.losses['own']:>7.4f} {run.losses['other']:>7.4f} {tuned:>7}", flush=True)  # fmt: skip
    for kind in texts:
        found = factors(ladders["dense"], ladders["mixture"], kind, tokens)
        shown = (f"dim {dim} " + ("off the curve" if factor is None else f"{factor:.2f}") for dim, factor in found.items())
        print(f"speed-up on text of {'its own' if kind == 'own' else 'the other'} kind: {', '.join(shown)}")


def headers() -> Path:
    """C++ headers that stand beside PyTorch: text that every machine with this project has, and that is no Python."""
    return Path(torch.__file__).parent / "include" / "c10"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m lectures.twins", description=__doc__)
    number = partial(parser.add_argument, type=int, metavar="N")
    parser.add_argument("--sizes", default="32,64,96", metavar="N,N", help="dims of pairs [%(default)s]")
    parser.add_argument("--more", default="", metavar="N,N", help="dims of further dense models, for the curve")
    parser.add_argument("--mixture", default=EXPERTS, metavar="SPEC", help="ffns of the mixtures [%(default)s]")
    parser.add_argument("--data", default="python", metavar="SPEC", help="what to learn, as in train.py [%(default)s]")
    parser.add_argument("--other", default="", metavar="SPEC", help="text of another kind [C++ headers]")
    number("--steps", default=400, help="of training [%(default)s]")
    number("--tune", default=40, help="steps on the other kind of text, at a quarter of the rates [%(default)s]")
    number("--depth", default=2, help="layers [%(default)s]")
    number("--vocab-size", default=1024, help="pieces of the tokenizer [%(default)s]")
    number("--seq-len", default=256, help="tokens a row [%(default)s]")
    number("--batch-size", default=16, help="rows a step [%(default)s]")
    number("--eval-tokens", default=131072, help="tokens that judge [%(default)s]")
    number("--seed", default=0, help="of weights and batches [%(default)s]")
    args = parser.parse_args(argv)

    def compare() -> None:
        args.sizes, args.more = whole_numbers("sizes", args.sizes), whole_numbers("more", args.more)
        least = dict(steps=1, tune=0, depth=1, seq_len=2, batch_size=1, eval_tokens=1, seed=0)
        for name, value in least.items():
            at_least(value, **{name: getattr(args, name)})
        tune_cpu()
        twins(args)

    return status_of("lectures.twins", compare)


def whole_numbers(name: str, text: str) -> list[int]:
    """The whole numbers from 1 on of a flag, with commas between them, in their order; none of an empty one."""
    found = numbers(text, name) if text else []
    if any(number != int(number) or number < 1 for number in found):
        raise ValueError(f"{name}: whole numbers from 1 on, not {text!r}")
    return sorted({int(number) for number in found})


if __name__ == "__main__":
    sys.exit(main())
