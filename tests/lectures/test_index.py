"""The index of papers tells the truth: everything it names exists. And the test can tell: every kind of lie is found."""

import ast
import csv
import hashlib
import io
import re
import runpy
import shlex
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest
import torch

import eval as eval_script
import train as train_script
from models import LanguageModel
from nn.spec import resolve
from optim import OPTIMIZERS, SCHEDULES

ROOT = Path(__file__).parents[2]
COLUMNS = ["slug", "title", "where", "flag", "lecture", "check", "measured", "status"]
STATUSES = ["works", "partly", "not yet"]
SLUGS = "fddbf871c4a9fa65ac1225387c0ff2a12499547e"  # of the 320 slugs in their order: a row that is lost or moved shows


def read(text: str) -> tuple[list[str], list[dict[str, str]]]:
    """The header, and a dict for each row. A cell may hold several entries, joined by "; "."""
    table = list(csv.reader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    return table[0], [dict(zip(COLUMNS, row + [""] * len(COLUMNS), strict=False)) | {"width": len(row)} for row in table[1:]]


def lies(header: list[str], rows: list[dict]) -> list[str]:
    """Everything in the index that is not so, one line each."""
    found = [] if header == COLUMNS else [f"header: {header}"]
    slugs = [row["slug"] for row in rows]
    found += [f"{slug}: stands there twice" for slug in sorted({slug for slug in slugs if slugs.count(slug) > 1})]
    for row in rows:
        found += [f"{row['slug']}: {lie}" for lie in lies_of_row(row)]
    return found


def lies_of_row(row: dict) -> list[str]:
    if row["width"] != len(COLUMNS):
        return [f"has {row['width']} cells"]
    if row["status"] not in STATUSES:
        return [f"status {row['status']!r}"]
    if not row["slug"] or not row["title"]:
        return ["has no slug or no title"]
    claims = {name: row[name] for name in COLUMNS[2:-1]}
    if row["status"] == "not yet":
        return [f"not yet, but {name} is filled in" for name, cell in claims.items() if cell]
    needed = claims if row["status"] == "works" else ["where", "flag"]
    found = [f"{row['status']}, but {name} is empty" for name in needed if not row[name].strip()]
    checks = {"where": missing_symbol, "flag": refused, "lecture": missing_lecture, "check": missing_test}
    for name, check in checks.items():
        found += [lie for entry in row[name].split("; ") if entry and (lie := check(entry))]
    return found


@cache
def definitions(path: Path) -> set[str]:
    """Names that a file defines, also under an `if` or `try`, and Class.name for what stands in a class."""

    def of(body: list[ast.stmt], prefix: str = "") -> set[str]:
        names = set()
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                names |= of(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.If | ast.Try):
                names |= of(node.body, prefix) | of(node.orelse, prefix)
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
        return names

    return of(ast.parse(path.read_text(encoding="utf-8"), str(path)).body)


def exists(path: str) -> bool:
    """Whether a path, as the index spells it, is a file in this house."""
    inside = ROOT / path
    return inside.is_file() and inside.resolve().is_relative_to(ROOT)


def missing_symbol(entry: str) -> str:
    path, colon, symbol = entry.partition(":")
    if not exists(path) or path.startswith("tests/"):
        return f"where: no file {path!r} outside the tests"
    if not colon or symbol not in definitions(ROOT / path):
        return f"where: {path} does not define {symbol!r}"
    return ""


def missing_lecture(entry: str) -> str:
    named = re.fullmatch(r"lectures/[0-9]{2}_\w+\.py", entry)
    return "" if named and exists(entry) else f"lecture: there is no {entry!r}"


def missing_test(entry: str) -> str:
    path, *names = entry.partition("[")[0].split("::")
    if not (exists(path) and re.fullmatch(r"tests/(.+/)?test_\w+\.py", path)):
        return f"check: no test file {path!r}"
    name = ".".join(names)
    if not names or not names[-1].startswith("test") or name not in definitions(ROOT / path):
        return f"check: {path} has no test {'::'.join(names)!r}"
    return ""


def refused(command: str) -> str:
    """Why a command line would not run, or nothing. Nothing is trained: it is read by the parser that would read it."""
    words = shlex.split(command)
    if words[:1] != ["python"] or len(words) < 2:
        return f"flag: {command!r} is no command that begins with python"
    try:
        if words[1] == "train.py":
            try_train(words[2:])
        elif words[1] == "eval.py":
            eval_script.parse(words[2:])
        elif words[1] == "-m" and len(words) > 2:
            return try_module(words[2], words[3:])
        elif not (missing_lecture(words[1]) == "" and len(words) == 2):
            return f"flag: {command!r} is neither train.py, nor eval.py, nor a module, nor a lecture"
    except (SystemExit, ValueError) as error:
        return f"flag: {command!r} is refused: {error}"
    return ""


def try_train(argv: list[str]) -> None:
    """Read a command line with train.py's own parser, and build on the meta device what it names."""
    configs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_script, "train", lambda config, resumed: configs.append(config) or 0)
        if train_script.main(argv):
            raise ValueError("train.py says why on stderr")
    if configs:
        config = configs[0]
        resolve(config.optimizer, OPTIMIZERS, "optimizer")
        resolve(config.rest_optimizer, OPTIMIZERS, "optimizer")
        schedule, options = resolve(config.schedule, SCHEDULES, "schedule")
        schedule(0.5, **options)
        with torch.device("meta"):
            LanguageModel(config)


