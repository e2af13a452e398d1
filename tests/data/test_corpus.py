"""What a spec names, what is read from it, and which documents are kept for validation."""

import gzip
import hashlib
import json
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import Document, documents, is_validation, python_library, training_documents, validation_documents
from data.sources import NOT_LIBRARY, resolve


def names(spec):
    return [document.name for document in documents(str(spec))]


# --- the default corpus ------------------------------------------------------------------------------------------


def test_python_library():
    library = list(python_library())
    listed = [document.name for document in library]
    assert listed == sorted(set(listed)) and "json/decoder.py" in listed and "this.py" in listed
    assert not [name for name in listed if NOT_LIBRARY & set(Path(name).parts[:-1]) or not name.endswith(".py")]
    root = Path(sysconfig.get_paths()["stdlib"])
    assert all((root / name).is_file() for name in listed)
    here = next(document for document in library if document.name == "json/decoder.py")
    assert here.text.encode() == (root / here.name).read_bytes()
    assert 8e6 < sum(len(document.text.encode()) for document in library) < 14e6


def test_python_library_passes_over_what_is_no_library(tmp_path, monkeypatch):
    for name in ["a.py", "test/b.py", "pkg/tests/c.py", "site-packages/d.py", "pkg/test_e.py", "f.txt", "test.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert names("python") == ["a.py", "pkg/test_e.py", "test.py"]
    (tmp_path / "a.py").write_bytes("# coding: latin-1\né".encode("latin-1"))
    assert next(python_library()).text.endswith("é")
    (tmp_path / "a.py").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="data a.py: not UTF-8 text"):
        names("python")


def test_python_library_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib.zip")})
    with pytest.raises(ValueError, match="data python: this interpreter has no .py files"):
        names("python")


def test_default_split_is_the_published_one():
    """The MD5 rule, worked out here by other means, on names whose side must never change."""
    for name in ["json/decoder.py", "os.py", "asyncio/base_events.py", "é", ""]:
        last_digit = str(int.from_bytes(hashlib.md5(name.encode()).digest(), "big"))[-1]
        assert is_validation(name) == (last_digit == "0")
    training, validation = list(training_documents("python")), list(validation_documents("python"))
    assert sorted(training + validation) == list(python_library())
    assert all(is_validation(document.name) for document in validation) and 20 < len(validation) < 80


# --- specs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    for name, content in {
        "b.txt": b"bee\n", "a.md": "\ufeffäh\r\n".encode(), "sub/c.unknown": b"sea", "sub/empty": b"",
        "sub/d.png": b"\x89PNG\xff\x00", "nul.txt": b"a\0b", "x.bin": b"\xff\xff", ".hidden": b"no",
        ".git/config": b"no", "sub/__pycache__/e.pyc": b"no",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_folder_is_read_whole_but_for_binary_files(tree):
    with pytest.warns(UserWarning, match="skipped 3 files that are no text, as nul.txt"):
        found = list(documents(str(tree)))
    # An empty file is a file with no line: there is no document in it.
    assert found == [("a.md", "äh\r\n"), ("b.txt", "bee\n"), ("sub/c.unknown", "sea")]


def test_files_globs_and_lists(tree):
    assert names(tree / "b.txt") == ["b.txt"]
    assert names(f"{tree}/sub/c*, {tree}/b.txt") == ["c.unknown", "b.txt"]
    assert names(f"{tree}/**/*.unknown") == ["sub/c.unknown"]
    odd = tree / "one,two#three.txt"
    odd.write_text("odd")
    assert list(documents(str(odd))) == [Document("one,two#three.txt", "odd")]
    assert len(names(f"python,{tree}/b.txt")) == len(names("python")) + 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "an empty entry in ''"),
        ("{}/b.txt,,{}/b.txt", "an empty entry"),
        ("{}/absent.txt", "absent.txt is no file"),
        ("{}/*.absent", "absent is no file"),
        ("{}/empty_folder", "empty_folder is no file"),
        ("{}/b.txt#field", r"b.txt#field: .jsonl takes #field"),
        ("{}/x.bin#int8", r"x.bin#int8: .* .bin takes #uint16 or #uint32"),
        ("{}/sub/d.png", r"data d.png: not UTF-8 text \(invalid start byte"),
        ("{}/nul.txt", r"data nul.txt: not UTF-8 text \(it holds a NUL"),
        ("{}/sub/empty", "empty: no text in it"),
        ("{}/b.txt,{}/x.bin", "data x.bin: a token file where text is needed"),
    ],
)
def test_bad_specs(tree, spec, message):
    (tree / "empty_folder").mkdir()
    with pytest.raises(ValueError, match=message) as caught:
        names(spec.replace("{}", str(tree)))
    assert "\n" not in str(caught.value)


