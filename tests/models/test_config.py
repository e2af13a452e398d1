"""The configuration: it makes the command line, survives as JSON, and says in one line what is wrong with it."""

import dataclasses
import json
import subprocess
import sys
from typing import get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import PRESETS, Config
from models.config import LEAST, Parser, add_flags
from models.describe import main

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
HINTS = get_type_hints(Config)


def values_of(name: str) -> st.SearchStrategy:
    """Allowed values of a field."""
    if name == "model":
        return st.sampled_from([*PRESETS])
    if choices := FIELDS[name].metadata["choices"]:
        return st.sampled_from(choices)
    least = LEAST.get(name)
    kinds = {
        bool: st.booleans(),
        str: st.text(max_size=8),
        int: st.integers(least if least is not None else -(10**9), 10**9),
        float: st.floats(least or 0, 1e9) | st.integers(1, 9),
    }
    return kinds[HINTS[name]]


GIVEN = st.fixed_dictionaries({}, optional={name: values_of(name) for name in FIELDS})


def complaint(call, *args, **options) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert type(caught.value) is ValueError and len(message.splitlines()) == 1
    return message


def parsed(*argv: str) -> dict:
    parser = Parser(prog="test")
    add_flags(parser)
    return vars(parser.parse_args(argv))


@given(GIVEN)
@settings(max_examples=100, deadline=None)
def test_json_and_back(given):
    config = Config.of(**given)
    assert all(getattr(config, name) == value for name, value in given.items())
    again = Config.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config and again.to_json() == config.to_json()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_set_the_model_and_flags_overrule_them(preset):
    config = Config.of(model=preset)
    assert all(getattr(config, name) == value for name, value in PRESETS[preset].items())
    assert Config.of(model=preset, dim=640) == dataclasses.replace(config, dim=640)
    sections = {FIELDS[name].metadata["section"] for name in PRESETS[preset]}
    assert sections == {"model"} and config.model == preset


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda v: st.lists(v, max_size=2),
    max_leaves=3,
)


@given(st.dictionaries(st.sampled_from([*FIELDS, "unheard", ""]), JSON, max_size=3))
@settings(max_examples=200, deadline=None)
def test_any_json(values):
    """Whatever a config.json holds: a configuration, or one line."""
    try:
        config = Config.from_json({**Config.of().to_json(), **values})
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert {name: getattr(config, name) for name in values} == values


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (dict(model="gtp2"), ["model: no preset 'gtp2'", "did you mean 'gpt2'?", "llama-8b"]),
        (dict(dim=0), ["dim: 0 is too small; at least 1"]), (dict(minutes=-1.0), ["minutes: -1.0 is too small"]),
        (dict(minutes=float("nan")), ["minutes: nan"]), (dict(depth="4"), ["depth: '4' is not of type int"]),
        (dict(depth=True), ["depth: True is not of type int"]), (dict(tie=1), ["tie: 1 is not of type bool"]),
        (dict(clip="1"), ["clip: '1' is not of type float"]), (dict(dim=2.0), ["dim: 2.0 is not of type int"]),
        (dict(model=None), ["model: None is not of type str"]),
        (dict(embedding_norm="last"), ["embedding_norm: 'last' is not one of none, extra, first"]),
        (dict(norm_place="mid"), ["norm_place: 'mid' is not one of pre, scaled"]),
        (dict(init="zeros"), ["init: 'zeros' is not one of fan_in, gpt2"]),
        (dict(dtype="int8"), ["dtype: 'int8' is not one of auto"]),
    ],
)  # fmt: skip
def test_bad_values(given, parts):
    for message in (complaint(Config.of, **given), complaint(Config.from_json, {**Config.of().to_json(), **given})):
        for part in parts:
            assert part in message


def test_unknown_field():
    message = complaint(Config.from_json, {**Config.of().to_json(), "batchsize": 3})
    assert "no field 'batchsize'" in message and "did you mean 'batch_size'?" in message


# The command line


def test_every_field_has_a_flag():
    """Each value given on the command line arrives in its type, and what is not given leaves no trace."""
    assert parsed() == {}
    examples = {int: ("7", 7), float: ("0.5", 0.5), str: ("some words", "some words")}
    for name, kind in HINTS.items():
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            assert parsed(flag) == {name: True} and parsed("--no-" + flag[2:]) == {name: False}
            continue
        choices = FIELDS[name].metadata["choices"]
        text, value = (choices[-1], choices[-1]) if choices else examples[kind]
        assert parsed(flag, text) == parsed(f"{flag}={text}") == {name: value}


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        parsed("--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0 and max(map(len, text.splitlines())) <= 118
    for name, field in FIELDS.items():
        assert "--" + name.replace("_", "-") in text and field.metadata["help"][:20].split("\n")[0] in " ".join(text.split())
    for section in ("data:", "model:", "training:", "machine:", "output:"):
        assert section in text


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--dpeth", "3"], "unrecognized arguments: --dpeth 3 (did you mean '--depth'?)"), (["--dep", "3"], "--dep"),
        (["--depth"], "--depth"),
        (["--depth", "three"], "invalid int value: 'three'"), (["--norm-place", "mid"], "invalid choice: 'mid'"),
        (["stray"], "stray"),
        (["--clip", "much"], "invalid float value: 'much'"), ([" "], "unrecognized"), ([""], "unrecognized"),
        (["--=3"], "--=3"),
    ],
)  # fmt: skip
def test_bad_flags(argv, part, capsys):
    with pytest.raises(SystemExit) as caught:
        parsed(*argv)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and len(err.splitlines()) == 1 and part in err


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(["--depth", "--tie", "--dim=3", "4"]),
        max_size=3,
    )
)
@settings(max_examples=150, deadline=None)
def test_any_command_line(argv):
    try:
        found = parsed(*(arg for arg in argv if arg not in ("-h", "--help")))
    except SystemExit as stopped:
        assert stopped.code == 2
    else:
        assert found.keys() <= FIELDS.keys()


@pytest.mark.parametrize(
    "argv", [["--mixer", "gpa"], ["--dim", "-3"], ["--position", "learned:seq_len=0"], ["--stack", "(gqa"]]
)
def test_a_model_that_cannot_be(argv, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1


def test_the_script_ends_with_one_line_and_status_2():
    ended = subprocess.run([sys.executable, "-m", "models.describe", "--unheard"], capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == "" and len(ended.stderr.splitlines()) == 1
