"""Would the tests notice? Change one thing at a time in a kernel file and run that file's tests.

    python -m tests.mutate kernels/rmsnorm.py [...]       these files; all of kernels/ without one
    python -m tests.mutate --show kernels/rmsnorm.py      and every mutant that was not caught
    python -m tests.mutate --sample 40                    of each file this many mutants, drawn at random with a seed

A mutant differs from the file in one operator, comparison, constant, index, axis or mask. It is caught if the contract
(a few draws of every path and dtype, finite differences) or tests/kernels/test_<file>.py fails on it, or if it cannot be
run at all; a file without a SPEC is held to those of the ops made of it. One that is not caught but gives the same bits as
the original, forward and backward, on all of forty further draws does not change what the op does (a block size, say) and
does not count. Printed: caught of those that count.

What is not mutated: docstrings, error messages, and the parts of a file that are themselves instruments of the tests:
its SPECs and the functions that are their `pytorch`, `inputs` and `cost`.
"""

import ast
import importlib.util
import os
import random
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # each mutant runs in a fork, which threads do not survive

import numpy as np
import pytest
import torch

import kernels
from kernels.launch import use
from kernels.spec import Spec
from tests.kernels.contract import LAYOUTS, arguments, check, check_finite_differences, check_reference, evaluate, seeded

ROOT = Path(__file__).parents[1]
FOUNDATIONS = ("__init__", "launch", "spec", "compile", "bench")  # what all stand on, or no operation
STEMS = [path.stem for path in sorted((ROOT / "kernels").glob("*.py")) if path.stem not in FOUNDATIONS]
OPERATORS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.Pow: "*",
             ast.MatMult: "*", ast.BitAnd: "|", ast.BitOr: "&", ast.BitXor: "&",
             ast.LShift: ">>", ast.RShift: "<<"}  # fmt: skip
COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}
SECONDS = 180  # of processor time: a mutant that takes more hangs, and is caught


@dataclass(frozen=True)
class Mutant:
    line: int
    before: str
    after: str
    source: str  # the whole file, changed


def specs_of(stem: str) -> dict[str, str]:
    """The SPECs of kernels/<stem>.py: from their names in kernels.SPECS to those in the file."""
    module = sys.modules.get(f"kernels.{stem}")
    places = [(place, value) for place, value in vars(module).items() if isinstance(value, Spec)] if module else []
    return {name: place for name, spec in kernels.SPECS.items() for place, value in places if spec is value}


def imports(stem: str) -> list[str]:
    """The files of kernels/ that kernels/<stem>.py imports."""
    return re.findall(r"^from kernels\.(\w+) import", (ROOT / "kernels" / f"{stem}.py").read_text(), re.MULTILINE)


def users(stem: str) -> list[str]:
    """kernels/<stem>.py and the files that are made of it, each after those it imports."""
    order = TopologicalSorter({name: imports(name) for name in STEMS}).static_order()
    found = [stem]
    for name in order:
        if name in STEMS and name != stem and set(found) & set(imports(name)):
            found.append(name)
    return found


def judged_by(stem: str) -> list[str]:
    """The names of the SPECs that a mutant of the file is held to: its own, or those of its users."""
    return list(specs_of(stem)) or [name for user in users(stem) for name in specs_of(user)]


def instruments(stem: str) -> set[str]:
    """The names in a kernel file that are for its tests."""
    specs = specs_of(stem)
    functions = [f for name in specs for s in [kernels.SPECS[name]] for f in (s.pytorch, s.inputs, s.cost)]
    return {*specs.values(), *(f.__name__ for f in functions)}


def mutants(source: str, leave: set[str]) -> Iterator[Mutant]:
    """Every mutant of a file, from top to bottom, but of the definitions that are to be left."""
    lines = source.splitlines(keepends=True)
    starts = np.cumsum([0, *(len(line.encode()) for line in lines)])
    text = source.encode()

    def at(node: ast.AST) -> tuple[int, int]:
        begin = starts[node.lineno - 1] + node.col_offset
        return begin, starts[node.end_lineno - 1] + node.end_col_offset

    def mutant(node: ast.AST, after: str) -> Mutant:
        begin, end = at(node)
        changed = (text[:begin] + after.encode() + text[end:]).decode()
        return Mutant(node.lineno, text[begin:end].decode(), after, changed)

    for node in walk(ast.parse(source), leave):
        if isinstance(node, ast.BinOp):
            left, right = ast.unparse(node.left), ast.unparse(node.right)
            yield mutant(node, f"(({left}) {OPERATORS[type(node.op)]} ({right}))")
            if isinstance(node.op, ast.BitAnd):  # a mask loses one of its conditions
                yield mutant(node, f"({left})")
                yield mutant(node, f"({right})")
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
            left, right = ast.unparse(node.left), ast.unparse(node.comparators[0])
            yield mutant(node, f"(({left}) {COMPARISONS[type(node.ops[0])]} ({right}))")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
            yield mutant(node, f"({ast.unparse(node.operand)})")
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield mutant(node, repr(node.value + 1 if node.value < 1e30 else -node.value))
        elif isinstance(node, ast.Subscript) and ast.unparse(node.slice) in ("(:, None)", "(None, :)", ":, None", "None, :"):
            other = "None, :" if ast.unparse(node.slice).strip("()").startswith(":") else ":, None"
            yield mutant(node, f"{ast.unparse(node.value)}[{other}]")


