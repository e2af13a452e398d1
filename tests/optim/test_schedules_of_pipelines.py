"""Pipeline schedules: their bubbles and memories are the published formulas, their orders those of PyTorch."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as theirs

from optim.parallel.schedules import (
    SCHEDULES,
    Action,
    bubble,
    draw_text,
    gathers,
    held,
    idle_share,
    main,
    make_orders,
    reductions,
    simulate,
    total_time,
)

PIPELINES = [(2, 2, 1), (2, 4, 2), (3, 6, 2), (4, 4, 3), (4, 8, 1), (5, 10, 2)]  # ranks, micro-batches, chunks
every_pipeline = pytest.mark.parametrize("ranks, micro_batches, chunks", PIPELINES)


def forward_passes(orders):
    return [[action for action in order if action.kind == "F"] for order in orders]


@every_pipeline
@pytest.mark.parametrize("backward", [1.0, 2.0])
def test_bubbles(ranks, micro_batches, chunks, backward):
    """Whatever a backward pass takes; also of the chunked schedules with a single chunk."""
    for schedule in SCHEDULES:
        v = chunks if schedule in ("interleaved", "looped") else 1
        spans = simulate(make_orders(schedule, ranks, micro_batches, v), 1.0, backward)
        expected = (ranks - 1) / (v * micro_batches)
        assert bubble(spans) == pytest.approx(expected, abs=1e-12), schedule
        assert idle_share(spans) == pytest.approx(expected / (1 + expected), abs=1e-12)
        assert total_time(spans) == pytest.approx(v * micro_batches * (1 + backward) + (ranks - 1) * (1 + backward))


@pytest.mark.parametrize(
    "layers, ranks, micro_batches, modular, contiguous", [(8, 4, 4, 11, 14), (16, 4, 8, 35, 44), (16, 4, 4, 19, 28)]
)
def test_modular_placement_shortens_the_forward_passes(layers, ranks, micro_batches, modular, contiguous):
    """Lamy-Poirier 2021, section 4: m L / p + p - 1 times that of a layer, instead of (m + p - 1) L / p."""
    looped = forward_passes(make_orders("looped", ranks, micro_batches, layers // ranks))
    assert total_time(simulate(looped)) == modular == micro_batches * layers // ranks + ranks - 1
    blocks = forward_passes(make_orders("gpipe", ranks, micro_batches))
    assert total_time(simulate(blocks, layers / ranks)) == contiguous == (micro_batches + ranks - 1) * layers // ranks
    waiting = forward_passes(make_orders("looped", ranks, micro_batches, layers // ranks, "contiguous"))
    assert total_time(simulate(waiting)) == layers // ranks * micro_batches + (ranks - 1) * (
        micro_batches * (layers // ranks - 1) + 1
    )


@every_pipeline
def test_what_is_remembered(ranks, micro_batches, chunks):
    peaks = {schedule: [held(order) for order in make_orders(schedule, ranks, micro_batches)] for schedule in SCHEDULES}
    assert peaks["gpipe"] == peaks["looped"] == [micro_batches] * ranks
    assert peaks["1f1b"] == [min(micro_batches, ranks - rank) for rank in range(ranks)]
    looped = make_orders("looped", ranks, micro_batches, chunks)
    assert [held(order) for order in looped] == [micro_batches * chunks] * ranks
    alternating = [held(order) for order in make_orders("interleaved", ranks, micro_batches, chunks)]
    most = [(chunks - 1) * ranks + 2 * (ranks - 1 - rank) + 1 for rank in range(ranks)]
    assert alternating == [min(micro_batches * chunks, number) for number in most]


def test_a_schedule_is_compared_with_fewer_micro_batches_than_ranks():
    for micro_batches in (1, 2, 3):
        orders = make_orders("1f1b", 4, micro_batches)
        assert [held(order) for order in orders] == [min(micro_batches, 4 - rank) for rank in range(4)]
        assert bubble(simulate(orders)) == pytest.approx(3 / micro_batches)


@pytest.mark.parametrize("layers, micro_batches", [(1, 4), (3, 5), (6, 2)])
def test_layered_accumulation_gathers_twice_and_sums_once(layers, micro_batches):
    """A single rank: each layer's weights twice and its gradient once a step, instead of 2 m and m times."""
    (layered,) = make_orders("looped", 1, micro_batches, layers)
    assert gathers(layered) == 2 * layers
    assert reductions(layered) == layers
    plain = []
    for i in range(micro_batches):
        plain += [Action("F", layer, i) for layer in range(layers)]
        plain += [Action("B", layer, i) for layer in reversed(range(layers))]
    assert gathers(plain) == 2 * micro_batches * layers
    assert reductions(plain) == (micro_batches * layers if layers > 1 else 1)
    assert total_time(simulate([plain])) == total_time(simulate([layered]))
    assert gathers([]) == reductions([]) == 0


