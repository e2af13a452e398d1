"""Checkpoints exist whole or not at all: whoever dies while writing, and whatever happens to the files afterwards."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import Config, build_model, checkpoint
from models.checkpoint import (
    MANIFEST,
    checkpoints,
    find,
    load_weights,
    model_tensors,
    read_json,
    read_tensors,
    save,
    verify,
    write_json,
)
from models.weights import load_model, read_config, save_model

CONTENT = {"a.txt": b"alpha", "empty": b"", "folder/b.bin": bytes(range(256)) * 40}
TINY = dict(vocab_size=31, dim=16, heads=2, depth=1, seq_len=12)


def write(folder: Path) -> None:
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def saved(run: Path, *steps: int, keep: int = 10) -> list[str]:
    for step in steps:
        save(run, step, write, keep=keep)
    return [folder.name for folder in checkpoints(run)]


def complaint(call, *args) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_save_and_verify(tmp_path):
    folder = save(tmp_path / "new" / "run", 7, write, keep=1)
    assert folder == tmp_path / "new" / "run" / "step-000007" == find(tmp_path / "new" / "run")
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {*CONTENT, MANIFEST}
    assert all((folder / name).read_bytes() == content for name, content in CONTENT.items())
    assert read_json(folder / MANIFEST).keys() == CONTENT.keys()
    verify(folder)


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_last_ones_are_kept(keep, tmp_path):
    steps = [1, 5, 900, 1000, 999_999, 1_000_000]
    assert saved(tmp_path, *steps, keep=keep) == [f"step-{step:06d}" for step in steps][-keep:]
    assert len([*tmp_path.iterdir()]) == min(keep, len(steps))


def test_the_same_step_again(tmp_path):
    saved(tmp_path, 3, 4)
    save(tmp_path, 4, lambda folder: (folder / "other").write_text("new"), keep=2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000003", "step-000004"]
    assert [path.name for path in sorted((tmp_path / "step-000004").iterdir())] == [MANIFEST, "other"]
    assert len([*tmp_path.iterdir()]) == 2


def test_a_writer_that_raises_leaves_nothing(tmp_path):
    def broken(folder: Path) -> None:
        write(folder)
        raise OSError("no space left on device")

    saved(tmp_path, 1)
    for step in (1, 2):
        with pytest.raises(OSError, match="no space"):
            save(tmp_path, step, broken, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    verify(tmp_path / "step-000001")


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    saved(tmp_path, 1)
    write_json(tmp_path / "keep.json", 1)
    (tmp_path / ".step-000002").mkdir()
    (tmp_path / ".step-000002" / "half").write_bytes(b"x")
    assert saved(tmp_path, 2) == ["step-000001", "step-000002"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")] and (tmp_path / "keep.json").exists()


def test_find(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        assert "there is none in" in complaint(find, place)
    saved(tmp_path / "one", 9)
    saved(tmp_path / "two", 3, 20)
    os.utime(tmp_path / "one" / "step-000009", (1, 1))
    assert find(tmp_path).name == find(tmp_path / "two").name == "step-000020"
    os.utime(tmp_path / "two" / "step-000020", (0, 0))
    assert find(tmp_path) == tmp_path / "one" / "step-000009"
    (tmp_path / "two" / "step-000099").mkdir()  # no manifest: whoever made it, it is none of ours
    assert find(tmp_path / "two").name == "step-000020"
    published = tmp_path / "published"
    published.mkdir()
    write_json(published / "config.json", dict(model_type="gpt2"))
    assert find(published) == published


def test_damage_is_named(tmp_path):
    good = save(tmp_path / "run", 1, write, keep=1)
    cases = {
        "a.txt has 4 bytes, not 5": lambda f: (f / "a.txt").write_bytes(b"alph"),
        "a.txt was altered": lambda f: (f / "a.txt").write_bytes(b"Alpha"),
        "empty is missing": lambda f: (f / "empty").unlink(),
        "folder/b.bin has 0 bytes, not 10240": lambda f: (f / "folder/b.bin").write_bytes(b""),
        "folder/b.bin is missing": lambda f: shutil.rmtree(f / "folder"),
        "manifest.json' is not JSON": lambda f: (f / MANIFEST).write_bytes((f / MANIFEST).read_bytes()[:-9]),
    }
    for number, (message, damage) in enumerate(cases.items()):
        run = tmp_path / str(number)
        shutil.copytree(good, run / good.name)
        damage(run / good.name)
        assert message in complaint(verify, run / good.name) and message in complaint(find, run)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    model = build_model(Config.of(**TINY))
    return save(tmp_path_factory.mktemp("pristine"), 1, lambda folder: save_model(model, folder), keep=1)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_byte_altered_and_any_file_cut(pristine, data):
    name = data.draw(st.sampled_from([path.name for path in sorted(pristine.iterdir())]))
    good = (pristine / name).read_bytes()
    where = data.draw(st.integers(0, len(good) - 1))
    bad = (
        good[:where] if data.draw(st.booleans()) else good[:where] + bytes([data.draw(st.integers(0, 255))]) + good[where + 1 :]
    )
    if bad == good or name == MANIFEST and same_json(bad, good):
        return
    try:
        (pristine / name).write_bytes(bad)
        complaint(verify, pristine)
    finally:
        (pristine / name).write_bytes(good)
    verify(pristine)


def same_json(a: bytes, b: bytes) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def save_for_ever(run: Path, step: int, keep: int) -> None:
    def write(folder: Path) -> None:
        (folder / "sub").mkdir()
        for i in range(6):
            (folder / "sub" / f"{i}.bin").write_bytes(bytes([step % 256]) * 3000)

    while True:
        for _ in range(2):  # the same step again, too
            save(run, step, write, keep=keep)
        step += 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("keep", [1, 2])
def test_killed_at_any_moment(keep, tmp_path, monkeypatch):
    """SIGKILL while checkpoints are written, replaced and removed: those that are there are whole, and one is always there."""
    monkeypatch.setattr(checkpoint, "flush", lambda path: None)  # it guards against power cuts, and takes most of the time
    chance, newest = random.Random(keep), 0
    saved(tmp_path, newest)
    for _ in range(25):
        child = os.fork()
        if child == 0:
            try:
                save_for_ever(tmp_path, newest, keep)
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])  # it was still saving
        there = checkpoints(tmp_path)
        assert 1 <= len(there) <= keep + 2
        for folder in there:
            verify(folder)
        step = int(find(tmp_path).name.removeprefix("step-"))
        assert step >= newest
        newest = step
    assert newest > 0
    saved(tmp_path, newest + 1, keep=keep)
    assert len([*tmp_path.iterdir()]) == keep


# Weights by name


@pytest.mark.parametrize("tie", [True, False])
def test_weights_missing_left_over_or_misshapen(tie, tmp_path):
    model = build_model(Config.of(**TINY, tie=tie))
    tensors = model_tensors(model)
    assert ("head.weight" in tensors) != tie
    for name, tensor in tensors.items():
        rest = {key: value for key, value in tensors.items() if key != name}
        assert complaint(load_weights, model, rest, "here") == f"here: the tensor {name!r} is missing"
        wrong = {**rest, name: torch.zeros(*tensor.shape, 1)}
        assert f"here: the tensor {name!r} has the shape " in complaint(load_weights, model, wrong, "here")
    extra = {**tensors, "stray": torch.zeros(1)}
    assert complaint(load_weights, model, extra, "here") == "here: the tensor 'stray' is not part of this model"


def test_folders_that_are_no_models(tmp_path):
    assert "there is no folder" in complaint(read_config, tmp_path / "nowhere")
    assert "config.json' cannot be read" in complaint(read_config, tmp_path)
    for text in ("[]", "3", "null", '"x"', "{}", '{"format": "other"}'):
        (tmp_path / "config.json").write_text(text)
        assert "neither of a checkpoint of ours nor of a published model" in complaint(load_model, tmp_path)
    for text in ("", "{", "\x00", '{"format": "rosetta", "dim": 1e999}', '{"format": "rosetta", "model": "unheard"}'):
        (tmp_path / "config.json").write_text(text)
        complaint(load_model, tmp_path)


def test_tensors_that_are_none(tmp_path):
    assert "x.safetensors' is not a readable safetensors file" in complaint(read_tensors, tmp_path / "x.safetensors")
    save_model(build_model(Config.of(**TINY)), tmp_path)
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    for bad in (b"", good[:20], good[:-1], b"\xff" * 8 + good[8:], b"not tensors at all"):
        path.write_bytes(bad)
        assert "model.safetensors' is not a readable safetensors file" in complaint(load_model, tmp_path)
