"""What every lecture stands on: the house on the import path, threads that wait quietly, and a place for its figure.

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