def torch_order(schedule, rank, ranks, micro_batches, chunks):
    """The order that torch.distributed.pipelining has for a rank."""
    if schedule in ("gpipe", "1f1b"):
        cls = theirs.ScheduleGPipe if schedule == "gpipe" else theirs.Schedule1F1B
        if not hasattr(cls, "_get_pipeline_order"):
            pytest.skip("this PyTorch does not write down the order")
        order = cls._get_pipeline_order(SimpleNamespace(_num_stages=ranks, _n_microbatches=micro_batches))[rank]
    else:
        cls = theirs.ScheduleLoopedBFS if schedule == "looped" else theirs.ScheduleInterleaved1F1B
        own = SimpleNamespace(
            _stages=[None] * chunks, n_local_stages=chunks, pp_group_size=ranks, _n_microbatches=micro_batches,
            number_of_rounds=micro_batches // ranks, microbatches_per_round=ranks,
        )  # fmt: skip
        order = cls._calculate_single_rank_operations(own, rank)
    kinds = dict(FORWARD="F", FULL_BACKWARD="B")
    passes = [action for action in order if action and action.computation_type.name in kinds]
    return [Action(kinds[a.computation_type.name], a.stage_index, a.microbatch_index) for a in passes]


@every_pipeline
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_orders_are_those_of_pytorch(schedule, ranks, micro_batches, chunks):
    chunks = chunks if schedule in ("interleaved", "looped") else 1
    for rank, order in enumerate(make_orders(schedule, ranks, micro_batches, chunks)):
        expected = torch_order(schedule, rank, ranks, micro_batches, chunks)
        if schedule == "1f1b" and rank == ranks - 1:  # PyTorch writes its last rank's forward passes as 1 to m
            expected = [a._replace(micro_batch=a.micro_batch - (a.kind == "F")) for a in expected]
        assert order == expected


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_timeline_keeps_its_order_and_its_needs(data):
    schedule, placement = data.draw(st.sampled_from([*SCHEDULES])), "modular"
    ranks, chunks = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    micro_batches = data.draw(st.integers(1, 7)) * (ranks if schedule == "interleaved" else 1)
    if schedule == "looped":
        placement = data.draw(st.sampled_from(["modular", "contiguous"]))
    chunks = chunks if schedule in ("interleaved", "looped") else 1
    forward, backward, latency = (data.draw(st.sampled_from(times)) for times in ((1.0, 0.3), (2.0, 0.5), (0.0, 0.25)))
    orders = make_orders(schedule, ranks, micro_batches, chunks, placement)
    stages = ranks * chunks
    everything = {Action(k, s, i) for k in "FB" for s in range(stages) for i in range(micro_batches)}
    assert {action for order in orders for action in order} == everything
    spans = simulate(orders, forward, backward, latency)
    found = {span.action: (span.start, span.end, rank) for rank, own in enumerate(spans) for span in own}
    for order, own in zip(orders, spans, strict=True):
        assert [span.action for span in own] == order
        assert all(a.end <= b.start + 1e-9 for a, b in zip(own, own[1:], strict=False))
    for (kind, stage, i), (start, end, rank) in found.items():
        assert end - start == pytest.approx(forward if kind == "F" else backward)
        needs = {("F", stage - 1, i)} if kind == "F" else {("F", stage, i), ("B", stage + 1, i)}
        for need in needs & everything:
            _, ended, other = found[Action(*need)]
            assert start >= ended + latency * (rank != other) - 1e-9
    assert "\n" not in draw_text(spans[:1], 1.0)