@cache
def help_of(module: str) -> str | None:
    """What `python -m module --help` prints; None where there is no such module in this house or it knows no --help."""
    path = module.replace(".", "/") + ".py"
    if not exists(path):
        return None
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", [module, "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / path), run_name="__main__")  # in this process: a new one would import PyTorch anew
    return printed.getvalue() if not end.value.code else None


def try_module(module: str, argv: list[str]) -> str:
    if (text := help_of(module)) is None:
        return f"flag: there is no module {module!r} to run"
    known = set(re.findall(r"--[a-z][a-z-]*", text))
    unknown = [word for word in argv if word.startswith("--") and word.partition("=")[0] not in known]
    return f"flag: python -m {module} knows no {unknown[0]}" if unknown else ""


def test_every_claim_of_the_index_is_so():
    header, rows = read((ROOT / "lectures/papers.tsv").read_text(encoding="utf-8"))
    assert lies(header, rows) == []


def test_the_index_has_all_papers_in_their_order():
    _, rows = read((ROOT / "lectures/papers.tsv").read_text(encoding="utf-8"))
    assert len({row["slug"] for row in rows}) == len(rows) == 320
    assert hashlib.sha1("\n".join(row["slug"] for row in rows).encode()).hexdigest() == SLUGS


TRUE = dict(
    slug="layernorm",
    title="Layer Normalization",
    where="nn/norm/layernorm.py:LayerNorm; nn/norm/layernorm.py:LayerNorm.forward",
    flag="python train.py --norm layernorm:eps=1e-6 --schedule wsd:decay=0.3; python eval.py bpb --tokens 100",
    lecture="lectures/01_from_bigrams_to_a_transformer.py",
    check="tests/lectures/test_index.py::test_the_index_has_all_papers_in_their_order",
    measured="a figure here (the paper's figure)",
    status="works",
)
EMPTY = dict.fromkeys(COLUMNS[2:-1], "")

