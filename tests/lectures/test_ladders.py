"""The two ladders of lecture 30: their book is written as its tables say, their runs are what they are called."""

import numpy as np
import pytest
import torch

from lectures import routed, twins
from lectures.routed import Chapters, Point, law_of, routed_runs
from lectures.twins import Run, compute, factors, learn, made
from models.describe import forward_flops
from models.laws.routed import RoutedLaw

TINY = dict(dim=16, depth=1, heads=2, vocab_size=12, seq_len=8)


def test_a_book_is_written_as_its_tables_say():
    book = Chapters(2, 4, seed=3)
    rows = book.rows(4000, 20, seed=1)
    assert rows.shape == (4000, 21) and rows[:, 0].ge(4).all() and rows[:, 1:].lt(4).all()
    for chapter in range(2):
        own = rows[rows[:, 0] == 4 + chapter, 1:]
        pairs = torch.zeros(4, 4).index_put_((own[:, :-1].flatten(), own[:, 1:].flatten()), torch.ones(1), accumulate=True)
        assert torch.allclose(pairs / pairs.sum(1, keepdim=True), book.chances[chapter], atol=0.03)
    inputs, targets = next(book.batches(20))
    assert torch.equal(inputs[:, 2:], targets[:, 1:-1]) and targets[:, 0].eq(-100).all() and targets[:, 1:].ge(0).all()


def test_runs_that_take_turns_learn_what_they_learn_alone():
    book, specs = Chapters(2, 10, seed=0), ("mlp:width=16", "moe:experts=4:width=8")
    together = [made(spec, **TINY) for spec in specs]
    learn(together, book.batches(8), 4)
    for spec, run in zip(specs, together, strict=True):
        alone = made(spec, **TINY)
        learn([alone], book.batches(8), 4)
        assert run.seconds > 0
        theirs = dict(run.model.named_parameters())
        for name, parameter in alone.model.named_parameters():
            assert torch.equal(parameter, theirs[name]), name


def test_points_are_runs_of_one_cost():
    book = Chapters(2, 10, seed=0)
    points = routed_runs(book, [16, 32], [1, 4], ("sinkhorn", "hash"), steps=1, length=8)
    assert [(p.router, p.experts) for p in points] == 2 * [("sinkhorn", 1), ("hash", 1), ("sinkhorn", 4), ("hash", 4)]
    assert points[0].loss == points[1].loss and len({p.size for p in points}) == 2
    for point in points:
        (dense,) = (p.flops for p in points if (p.size, p.experts, p.router) == (point.size, 1, point.router))
        dim = 16 if point.size == points[0].size else 32
        router = 3 * 2 * dim * 4 if (point.router, point.experts) == ("sinkhorn", 4) else 0
        assert point.flops == pytest.approx(dense + router)


def test_the_law_of_planted_points_is_found():
    law = RoutedLaw(-0.1, -0.05, 0.01, 1.0)
    points = [Point("hash", n, e, float(law.loss(n, e)), 1.0) for n in (1000, 4000) for e in (1, 4, 16)]
    found, off, alone = law_of(points)
    np.testing.assert_allclose([found.a, found.b, found.c, found.d], [law.a, law.b, law.c, law.d], rtol=1e-9)
    assert off < 1e-12 < 1e-4 < alone


def test_factors_are_read_off_the_dense_curve():
    dense = {dim: made("mlp:width=16", **TINY | dict(dim=dim)) for dim in (16, 32)}
    small, large = (compute(run, 100) for run in dense.values())
    assert small == pytest.approx(3 * forward_flops(dense[16].model, 8) / 8 * 100)
    for run, bits in zip(dense.values(), (2.0, 1.0), strict=True):
        run.losses = dict(own=bits)
    halfway, beyond = Run(dense[16].model, None, losses=dict(own=1.5)), Run(dense[16].model, None, losses=dict(own=0.9))
    found = factors(dense, {16: halfway, 32: beyond}, "own", 100)
    assert found == {16: pytest.approx((large / small) ** 0.5), 32: None}


@pytest.mark.parametrize("script", [twins, routed])
@pytest.mark.parametrize("flags", [["--sizes", "a,b"], ["--sizes", "1.5"], ["--steps", "0"], ["--seed", "-1"]])
def test_bad_flags_are_one_line(script, flags, capsys):
    assert script.main(flags) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith(f"{script.__name__}: {flags[0][2:]}: ") and complaint.count("\n") == 1


def test_unknown_routers_are_one_line(capsys):
    assert routed.main(["--routers", "sinkhron", "--sizes", "12,16", "--steps", "1", "--experts", "1,2"]) == 2
    assert "unknown router 'sinkhron'" in capsys.readouterr().err
