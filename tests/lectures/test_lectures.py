"""Every lecture runs from its first line to its last, and asserts what it claims on the way; its form is the house's."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LECTURES = sorted((ROOT / "lectures").glob("[0-9][0-9]_*.py"))
each = pytest.mark.parametrize("lecture", LECTURES, ids=lambda path: path.stem)


@each
def test_a_lecture_runs_and_leaves_a_figure(lecture, done):
    assert done.status == 0, done.complaint[-3000:]
    assert len(done.printed.splitlines()) > 10  # its tables
    assert (ROOT / "lectures" / "figures" / f"{lecture.stem}.png").read_bytes().startswith(b"\x89PNG")
    assert done.worked < 2 * 60, done.worked  # seconds of work: under a minute on two cores


@each
def test_a_lecture_imports_the_lectern_first(lecture):
    """It finds the house, and tells threads how to wait, which torch reads as it is loaded."""
    imported = re.findall(r"^(?:import|from) (\w+)", lecture.read_text(encoding="utf-8"), re.MULTILINE)
    later = {"torch", "triton", "data", "kernels", "models", "nn", "optim", "train"}
    assert next(name for name in imported if name == "lectern" or name in later) == "lectern"


@each
def test_a_lecture_is_text_code_and_assertions(lecture):
    text = lecture.read_text(encoding="utf-8")
    assert text.startswith("# %% [markdown]\n# # ")
    cells = re.split(r"^# %%", text, flags=re.MULTILINE)[1:]
    for cell in cells:
        kind, _, body = cell.partition("\n")
        assert kind in ("", " [markdown]")
        if kind:
            assert all(line.startswith("#") for line in body.strip().splitlines()), body  # prose is comments alone
    prose = [cell for cell in cells if cell.startswith(" [markdown]")]
    assert len(prose) > len(cells) / 3
    assert text.count("\nassert ") + text.count(" assert ") > 10


def test_lectures_are_numbered_from_one():
    assert [int(path.name[:2]) for path in LECTURES] == list(range(1, len(LECTURES) + 1))


def test_the_list_shows_each_title_and_the_papers_it_covers():
    shown = subprocess.run([sys.executable, "-m", "lectures"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for lecture in LECTURES:
        title = lecture.read_text(encoding="utf-8").splitlines()[1].removeprefix("# # ")
        assert f"lectures/{lecture.name}\n    {title}\n" in shown
    rows = [line.split("\t") for line in (ROOT / "lectures/papers.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    covered = [(row[1], row[4]) for row in rows if row[4]]
    assert covered
    for title, lectures in covered:
        assert shown.count(f"- {title} (") == len(lectures.split("; "))
    assert f"{len(rows)} papers in the index" in shown
