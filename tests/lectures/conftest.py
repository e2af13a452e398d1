"""Lectures take minutes, so they run beside the other tests: two at a time, each on one thread, from the session's start.

They step back behind the tests (`nice`), so that these, which come one after the other, never wait for a core.
"""

import os
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 600  # seconds by the clock, after which a lecture hangs
TEST = "test_a_lecture_runs_and_leaves_a_figure"


@dataclass
class Done:
    status: int
    printed: str
    complaint: str
    worked: float  # seconds of processor time


class Lectures:
    """Runs of lectures under way, by path."""

    def __init__(self, paths: list[Path], folder: Path):
        self.folder, self.processes, self.closed = folder, [], False
        self.pool = ThreadPoolExecutor(2)
        self.runs: dict[Path, Future] = {path: self.pool.submit(self.run, path) for path in paths}

    def run(self, path: Path) -> Done:
        environment = os.environ | dict(MPLBACKEND="Agg", OMP_NUM_THREADS="1", ROSETTA_CACHE=str(self.folder / "cache"))
        places = [self.folder / f"{path.stem}.{kind}" for kind in ("out", "err")]
        with places[0].open("w") as out, places[1].open("w") as err:
            process = subprocess.Popen(["nice", sys.executable, path], cwd=ROOT, env=environment, stdout=out, stderr=err)
            self.processes.append(process)
            guard = threading.Timer(LIMIT, process.kill)
            guard.start()
            if self.closed:
                process.kill()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            guard.cancel()
        return Done(process.returncode, *(place.read_text() for place in places), usage.ru_utime)

    def close(self) -> None:
        self.closed = True
        for process in self.processes:
            if process.returncode is None:
                process.kill()
        self.pool.shutdown(cancel_futures=True)


under_way = pytest.StashKey[Lectures]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """What waits for a lecture comes last."""
    items.sort(key=lambda item: item.name.startswith(TEST))


def pytest_collection_finish(session):
    paths = [item.callspec.params["lecture"] for item in session.items if item.name.startswith(TEST)]
    if paths and not session.config.option.collectonly:
        for path in paths:
            (path.parent / "figures" / f"{path.stem}.png").unlink(missing_ok=True)
        session.config.stash[under_way] = Lectures(paths, session.config._tmp_path_factory.mktemp("lectures"))


def pytest_sessionfinish(session):
    if lectures := session.config.stash.get(under_way, None):
        lectures.close()


@pytest.fixture
def done(request, lecture: Path) -> Done:
    """How the run of a lecture ended."""
    return request.config.stash[under_way].runs[lecture].result()
