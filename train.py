"""Train a language model: text in; a checkpoint, a loss curve and a sample of text out.

    python train.py                                            the default model, a few minutes on two cores
    python train.py --mixer gqa:kv_heads=2 --ffn swiglu        a stack of other parts; --list shows what there is
    python train.py --model gpt2 --data my/texts --steps 20000
    python train.py --data task:induction:length=64            a task with known answers; --list task shows them all
    python train.py --resume                                   go on with the newest run, bit for bit
    torchrun --nproc-per-node 8 train.py …                     the same run, each step's batch shared out
"""

import math
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from data import TASKS, Loader, Task, TaskLoader, examples, open_text, windows
from models import Config, LanguageModel, build_model
from models.auxiliary import after_step
from models.backprop import BACKPROPS
from models.checkpoint import MANIFEST, checkpoints, find, model_tensors, write_json, write_tensors
from models.config import Parser, add_flags
from models.describe import forward_flops
from models.distill import MATCHES, with_teacher
from models.generate import Sampler, sample
from models.heads import HEADS
from models.learn_only import learn_only
from models.log import Log, draw_curve, show
from models.machine import autocast, choose_device, choose_dtype, generators, matmul_peak, tune_cpu
from models.parallel import Spread, keeps_whole
from models.pipeline import PIPELINES
from models.saver import Saver, restore
from models.score import answered, bits_per_byte, posed, worked_example
from models.signals import catch_signals, release_signals
from models.stack import FFNS, MIXERS
from models.stragglers import OwnTime
from models.weights import fill, load_model, read_config, save_config, skeleton
from nn.adapt import ADAPTERS
from nn.init import INITS
from nn.moe import ROUTERS
from nn.moe.hashed import domains_of
from nn.norm import NORMS
from nn.objective import OBJECTIVES
from nn.parallel.mesh import share_of_rows, sizes_of
from nn.position import POSITIONS
from nn.spec import build, listing, resolve
from optim import OPTIMIZERS, SCHEDULES, Combined, by_parts, split_parameters
from optim.loss_scale import LossScale
from optim.parallel.processes import agree, first_rank_first, join_processes, leave_processes, lost_touch, restarts, summed
from optim.parallel.run_state import RunState