@given(st.text(st.characters(exclude_characters=":"), max_size=300))  # with no colon there is no URL
@settings(max_examples=100, deadline=None)
def test_any_spec_resolves_or_is_a_value_error(spec):
    try:
        resolve("/nowhere/" + spec)
    except ValueError:
        pass


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["posts.jsonl", "posts.jsonl.gz"])
def test_jsonl(tmp_path, name):
    rows = [{"text": "one\n", "body": "1"}, {"text": "zwö", "body": "2"}]
    lines = "\n\n".join(map(json.dumps, rows)).encode()
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    assert list(documents(f"{tmp_path}/{name}")) == [(f"{name}:1", "one\n"), (f"{name}:3", "zwö")]
    assert [text for _, text in documents(f"{tmp_path}/{name}#body")] == ["1", "2"]
    assert [text for _, text in documents(f"{tmp_path}#body")] == ["1", "2"]


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"other": "x"}', '{"text": 5}', '{"text": "\\ud800"}', "[" * 5000, '"text"', "\udcff"]
)
def test_bad_jsonl_line_is_named(tmp_path, line):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(ValueError, match=r"^data p.jsonl:2: not a JSON object with text in 'text'$"):
        names(file)
    with pytest.raises(ValueError, match="p.jsonl:2"):  # in a folder as well: it is broken text, not a binary file
        names(tmp_path)


def test_truncated_gzip_is_named(tmp_path):
    whole = gzip.compress(b"some text\n" * 1000)
    (tmp_path / "t.txt.gz").write_bytes(whole)
    assert [text for _, text in documents(f"{tmp_path}/t.txt.gz")] == ["some text\n" * 1000]
    for broken in (whole[:-12], b"no gzip", whole[:20] + b"\0\0\0\0" + whole[24:]):
        (tmp_path / "t.txt.gz").write_bytes(broken)
        with pytest.raises(ValueError, match="data t.txt.gz: not a whole .gz file"):
            names(tmp_path / "t.txt.gz")


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_large_files_come_in_pieces(tmp_path_factory, text, piece):
    text = text.removeprefix("\ufeff") or "x"
    file = tmp_path_factory.getbasetemp() / "large.txt"
    file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.corpus.PIECE", piece)
        parts = list(documents(str(file)))
    assert "".join(part.text for part in parts) == text
    numbered = [f"large.txt#{n + 1}" for n in range(len(parts))]
    assert [part.name for part in parts] == (numbered if len(parts) > 1 else ["large.txt"])


# --- split -------------------------------------------------------------------------------------------------------


def both_sides(spec):
    return list(training_documents(str(spec))), list(validation_documents(str(spec)))


def test_a_single_document_gives_its_last_tenth(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(f"line number {n:03}\n" for n in range(999)))
    (training,), (validation,) = both_sides(file)
    assert training.text + validation.text == file.read_text()
    assert training.text.endswith("line number 898\n") and validation.text.startswith("line number 899\n")
    file.write_text("a single line of text, which has to be cut inside")
    assert [side[0].text for side in both_sides(file)] == ["a single line of text, which has to be cut i", "nside"]


@given(st.lists(st.text("ab\n", max_size=30), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_few_documents_leave_neither_side_empty(tmp_path_factory, texts):
    file = tmp_path_factory.getbasetemp() / "few.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert not any(is_validation(f"few.jsonl:{n}") for n in range(1, 5))  # so the rule alone would leave one empty
    if len("".join(texts)) < 2:
        with pytest.raises(ValueError, match="too little text to keep a tenth"):
            both_sides(file)
        return
    training, validation = ("".join(d.text for d in side) for side in both_sides(file))
    assert training + validation == "".join(texts)
    assert training and validation


def test_the_rule_decides_where_it_can(tmp_path):
    for n in range(100):
        (tmp_path / f"{n}.txt").write_text(f"text {n}")
    training, validation = both_sides(tmp_path)
    assert {d.name for d in validation} == {f"{n}.txt" for n in range(100) if is_validation(f"{n}.txt")}
    assert len(training) + len(validation) == 100


def test_a_second_spec_is_the_validation_set(tmp_path):
    (tmp_path / "t.txt").write_text("train")
    (tmp_path / "v.txt").write_text("validate")
    specs = f"{tmp_path}/t.txt", f"{tmp_path}/v.txt"
    assert list(training_documents(*specs)) == [("t.txt", "train")]
    assert list(validation_documents(*specs)) == [("v.txt", "validate")]