LIES = [
    (dict(status="done"), "status 'done'"),
    (dict(title=""), "has no slug or no title"),
    (dict(status="not yet"), "not yet, but where is filled in"),
    *((EMPTY | {"status": "works"}, f"works, but {name} is empty") for name in EMPTY),
    (dict(where=" "), "works, but where is empty"),
    (dict(status="partly", where=""), "partly, but where is empty"),
    (dict(status="partly", flag=""), "partly, but flag is empty"),
    (dict(where="nn/norm/layernrm.py:LayerNorm"), "no file 'nn/norm/layernrm.py'"),
    (dict(where="tests/lectures/test_index.py:lies"), "no file 'tests/lectures/test_index.py' outside the tests"),
    (dict(where="../LayerNorm.py:LayerNorm"), "no file '../LayerNorm.py'"),
    (dict(where="nn/norm:LayerNorm"), "no file 'nn/norm'"),
    (dict(where="nn/norm/layernorm.py"), "does not define ''"),
    (dict(where="nn/norm/layernorm.py:RMSNorm"), "does not define 'RMSNorm'"),
    (dict(where="nn/norm/layernorm.py:Tensor"), "does not define 'Tensor'"),  # imported there, defined elsewhere
    (dict(where="nn/norm/layernorm.py:LayerNorm.backward"), "does not define 'LayerNorm.backward'"),
    (dict(where=TRUE["where"] + "; nn/norm/layernorm.py:Layer"), "does not define 'Layer'"),
    (dict(flag="--norm layernorm"), "is no command that begins with python"),
    (dict(flag="python train.py --nrom layernorm"), "is refused"),
    (dict(flag="python train.py --norm layernrm"), "is refused"),
    (dict(flag="python train.py --norm layernorm:gian=true"), "is refused"),
    (dict(flag="python train.py --mixer gqa:kv_heads=5 --heads 4"), "is refused"),
    (dict(flag="python train.py --optimizer muno"), "is refused"),
    (dict(flag="python train.py --schedule wsd:decay=3"), "is refused"),
    (dict(flag="python train.py --model gpt9"), "is refused"),
    (dict(flag="python train.py --steps many"), "is refused"),
    (dict(flag="python eval.py bbp"), "is refused"),
    (dict(flag="python eval.py bpb --temperature 1"), "is refused"),
    (dict(flag="python -m models.describ --model gpt2"), "no module 'models.describ'"),
    (dict(flag="python -m json.tool"), "no module 'json.tool'"),
    (dict(flag="python -m models.describe --modle gpt2"), "knows no --modle"),
    (dict(flag="python setup.py"), "is neither"),
    (dict(flag=TRUE["flag"] + "; python train.py --nrom x"), "is refused"),
    (dict(lecture="lectures/99_absent.py"), "there is no 'lectures/99_absent.py'"),
    (dict(lecture="lectures/lectern.py"), "there is no 'lectures/lectern.py'"),
    (dict(check="tests/nn/test_nrms.py::test_formula"), "no test file 'tests/nn/test_nrms.py'"),
    (dict(check="nn/norm/layernorm.py::test_formula"), "no test file 'nn/norm/layernorm.py'"),
    (dict(check="tests/lectures/test_index.py"), "has no test ''"),
    (dict(check="tests/lectures/test_index.py::test_all"), "has no test 'test_all'"),
    (dict(check="tests/lectures/test_index.py::lies"), "has no test 'lies'"),
]


def line(row: dict) -> str:
    return "\t".join(row[name] for name in COLUMNS)


def table(*lines: str) -> str:
    return "\n".join(["\t".join(COLUMNS), *lines]) + "\n"


def test_a_true_row_is_believed():
    described = TRUE | {"flag": "python -m models.describe --model gpt2", "check": TRUE["check"] + "[case]"}
    nothing = TRUE | EMPTY | {"slug": "later", "status": "not yet"}
    assert lies(*read(table(line(TRUE), line(described | {"slug": "again"}), line(nothing)))) == []


@pytest.mark.parametrize("change, lie", LIES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_kind_of_lie_is_found(change, lie, capsys):
    found = lies(*read(table(line(TRUE | change))))
    assert any(lie in one for one in found), found


def test_a_broken_table_is_found():
    assert lies(*read(line(TRUE)))[0].startswith("header")
    assert lies(*read(table(line(TRUE), line(TRUE)))) == ["layernorm: stands there twice"]
    assert lies(*read(table(line(TRUE) + "\tmore"))) == ["layernorm: has 9 cells"]
    assert lies(*read(table("layernorm\tLayer Normalization"))) == ["layernorm: has 2 cells"]
