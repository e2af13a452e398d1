"""A cache folder for the tests of one session, so that they neither read nor fill the user's."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROSETTA_CACHE", str(folder))
        yield folder