def walk(node: ast.AST, leave: set[str]) -> Iterator[ast.AST]:
    """All nodes that may be mutated, in the order of the file."""
    for child in ast.iter_child_nodes(node):
        name = getattr(child, "name", None) or (ast.unparse(child.targets[0]) if isinstance(child, ast.Assign) else None)
        if isinstance(node, ast.Module) and name in leave or isinstance(child, ast.JoinedStr):
            continue
        yield child
        yield from walk(child, leave)


def load(name: str, source: str, folder: str) -> list[Spec]:
    """Put this source in the place of kernels/<name>.py and give the SPECs it is held to. Triton reads it from a file again."""
    judges = judged_by(name)
    for stem in users(name):
        places = specs_of(stem)
        path = ROOT / "kernels" / f"{stem}.py"
        if stem == name:
            path = Path(folder) / f"{name}.py"
            path.write_text(source)
        specification = importlib.util.spec_from_file_location(f"kernels.{stem}", path)
        module = importlib.util.module_from_spec(specification)
        sys.modules[f"kernels.{stem}"] = module
        specification.loader.exec_module(module)
        setattr(kernels, stem, module)
        kernels.SPECS.update({registered: getattr(module, place) for registered, place in places.items()})
    return [kernels.SPECS[judge] for judge in judges]


def contract(spec: Spec) -> None:
    """The contract on a few draws: first those most likely to see a difference."""
    for seed in range(12):
        case = spec.inputs(seeded(seed))
        check(spec, case, spec.dtypes[0], "triton", LAYOUTS[seed % 4])
        check(spec, case, torch.float64, "torch", LAYOUTS[(seed + 1) % 4])
        check_reference(spec, case)
        if spec.gradients and seed < 6:
            check_finite_differences(spec, case)
    for seed, dtype in enumerate(spec.dtypes):
        for path in ("triton", "torch"):
            check(spec, spec.inputs(seeded(50 + seed)), dtype, path)


def bits(spec: Spec) -> list[bytes]:
    """What the op gives, to the last bit, on many draws; an exception counts by its kind."""
    found = []
    for seed in range(1000, 1040):
        call = arguments(spec, spec.inputs(seeded(seed)), torch.float32)
        for path in ("triton", "torch"):
            with use(path):
                try:
                    results, _ = evaluate(spec.op, spec, call)
                    found += [name.encode() + value.numpy().tobytes() for name, value in sorted(results.items())]
                except Exception as error:  # whatever it is, it is what this source does
                    found.append(type(error).__name__.encode())
    return found


def verdict(name: str, mutant: Mutant, original: list[bytes]) -> str:
    """`caught`, `survived` or `same`, found out in a fork that the mutant may crash or hang."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        answer = b"caught"
        try:
            with tempfile.TemporaryDirectory() as folder:
                specs = load(name, mutant.source, folder)
                for spec in specs:
                    contract(spec)
                stems = [name] if specs_of(name) else users(name)
                paths = [ROOT / "tests" / "kernels" / f"test_{stem}{kind}.py" for stem in stems for kind in ("", "_kernel")]
                own = [str(path) for path in paths if path.exists()]
                failed = own and pytest.main(["-x", "-q", "-p", "no:cacheprovider", *own]) != 0
                if not failed:
                    answer = b"same" if [b for spec in specs for b in bits(spec)] == original else b"survived"
        except BaseException:  # any failure is what the tests are for
            pass
        os.write(writing, answer)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer or "caught"  # it died before it could say anything


def main(argv: list[str]) -> int:
    show, sample = "--show" in argv, None
    if "--sample" in argv:
        place = argv.index("--sample")
        sample, argv = argv[place + 1 : place + 2], argv[:place] + argv[place + 2 :]
        if not sample or not sample[0].isdigit():
            print("mutate: --sample takes a number of mutants", file=sys.stderr)
            return 2
    paths = [Path(a) for a in argv if a != "--show"] or [ROOT / "kernels" / f"{stem}.py" for stem in STEMS]
    if unknown := [path for path in paths if path.stem not in STEMS]:
        print(f"mutate: {unknown[0]} is no file that a SPEC is made of; there are {', '.join(STEMS)}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    totals = {"caught": 0, "survived": 0, "same": 0}
    for path in paths:
        source, counts = path.read_text(), dict.fromkeys(totals, 0)
        original = [b for name in judged_by(path.stem) for b in bits(kernels.SPECS[name])]
        if verdict(path.stem, Mutant(0, "", "", source), original) != "same":
            print(f"mutate: {path.name} does not pass its tests as it is, or not in {SECONDS} seconds", file=sys.stderr)
            return 2
        chosen = list(mutants(source, instruments(path.stem)))
        if sample:
            chosen = random.Random(0).sample(chosen, min(int(sample[0]), len(chosen)))
        for mutant in chosen:
            kind = verdict(path.stem, mutant, original)
            counts[kind] += 1
            if show and kind != "caught":
                print(f"  {kind:9}{path.name}:{mutant.line}: {mutant.before!r} -> {mutant.after!r}", flush=True)
        report(path.name, counts)
        totals = {kind: totals[kind] + counts[kind] for kind in totals}
    if len(paths) > 1:
        report("all", totals)
    return 0 if totals["caught"] >= 0.95 * (totals["caught"] + totals["survived"]) else 1


def report(name: str, counts: dict[str, int]) -> None:
    counting = counts["caught"] + counts["survived"]
    share = counts["caught"] / max(1, counting)
    print(f"{name:28}{counts['caught']:5} of {counting:5} caught, {share:6.1%}; {counts['same']} change nothing", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