def test_latency_lengthens_what_is_interleaved_more():
    times = [total_time(simulate(make_orders(*words), latency=0.5)) for words in (("1f1b", 4, 8), ("interleaved", 4, 8, 2))]
    assert times[0] > 33
    assert times[1] > 57  # in units of half the stages


def test_orders_that_never_finish_say_where():
    orders = [[Action("F", 0, 0), Action("B", 0, 0)], [Action("B", 1, 0), Action("F", 1, 0)]]
    with pytest.raises(ValueError, match="^orders: rank 0 waits for ever before its backward of stage 0, micro-batch 0: the "
                       "backward of stage 1, micro-batch 0 never comes$"):  # fmt: skip
        simulate(orders)
    with pytest.raises(ValueError, match="^orders: rank 0 .* the forward of stage 0, micro-batch 1 never comes$"):
        simulate([[Action("F", 1, 1)]])
    with pytest.raises(ValueError, match="^orders: forward of stage 0, micro-batch 2 stands there twice$"):
        simulate([[Action("F", 0, 2)], [Action("F", 0, 2)]])


@pytest.mark.parametrize(
    "words, complaint",
    [
        (("zigzag", 2, 2), "schedule: there is no 'zigzag'; there are gpipe, 1f1b, interleaved, looped"),
        (("gpipe", 0, 2), "ranks: at least 1, not 0"),
        (("gpipe", 2, -1), "micro_batches: at least 1, not -1"),
        (("interleaved", 4, 6, 2), "micro_batches: interleaved needs a multiple of the 4 ranks, not 6"),
        (("1f1b", 4, 8, 2), "chunks: 1f1b has one stage a rank; more are for interleaved and looped"),
        (("interleaved", 4, 8, 2, "contiguous"), "placement: interleaved has its stages in modular placement"),
        (("looped", 4, 8, 2, "odd"), "placement: modular or contiguous, not 'odd'"),
    ],
)
def test_bad_input_is_one_line(words, complaint, capsys):
    with pytest.raises(ValueError) as error:
        make_orders(*words)
    assert str(error.value) == complaint
    flags = zip(("--schedule", "--ranks", "--micro-batches", "--chunks", "--placement"), map(str, words), strict=False)
    assert main([word for pair in flags for word in pair]) == 2
    assert capsys.readouterr().err == f"schedules: {complaint}\n"


def test_the_command_draws(capsys, tmp_path):
    picture = tmp_path / "pipeline.png"
    assert main(["--stages", "2", "--micro-batches", "3", "--schedule", "1f1b", "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "rank 0 | 0 1    ---0 2---1  ---2|"
    assert printed[1] == "rank 1 |   0---0 1---1 2---2    |"
    assert printed[2].startswith("time 12, idle beside work 0.333, idle share 0.250")
    assert [line.split()[-2:] for line in printed[3:]] == [["2", "1"], ["4", "6"], ["1", "1"]]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["--schedule", "interleaved", "--ranks", "2", "--micro-batches", "2", "--chunks", "2"]) == 0
    assert capsys.readouterr().out.startswith("rank 0 | 0a 1a 0b 1b")
    assert main(["--backward", "0"]) == 2
    assert main(["--picture", str(tmp_path / "nowhere" / "p.png")]) == 2
