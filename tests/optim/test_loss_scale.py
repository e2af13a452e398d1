"""The factor of a float16 loss: as PyTorch's on one process, and one decision on many, whatever they hold."""

import json
import math

import pytest
import torch

import train
from models.log import read
from optim.loss_scale import LossScale
from tests.optim.scale_processes import FLAGS
from tests.processes import printed_by

MESHES = ["dp=2", "fsdp=2", "tp=2", "pp=2"]


def test_an_overflow_on_one_process_is_skipped_by_all(tmp_path):
    """And float16 runs on each mesh have the losses of one process, and the same scale."""
    (tmp_path / "text").mkdir()
    for number in range(3):
        (tmp_path / "text" / f"{number}.txt").write_text("".join(chr(97 + (i * i + number) % 23) for i in range(600)))
    printed_by(2, "tests.optim.scale_processes", str(tmp_path), *MESHES)
    assert train.main([*FLAGS, "--data", str(tmp_path / "text"), "--out", str(tmp_path / "one")]) == 0
    runs = [tmp_path / name for name in ("one", *MESHES)]
    losses = [[record["loss"] for record in read(run / "log.jsonl") if "loss" in record] for run in runs]
    for ours in losses[1:]:
        assert all(math.isclose(a, b, rel_tol=2e-3) for a, b in zip(ours, losses[0], strict=True)), losses
    scales = [json.loads((run / "step-000006" / "progress.json").read_text())["scaler"] for run in runs]
    assert scales == scales[:1] * len(runs) and scales[0]["_growth_tracker"] == 6


@pytest.mark.parametrize("enabled", [True, False])
def test_it_is_pytorchs_on_one_process(enabled):
    """Twelve steps, of which some overflow: the same weights, factors and saved states, and each reads the other's."""
    made = [torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3, enabled=enabled),
            LossScale(interval=3, enabled=enabled)]  # fmt: skip
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in made]
    for step in range(12):
        for scaler, weight in zip(made, weights, strict=True):
            optimizer = torch.optim.SGD([weight], lr=0.1)
            scaler.scale((weight * (1 + step)).sum()).backward()
            if enabled and step in (2, 6, 7):
                weight.grad[step % 3] = (math.inf, math.nan, -math.inf)[step % 3]
            if step % 2:
                scaler.unscale_(optimizer)
                assert step in (2, 6, 7) or torch.equal(weight.grad, torch.full((3,), 1.0 + step))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert torch.equal(*weights) and made[0].state_dict() == made[1].state_dict(), step
        if step == 8:
            for scaler, state in zip(made, [scaler.state_dict() for scaler in reversed(made)], strict=True):
                if enabled:
                    scaler.load_state_dict(state)
    assert weights[0].isfinite().all()
