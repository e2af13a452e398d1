"""What every lecture stands on: the house on the import path, threads that wait quietly, a short training loop, and a place
for its figure.

`python lectures/NN_name.py` puts this folder on the path, not the one above it; importing this module adds that one.
Import it before torch.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait are slow on busy cores; torch reads it
os.environ.setdefault("MPLBACKEND", "Agg")  # draw into files; a notebook has set its own


def save_figure(figure, name: str) -> Path:
    """Save a figure as lectures/figures/<name>.png, where git does not look."""
    path = ROOT / "lectures" / "figures" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def learn(model, batches, steps: int, *, warmup: float = 0.0) -> None:
    """Train on `steps` batches that begin with inputs and targets, both (B, T); a target of -100 does not count.

    The learning rates rise over a share `warmup` of the steps and fall on a straight line to zero.
    """
    from train import build_optimizer

    optimizer = build_optimizer(model.config, model)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * (1 - step / steps) * min(1, (step + 1) / max(1, warmup * steps))
        inputs, targets = next(batches)[:2]
        (model(inputs, targets) / (targets >= 0).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