FAMILIES = {"mixer": MIXERS, "ffn": FFNS, "router": ROUTERS, "position": POSITIONS, "norm": NORMS, "head": HEADS, "init": INITS,
            "objective": OBJECTIVES, "adapter": ADAPTERS, "match": MATCHES, "backprop": BACKPROPS, "optimizer": OPTIMIZERS,
            "schedule": SCHEDULES, "pipeline": PIPELINES, "task": TASKS}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="train.py", usage="python train.py [--flag value …]", description=__doc__)
    parser.add_argument("--list", nargs="?", const="", metavar="FAMILY", help="show every concept there is, and leave")
    parser.add_argument("--resume", nargs="?", const="runs", metavar="FOLDER",
                        help="go on with a checkpoint, a run, or the newest of all runs")  # fmt: skip
    add_flags(parser)
    flags = vars(parser.parse_args(argv))
    family, place = flags.pop("list"), flags.pop("resume")
    try:
        if family is not None:
            return show(listing(FAMILIES, family))
        task = task_of(flags.get("data", ""))
        if task:
            if {"tokenizer", "val_data"} & flags.keys():
                raise ValueError("tokenizer, val_data: a task has words and validation rows of its own")
            flags = dict(seq_len=task.seq_len) | flags
        if restarts() and flags.get("out") and checkpoints(Path(flags["out"])):
            place = flags["out"]
        if place is not None:
            resumed = find(Path(place))
            if not (resumed / MANIFEST).exists():
                raise ValueError(f"resume: {place!r} holds weights but no run to go on with; --weights starts from it")
            return train(replace(read_config(resumed), **flags), resumed)
        if flags.get("weights"):
            weights = find(Path(flags["weights"]))
            tokenizer = weights / "tokenizer" if (weights / "tokenizer").exists() else weights
            defaults = dict(tokenizer=str(tokenizer), out="", only="", teacher="", match="")
            return train(replace(read_config(weights), **defaults | flags | dict(weights=str(weights))), None)
        return train(Config.of(**flags), None)
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk: what was saved before is still there
        print(f"train.py: {error.filename or 'while saving'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not lost_touch(error):
            raise
        print(f"train.py: process {os.environ['RANK']} lost touch with another, which torchrun names", file=sys.stderr)
        time.sleep(2.0)  # it names whom it finds gone first, and looks ten times a second
        return 1
    except KeyboardInterrupt:
        return 130


def train(config: Config, resumed: Path | None) -> int:
    tune_cpu()
    rank, world = join_processes()
    sizes = sizes_of(config.mesh, world)
    place, shares = share_of_rows(rank, sizes)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    torch.manual_seed(config.seed)

    # The batches: of text, with its tokenizer and its tokens, or of a task, with words of its own
    objective, task = build(config.objective, OBJECTIVES, "objective"), task_of(config.data)
    rows, left = divmod(config.batch_size, shares * config.accumulate)
    if left:
        raise ValueError(f"batch_size: {config.batch_size} does not divide into {shares} shares x {config.accumulate} parts")
    part_of_all = dict(batch_size=rows, seed=config.seed, rank=place, world_size=shares)
    if task:
        if config.seq_len != task.seq_len:
            raise ValueError(f"seq_len: {config.seq_len} was given, but a sequence of {config.data} has {task.seq_len} tokens")
        if not objective.causal:
            raise ValueError(f"objective: a task asks for answers of its own, not {config.objective!r}")
        loader, source, ids = TaskLoader(task, **part_of_all), f"rows of {task} without end", task.vocab_size
        counting = task.asked / task.seq_len  # of the positions
    else:
        kept = dict(tokenizer=config.tokenizer, vocab_size=config.vocab_size, saved=resumed and resumed / "tokenizer")
        with first_rank_first(rank, world):
            tokenizer, training, validation = open_text(config.data, val_spec=config.val_data, domains=config.domains, **kept)
        loader, source = Loader(training, seq_len=config.seq_len, **part_of_all), f"{len(training):,} training tokens"
        ids, counting = tokenizer.vocab_size, objective.share

    # The model and what moves it
    run = resumed.parent if resumed else Path(config.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    if not resumed and checkpoints(run):
        raise ValueError(f"out: {str(run)!r} holds a run already; --resume {run} goes on with it")
    config = replace(config, out=str(run), dtype=str(dtype).removeprefix("torch."))
    saved = resumed or (Path(config.weights) if config.weights else None)
    if not saved and config.adapt:
        raise ValueError(f"adapt: {config.adapt} stands beside weights that have learned something; give --weights")
    if not saved:
        config = replace(config, vocab_size=objective.vocabulary(ids))
    elif objective.vocabulary(ids) > config.vocab_size:
        name, needed = "data" if task else "tokenizer", objective.vocabulary(ids)
        raise ValueError(f"{name}: it needs {needed} ids, the weights know only {config.vocab_size}")
    if keeps_whole(sizes):
        model = (load_model(saved, config) if saved else build_model(config, seed=config.seed)).to(device)
    else:
        model = skeleton(config)  # nobody has all of it: each fills in its parts below
    learn_only(model, config.only)
    kinds = domains_of(model, told=len(loader.tokens.domains) if config.domains else 1)
    flops_a_token = 3 * forward_flops(model, config.seq_len) / config.seq_len
    parameters = sum(p.numel() for p in model.parameters())
    state = RunState(model, model_tensors, partial(build_optimizer, config))
    schedule, options = resolve(config.schedule, SCHEDULES, "schedule")
    scaler = LossScale(device, enabled=dtype == torch.float16)
    forward = with_teacher(model, config)  # the model itself where there is none
    forward = torch.compile(forward) if config.compile else forward
    stages = dict(pipeline=config.pipeline, rows=rows * config.accumulate, parts=config.accumulate)
    ways = dict(autocast=partial(autocast, device, dtype), tp_overlap=config.tp_overlap)
    spread = Spread(model, sizes, device, forward=forward, **ways, **stages)
    optimizer = state.after(spread)
    if not spread.is_whole:
        fill(state.weights(), config, saved)
    own_time = OwnTime(spread)

    # Where the run stands, what a step costs, how a model is judged and saved
    step, before = restore(resumed, state, loader, scaler) if resumed else (0, 0.0)
    if not config.steps and not config.minutes:
        raise ValueError("steps: give a number of --steps, or of --minutes")
    tokens_a_step = config.batch_size * config.seq_len
    counted_a_step = tokens_a_step * counting
    peak = matmul_peak(device, dtype) * world
    log = Log(run, step, quiet=rank > 0)
    log.say(f"{run}: {parameters:,} parameters, {source}, "
            f"{config.dtype} on {world} x {device}, matmul peak {peak / 1e9:,.0f} GFLOP/s")  # fmt: skip
    saver = Saver(run, keep=config.keep, rank=rank, parts=not spread.is_whole, behind=config.save_behind)

    def evaluate(limit: int | None = None) -> dict[str, float]:
        with spread.autocast():
            if task:
                rows_of_it = examples(task, batch_size=rows, limit=limit)
                return answered(model, rows_of_it, logits_of=spread.logits) | dict(chance=task.chance)
            batches = windows(validation, batch_size=rows, seq_len=config.seq_len, limit=limit)
            batches = posed(batches, objective, ids)
            return dict(bpb=bits_per_byte(spread.judge, batches, tokenizer.token_bytes, packed=config.packed, device=device))

    def save_all() -> Path:
        tensors, tree = state.optimizer()

        def write(folder: Path) -> None:
            save_config(model.config, folder)
            if not task:
                tokenizer.save(folder / "tokenizer")
            write_tensors(folder / "generators.safetensors", generators())
            progress = dict(loader=loader.state_dict(), scaler=scaler.state_dict(), optimizer=tree)
            write_json(folder / "progress.json", dict(step=step, elapsed=elapsed, **progress))

        return saver.save(step, dict(model=state.weights(), optimizer=tensors), write)

    # The loop
    stop, began, pace = catch_signals(), time.perf_counter(), 0.0
    while True:
        elapsed, halted, writing = agree(before + time.perf_counter() - began, stop, saver.writing, world)
        if not writing:
            saver.finish()
        if config.steps:
            done, half_a_step = step / config.steps, 0.5 / config.steps
        else:
            done, half_a_step = elapsed / (60 * config.minutes), 0.5 * pace / (60 * config.minutes)
        if halted or done >= 1:
            break
        multiplier = schedule(min(1.0, done + half_a_step), **options)  # a schedule is asked for the middle of a step
        for group in state.param_groups:
            group["lr"] = group["base_lr"] * multiplier

        own_time.begin()
        parts, started = [], time.perf_counter()
        for part in range(config.accumulate):
            batch = next(loader)
            inputs, targets = objective(batch.inputs, batch.targets, ids, (config.seed, step, part, place))
            parts.append((inputs, targets, batch.told(packed=config.packed)))
        own_time.loaded()
        scale = scaler.scale(torch.ones((), device=device)).item()  # 1, but for float16
        loss = summed(spread.step(parts, scale / counted_a_step), world) / counted_a_step
        if not math.isfinite(loss):
            saver.finish()
            log.close()
            release_signals()
            good = checkpoints(run)[-1:] or ["none"]
            print(f"train.py: the loss became {loss} at step {step + 1}; last good checkpoint: {good[0]}", file=sys.stderr)
            return 1
        if config.clip:
            scaler.unscale_(optimizer)
            spread.clip(config.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after_step(model)
        step += 1

        elapsed, took = before + time.perf_counter() - began, time.perf_counter() - started
        pace = 0.9 * pace + 0.1 * took if pace else took  # seconds a step, the last ten or so
        speed = tokens_a_step / pace
        share = speed * flops_a_token / peak
        log.step(done, step=step, loss=loss, lr=multiplier, elapsed=elapsed, speed=speed, share=share, **own_time.end(step))
        if config.eval_every and step % config.eval_every == 0:
            log.evaluation(step=step, elapsed=before + time.perf_counter() - began, **evaluate(config.eval_tokens))
        if config.save_every and step % config.save_every == 0:
            save_all()

    # The end: everything saved, the whole validation set, a curve and a sample
    elapsed = before + time.perf_counter() - began
    folder = save_all()
    saver.finish()
    release_signals()
    if halted:
        log.close()
        log.say(f"stopped after step {step}; to go on: python train.py --resume {run}")
        return 128 + halted
    if rank == 0 or not spread.is_whole:
        log.evaluation(step=step, elapsed=elapsed, **evaluate(), whole=True)
        log.close()
    if rank == 0:
        draw_curve(run / "log.jsonl", run / "curve.png")
        log.say(f"saved {folder} and {run / 'curve.png'}" + ("; an example:" if task else "; a sample:\n" * model.causal))
    if rank == 0 and (kinds > 1 or not spread.is_whole):
        log.say(f"python eval.py sample --checkpoint {run}" + " --domain 0" * (kinds > 1))
    elif rank == 0 and task:
        with autocast(device, dtype):
            print(worked_example(model, next(examples(task, batch_size=1)), task.spell))
    elif rank == 0 and model.causal:
        sampler = Sampler(temperature=0.8, top_p=0.95, seed=config.seed)
        print(sample(model, tokenizer, new_tokens=config.sample, sampler=sampler))
    return 0


def task_of(data: str) -> Task | None:
    """The task that `task:NAME:key=value` names; None for text."""
    return build(data.removeprefix("task:"), TASKS, "task") if data.startswith("task:") else None


def build_optimizer(config: Config, model: LanguageModel) -> Combined:
    """`optimizer` for the hidden matrices, `rest_optimizer` for everything else: head, embeddings, vectors."""
    hidden, head, embedding, vector = split_parameters(model)
    matrices, options = resolve(config.optimizer, OPTIMIZERS, "optimizer")
    rest, rest_options = resolve(config.rest_optimizer, OPTIMIZERS, "optimizer")
    groups = [dict(params=head), dict(params=embedding, lr=config.embedding_lr), dict(params=vector, weight_decay=0.0)]
    groups = [group for group in groups if group["params"]]
    made = (matrices, by_parts(model, hidden), options), (rest, groups, rest_options)
    optimizer = Combined(make(params, **given) for make, params, given in made if params)
    if config.offload:
        optimizer.offload()
    return optimizer


if __name__ == "__main__":
    leave_processes(main())
