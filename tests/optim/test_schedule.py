"""Every schedule, by discovery: positive at the first step, a linear warm-up, continuous, then falling to its floor."""

import inspect
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optim import SCHEDULES
from optim.schedule import cosine, linear, rsqrt, wsd

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
warmups = st.one_of(st.just(0.0), st.floats(1e-3, 0.5))
floors, shares = st.floats(0, 1), st.floats(0, 1)


@every_schedule
@given(warmup=warmups, floor=floors, a=shares, b=shares)
def test_rises_then_never_rises_again(schedule, warmup, floor, a, b):
    def at(progress):
        return schedule(progress, warmup=warmup, floor=floor)

    a, b = sorted((a, b))
    assert 0 <= at(a) <= 1 and at(1.0) == floor and at(warmup) == 1
    assert at(0.0) == (0 if warmup else 1)
    assert 0 < at(0.5 / 1000)
    if b <= warmup:
        assert at(a) <= at(b) and math.isclose(at(b), b / warmup if warmup else 1)
    if a >= warmup:
        assert at(a) >= at(b) - 1e-15 and at(b) >= floor - 1e-15


@every_schedule
@given(warmup=st.floats(0.01, 0.5), floor=floors, progress=shares)
def test_is_continuous(schedule, warmup, floor, progress):
    def at(progress):
        return schedule(progress, warmup=warmup, floor=floor)

    tiny = 1e-9  # a step of tiny moves no schedule by more than its steepest slope, 1 / warmup
    for place in (warmup, progress):
        assert abs(at(min(1.0, place + tiny)) - at(place)) <= 2e-7
        assert abs(at(max(0.0, place - tiny)) - at(place)) <= 2e-7


def test_values_by_hand():
    assert cosine(0.55, warmup=0.1, floor=0.2) == pytest.approx(0.6)  # halfway down
    assert cosine(0.05, warmup=0.1) == pytest.approx(0.5)
    assert linear(0.75, warmup=0.0) == pytest.approx(0.25)
    assert linear(0.75, warmup=0.5, floor=0.5) == pytest.approx(0.75)
    assert wsd(0.6, decay=0.4) == 1
    assert wsd(0.9, decay=0.4) == pytest.approx(0.25)
    assert wsd(0.7, decay=0.4, shape="1-sqrt") == pytest.approx(0.5)
    assert wsd(0.7, decay=0.4, shape="1-sqrt", floor=0.5) == pytest.approx(0.75)
    assert rsqrt(0.4, warmup=0.1, timescale=0.1, cooldown=0.2) == pytest.approx(0.5)
    assert rsqrt(0.9, warmup=0.1, timescale=0.1, cooldown=0.2) == pytest.approx(0.5 / 3)
    assert rsqrt(0.4, warmup=0.0, timescale=0.4, cooldown=0.2) == pytest.approx(math.sqrt(0.5))


@given(warmup=st.floats(0.01, 0.5), progress=st.floats(0.01, 0.8))
def test_rsqrt_is_that_of_the_transformer_paper(warmup, progress):
    def paper(share, steps=10_000):  # equation 3 without the model's width
        return min((share * steps) ** -0.5, share * steps * (warmup * steps) ** -1.5)

    assert rsqrt(progress, warmup=warmup, timescale=warmup) == pytest.approx(paper(progress) / paper(warmup))


@every_schedule
def test_bad_arguments_are_named(schedule):
    for progress in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="^progress must"):
            schedule(progress)
    for name in inspect.signature(schedule).parameters.keys() - {"progress", "shape"}:
        for bad in (-0.1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"^{name} must"):
                schedule(0.5, **{name: bad})


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match="^shape must be linear or 1-sqrt, not 'cubic'"):
        wsd(0.5, shape="cubic")
    with pytest.raises(ValueError, match="^decay must be above 0 and at most 1 - warmup = 0.5"):
        wsd(0.5, warmup=0.5, decay=0.6)
    with pytest.raises(ValueError, match="^cooldown must"):
        rsqrt(0.5, cooldown=0.0)


@every_schedule
def test_keywords_can_be_spelled_in_a_spec(schedule):
    for name, parameter in list(inspect.signature(schedule).parameters.items())[1:]:
        assert parameter.kind is parameter.KEYWORD_ONLY and type(parameter.default) is parameter.annotation, name
