"""Checkpoints that are written behind a run's back, and those that are written in parts."""

from threading import Event

import pytest
import torch
from torch.distributed import checkpoint

from models.checkpoint import checkpoints, read_tensors, verify
from models.saver import Saver
from models.sharded import kind_of, on_meta, read_all, read_parts

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def tensors(value: float) -> dict:
    return dict(model={"a.weight": torch.full((3, 4), value)}, optimizer={"optimizers/0/state/0/mean": torch.full((5,), value)})


class Late(Saver):
    """Begins to write when it is told to."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.told = Event()

    def work(self, tensors: dict) -> None:
        self.told.wait()
        super().work(tensors)


def test_what_is_written_behind_is_what_was_there(tmp_path):
    saver, given = Late(tmp_path, keep=2, behind=True), tensors(1.0)
    place = saver.save(7, given, lambda folder: (folder / "note").write_text("seven"))
    given["model"]["a.weight"].zero_()
    assert saver.writing and not checkpoints(tmp_path)
    saver.told.set()
    saver.finish()
    assert not saver.writing and checkpoints(tmp_path) == [place] and not [*tmp_path.glob(".step-*")]
    verify(place)
    assert (place / "note").read_text() == "seven"
    assert read_tensors(place / "model.safetensors")["a.weight"].eq(1).all()
    assert read_tensors(place / "optimizer.safetensors").keys() == {"optimizers/0/state/0/mean"}


def test_the_next_checkpoint_waits_for_the_last_one(tmp_path):
    saver = Saver(tmp_path, keep=2, behind=True)
    for step in (1, 2, 3):
        saver.save(step, tensors(step), lambda folder: None)
    saver.finish()
    saver.finish()  # there is nothing to finish
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    assert read_tensors(checkpoints(tmp_path)[0] / "model.safetensors")["a.weight"].eq(2).all()


@pytest.mark.parametrize("behind", [False, True])
def test_what_cannot_be_written_is_told_and_the_last_one_stays(tmp_path, monkeypatch, behind):
    saver = Saver(tmp_path, keep=2, behind=behind)
    saver.save(1, tensors(1), lambda folder: None)
    saver.finish()

    def no_room(path, tensors):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("models.saver.write_tensors", no_room)
    with pytest.raises(OSError, match="No space left"):
        saver.save(2, tensors(2), lambda folder: None)
        assert behind
        saver.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    verify(tmp_path / "step-000001")


def test_what_no_one_expected_makes_no_checkpoint(tmp_path, monkeypatch):
    saver = Saver(tmp_path, keep=2, behind=True)
    monkeypatch.setattr("models.saver.write_tensors", lambda path, tensors: {}["nothing"])
    saver.save(1, tensors(1), lambda folder: None)
    with pytest.raises(KeyError):
        saver.finish()
    assert not [*tmp_path.iterdir()]


@pytest.fixture
def parts(tmp_path):
    both = {name: tensor for of in tensors(2.0).values() for name, tensor in of.items()}
    writer = checkpoint.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)
    checkpoint.save(both, storage_writer=writer, no_dist=True)
    return tmp_path


def test_parts_are_read_by_name_and_kind(parts):
    assert [kind_of(name) for name in ("a.weight", "optimizers/0/state/0/mean", "generators/cpu")] == [
        "model", "optimizer", "generators"]  # fmt: skip
    assert {name: t.shape for name, t in on_meta(parts).items()} == {"a.weight": (3, 4), "optimizers/0/state/0/mean": (5,)}
    (name, tensor), = read_all(parts, "optimizer").items()
    assert name.endswith("mean") and tensor.eq(2).all()


@pytest.mark.parametrize("wanted, said", [
    (dict(b=torch.empty(2)), "the tensor 'b' is missing"),
    ({"a.weight": torch.empty(4, 3)}, r"the tensor 'a.weight' has the shape \(3, 4\), not \(4, 3\)"),
])  # fmt: skip
def test_parts_that_do_not_fit_are_named(parts, wanted, said):
    with pytest.raises(ValueError, match=said):
        read_parts(parts, wanted, alone=True)


def test_a_part_that_is_cut_short_is_named(parts):
    (file,) = parts.glob("shard-*")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is not readable"):
        on_meta(parts)
