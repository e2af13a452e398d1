"""The record of a run: a line of JSON a step in a file, a bar in the terminal, a picture at the end."""

import json
import os
import sys
from pathlib import Path

from tqdm import tqdm


class Log:
    """Keeps `run`/log.jsonl and shows the run as it goes.

    Two kinds of lines: {"step", "loss", "elapsed", …} for each step and {"step", "bpb", "elapsed"} for each evaluation,
    which of a task has {"accuracy", "complete", "val_loss", "chance"} in place of bpb; losses in nats a token that counts,
    bpb in bits a byte, accuracies as shares, elapsed in seconds. Now and then a step of several processes has "busy" too, and
    where one of them is slow "slow", a line that is shown: see models/stragglers.py. A run that goes on after `step` drops
    what a killed process wrote later than that. `quiet`: writes and shows nothing (all processes but one).
    """

    def __init__(self, run: Path, step: int, *, quiet: bool = False):
        self.quiet, self.path = quiet, run / "log.jsonl"
        self.pace, self.judged = "", ""
        if quiet:
            return
        run.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read(self.path) if record["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(partial, self.path)
        self.file = self.path.open("a", buffering=1)
        self.bar = tqdm(total=100, bar_format="{percentage:3.0f}%|{bar:24}| {postfix}", disable=None, leave=False)

    def step(self, done: float, **record) -> None:
        """A training step: step, loss, elapsed, speed, share, …; `done` is the share of the run before it."""
        if self.quiet:
            return
        self.file.write(json.dumps(record) + "\n")
        self.pace = "loss {loss:.3f}  {speed:,.0f} tokens/s, {share:.0%} of the matmul peak".format(**record)
        self.bar.n = 100 * min(1.0, done)
        self.bar.set_postfix_str(f"step {record['step']}  {self.pace}{self.judged}", refresh=False)
        self.bar.update(0)
        if "slow" in record:
            self.say("step {step:>6}  {slow}".format(**record))

    def evaluation(self, **record) -> None:
        """How the model is judged after a step: step, elapsed, and bpb, or of a task accuracy, val_loss and chance."""
        if self.quiet:
            return
        self.file.write(json.dumps(record) + "\n")
        of_task = "  {accuracy:.1%} right (chance {chance:.1%}), {val_loss:.3f} nats"
        self.judged = ("  {bpb:.3f} bits per byte" if "bpb" in record else of_task).format(**record)
        self.say("step {step:>6}  {elapsed:>6.0f} s".format(**record) + f"{self.judged}  {self.pace}")

    def say(self, line: str) -> None:
        if not self.quiet:
            tqdm.write(line)

    def close(self) -> None:
        if not self.quiet:
            self.bar.close()
            self.file.close()


def read(path: Path) -> list[dict]:
    """The records of a log. The last line may have been cut short by a kill; any other bad line is a ValueError."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{str(path)!r}, line {number}, is not JSON") from None
    return records


def show(text: str) -> int:
    """Print a text of which a reader may take the beginning and leave (`| head`). The exit status: 0."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or leaving would complain again
    return 0


def draw_curve(path: Path, picture: Path) -> None:
    """Loss and bits per byte, or the accuracy of a task, over the steps of a log, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read(path)
    losses = [(r["step"], r["loss"]) for r in records if "loss" in r]
    judged = [r for r in records if "loss" not in r]
    chances = {r["chance"] for r in judged if "chance" in r}
    measure = "accuracy" if chances else "bpb"
    scores = [(r["step"], r[measure]) for r in judged]
    figure, left = plt.subplots(figsize=(8, 4.5), layout="constrained")
    left.plot(*zip(*losses, strict=True), color="0.75", linewidth=0.8, label="training loss")
    left.set(xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))
    right = left.twinx()
    if scores:
        right.plot(*zip(*scores, strict=True), color="C0", marker="o", markersize=3, label="validation")
    for chance in chances:
        right.axhline(chance, color="C0", linestyle=":", linewidth=0.8, label="chance")
    right.set(ylabel="accuracy" if chances else "bits per byte", ylim=(0, 1.05 if chances else None))
    place = dict(loc="center right", bbox_to_anchor=(1, 0.5)) if chances else dict(loc="upper right", bbox_to_anchor=(1, 1))
    figure.legend(**place, bbox_transform=left.transAxes)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
