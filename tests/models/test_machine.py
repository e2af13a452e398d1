"""What the machine at hand is: devices by name, a peak that can be, a measurement that disturbs nothing."""

import pytest
import torch

from models.machine import autocast, choose_device, choose_dtype, matmul_peak


def test_devices():
    assert choose_device("cpu") == torch.device("cpu") and choose_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "cpu:x", "tpu"])
def test_devices_that_are_not_there(name):
    with pytest.raises(ValueError, match="^device: ") as caught:
        choose_device(name)
    assert len(str(caught.value).splitlines()) == 1


def test_peak():
    cpu = torch.device("cpu")
    state = torch.get_rng_state()
    assert 1e8 < matmul_peak(cpu, torch.float32, seconds=0.01) < 1e15
    assert torch.equal(torch.get_rng_state(), state)
    assert choose_dtype("float16", cpu) == torch.float16 and choose_dtype("auto", cpu) in (torch.float32, torch.bfloat16)


def test_autocast():
    a = torch.ones(2, 2)
    for dtype in (torch.float32, torch.bfloat16):
        with autocast(torch.device("cpu"), dtype):
            assert (a @ a).dtype == dtype
