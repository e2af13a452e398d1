"""What all tests share: a cache of their own, so that they neither read nor fill the user's; one seed for PyTorch, and tiny
numbers as they are; Triton in its interpreter, unless the tests of a GPU were asked for; one thread, since lectures and
compilers run beside them, and threads that wait for each other on busy cores take several times as long as one."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when PyTorch is imported


def pytest_configure(config):
    if config.option.markexpr != "gpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are imported


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROSETTA_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def seed():
    import torch

    torch.manual_seed(0)
    torch.set_flush_denormal(False)  # the scripts set it for their process
