"""What all tests share: a cache of their own, so that they neither read nor fill the user's; one seed for PyTorch."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROSETTA_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
