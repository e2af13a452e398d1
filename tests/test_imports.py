"""Imports run one way only, as the table of rooms says; and Triton is never needed to import anything."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "kernels": set(),
    "data": set(),
    "nn": {"kernels"},
    "models": {"nn", "kernels"},
    "optim": {"kernels"},
    "train": {"kernels", "data", "nn", "models", "optim"},
    "eval": {"kernels", "data", "nn", "models", "optim"},
    "lectures": {"kernels", "data", "nn", "models", "optim", "train", "eval"},
}
SOURCES = [
    path
    for room in ROOMS
    for path in ([ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).rglob("*.py")))
]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES]
PACKAGES = [module for module in MODULES if module.partition(".")[0] not in ("lectures", "train", "eval")]
OPTIONAL = {"triton"}  # what may be missing at run time
WITH_OTHERS = {"regex", "requests", "urllib3", "filelock"}  # what tiktoken and torch require and so bring along


def imported(path: Path) -> set[str]:
    """The top-level names that a file imports anywhere in it, also inside functions; relative imports are of its own room."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            names |= {
                arg.value.partition(".")[0] for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            }
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_direction(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    forbidden = {*ROOMS, "tests"} - ROOMS[room] - ({room} if (ROOT / room).is_dir() else set())
    assert not imported(path) & forbidden


def test_the_rooms_are_all_there_is():
    """Every folder and every script at the top level has its line in the table."""
    packages = {path.parent.name for path in ROOT.glob("*/*.py")} | {path.stem for path in ROOT.glob("*.py")}
    assert packages <= {*ROOMS, "tests"}


def test_every_package_says_what_it_is():
    for path in SOURCES:
        if path.name == "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def requirements() -> set[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return {
        line.split(";")[0].split("=")[0].split("<")[0].split(">")[0].strip()
        for line in lines
        if line.strip() and line[0] != "#"
    }


def test_nothing_else_is_required():
    """What the rooms import is the standard library or a line of requirements.txt."""
    allowed = requirements() | WITH_OTHERS | set(sys.stdlib_module_names) | {*ROOMS}
    for path in SOURCES:
        beside = {other.stem for other in path.parent.glob("*.py")} if path.parent.name == "lectures" else set()
        assert not imported(path) - allowed - beside, path


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
import importlib
for module in {modules}:
    importlib.import_module(module)
assert not any(name.partition(".")[0] in {blocked} for name in sys.modules)
"""


def run(script: str) -> None:
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr


def test_everything_imports_without_triton():
    run(BLOCKED.format(blocked=OPTIONAL, modules=[*PACKAGES, "train", "eval"]))


def test_importing_the_rooms_draws_nothing():
    """Matplotlib is slow to import: only what draws asks for it. Tests and entry scripts are never pulled in."""
    run(BLOCKED.format(blocked={"matplotlib", "pytest", "hypothesis", "train", "eval", "tests", "lectures"}, modules=PACKAGES))
