"""Compiling for GPUs takes minutes: it runs beside the other tests and behind them, in processes of its own from the start."""

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {  # by the fixture that waits
    "compilations": ["kernels.compile", "--quick"],
    "traces": ["tests.kernels.trace_triton"],
}
LIMIT = 900  # seconds, after which a process hangs


class Compiling:
    """The processes under way, one after the other: in them Triton compiles, in the tests' own it interprets."""

    def __init__(self, wanted: list[str]):
        self.process, self.closed, self.pool = None, False, ThreadPoolExecutor(1)
        self.printed: dict[str, Future] = {name: self.pool.submit(self.run, COMMANDS[name]) for name in wanted}

    def run(self, words: list[str]) -> list[str]:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        with subprocess.Popen(["nice", sys.executable, "-m", *words], cwd=ROOT, env=environment, **pipes) as self.process:
            if self.closed:
                self.process.kill()
            try:
                out, complaint = self.process.communicate(timeout=LIMIT)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise
        assert self.process.returncode == 0, out[-3000:] + complaint[-3000:]
        return out.splitlines()

    def close(self) -> None:
        self.closed = True
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        self.pool.shutdown(cancel_futures=True)


under_way = pytest.StashKey[Compiling]()


def pytest_collection_modifyitems(items):
    """What waits for a compilation comes last, before what waits for a lecture."""
    items.sort(key=lambda item: any(name in getattr(item, "fixturenames", ()) for name in COMMANDS))


def pytest_collection_finish(session):
    wanted = [name for name in COMMANDS if any(name in getattr(item, "fixturenames", ()) for item in session.items)]
    if wanted and not session.config.option.collectonly:
        session.config.stash[under_way] = Compiling(wanted)


def pytest_sessionfinish(session):
    if compiling := session.config.stash.get(under_way, None):
        compiling.close()


@pytest.fixture
def compilations(request) -> list[str]:
    """Lines that `python -m kernels.compile` printed."""
    return request.config.stash[under_way].printed["compilations"].result()


@pytest.fixture
def traces(request) -> list[str]:
    return request.config.stash[under_way].printed["traces"].result()
