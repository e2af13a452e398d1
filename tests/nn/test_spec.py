"""The spec parser: every type, every mistake, and no text that gives anything but a result or one clear line."""

import inspect
from typing import Literal, Optional

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.stack import FFNS, MIXERS, SUBLAYERS, layers, parse_stack
from nn.norm import NORMS
from nn.position import POSITIONS
from nn.spec import arguments, build, listing, nearest, parse_value, resolve, signature

FAMILIES = {"mixer": MIXERS, "ffn": FFNS, "norm": NORMS, "position": POSITIONS}


class Everything:
    """Has an option of every type."""

    def __init__(
        self,
        dim: int,
        *,
        flag: bool = False,
        count: int = 3,
        rate: float = 0.5,
        name: str = "x",
        kind: Literal["near", "far"] = "near",
        pair: tuple[float, float] = (0.9, 0.95),
        several: tuple[int, ...] = (1, 2, 3),
        maybe: int | None = None,
        perhaps: Optional[float] = None,  # noqa: UP045 (the older spelling is understood too)
        position: object = None,
    ):
        self.dim, self.position = dim, position
        self.options = dict(flag=flag, count=count, rate=rate, name=name, kind=kind, pair=pair, several=several,
                            maybe=maybe, perhaps=perhaps)  # fmt: skip


def bare(dim: int, *, needed: int, heads: int = 1):
    """A function with an option that has no default."""
    return dim, needed, heads


FAMILY = {"everything": Everything, "bare": bare}
DEFAULTS = Everything(1).options


def options(text: str) -> dict:
    return build(text, FAMILY, "thing", 8).options


def complaint(call, *args) -> str:
    """The message of the ValueError that a call gives, which must be one line."""
    with pytest.raises(ValueError) as caught:
        call(*args)
    return checked(caught.value)


def checked(error: ValueError) -> str:
    message = str(error)
    assert len(message.splitlines()) == 1 and type(error) is ValueError, message
    return message


def test_defaults():
    made = build("everything", FAMILY, "thing", 8)
    assert made.dim == 8 and made.options == DEFAULTS


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("flag=true", True), ("flag=Yes", True), ("flag=1", True), ("flag=no", False), ("flag=0", False),
        ("count=-7", -7), ("count=+12", 12), ("rate=3", 3.0), ("rate=-1e-3", -1e-3), ("rate=inf", float("inf")),
        ("name=", ""), ("name=a=b", "a=b"), ("kind=far", "far"), ("pair=1+2.5", (1.0, 2.5)), ("several=4", (4,)),
        ("several=4+-5+6", (4, -5, 6)), ("maybe=4", 4), ("maybe=none", None), ("perhaps=None", None), ("perhaps=1", 1.0),
    ],
)  # fmt: skip
def test_every_type(text, value):
    found = options("everything:" + text)
    key = text.partition("=")[0]
    assert found == DEFAULTS | {key: value} and type(found[key]) is type(value)


@given(st.booleans(), st.integers(-(10**17), 10**17), st.floats(allow_nan=False), st.lists(st.integers(-99, 99), min_size=1))
@settings(max_examples=100, deadline=None)
def test_values_come_back(flag, count, rate, several):
    joined = "+".join(map(str, several))
    given = dict(flag=flag, count=count, rate=rate, several=tuple(several))
    assert options(f"everything:flag={flag}:count={count}:rate={rate!r}:several={joined}") == DEFAULTS | given


def test_what_is_offered():
    """An argument is passed on only where it is asked for, and an option of the spec takes precedence."""
    made = build("everything:count=5", FAMILY, "thing", 8, position="here", count=9, unheard_of=1)
    assert made.position == "here" and made.options["count"] == 5
    assert build("bare:needed=2", FAMILY, "thing", 8, heads=4, position=None) == (8, 2, 4)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("evrything", ["unknown thing 'evrything'", "did you mean 'everything'?", "there are: everything, bare"]),
        ("", ["unknown thing ''", "there are: everything, bare"]),
        ("everything:cuont=3", ["no option 'cuont'", "did you mean 'count'?", "everything:flag=false:count=3:"]),
        ("everything:position=x", ["no option 'position'"]),
        ("everything:dim=3", ["no option 'dim'"]),
        ("everything:count=3:count=4", ["'count' twice"]),
        ("everything:count", ["'count' is not key=value"]),
        ("everything:", ["'' is not key=value"]),
        ("everything:flag=maybe", ["flag='maybe'", "neither true nor false", "flag=false"]),
        ("everything:count=3.5", ["count='3.5'", "not a whole number"]),
        ("everything:count=1_000", ["not a whole number"]),
        ("everything:count=" + "9" * 5000, ["not a whole number"]),
        ("everything:rate=fast", ["rate='fast'", "not a number"]),
        ("everything:rate=nan", ["not a number"]),
        ("everything:rate=1_0", ["not a number"]),
        ("everything:kind=middle", ["kind='middle'", "near, far"]),
        ("everything:pair=1", ["pair='1'", "2 values joined by +"]),
        ("everything:several=1++2", ["several='1++2'", "not a whole number"]),
        ("everything:maybe=some", ["maybe='some'", "not a whole number"]),
        ("bare", ["needs needed", "bare:needed=…:heads=1"]),
    ],
)
def test_every_mistake(text, parts):
    message = complaint(resolve, text, FAMILY, "thing")
    for part in parts:
        assert part in message


def test_signature():
    spelled = "everything:flag=false:count=3:rate=0.5:name=x:kind=near:pair=0.9+0.95:several=1+2+3:maybe=none:perhaps=none"
    assert signature("everything", Everything) == spelled
    assert resolve(spelled, FAMILY, "thing")[1] == DEFAULTS


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, family in FAMILIES.items() for name in family])
def test_signatures_of_the_house_spell_their_defaults(kind, name):
    make = FAMILIES[kind][name]
    found, given = resolve(signature(name, make), FAMILIES[kind], kind)
    assert found is make and given == {key: default for key, (_, default) in arguments(make).items()}


def test_listing():
    text = listing({"thing": FAMILY, "mixer": MIXERS})
    for line in ("thing", "  bare:needed=…:heads=1", "      Has an option of every type."):
        assert line in text.splitlines()
    assert listing({"thing": FAMILY, "mixer": MIXERS}, "mixer") == listing({"mixer": MIXERS})
    assert "no family 'mixre' (did you mean 'mixer'?)" in complaint(listing, {"thing": FAMILY, "mixer": MIXERS}, "mixre")


def test_every_concept_is_described():
    for family in FAMILIES.values():
        for make in family.values():
            assert (inspect.getdoc(make) or "").partition("\n")[0].endswith((".", ":"))


def test_nearest():
    assert nearest("swigul", FFNS) == " (did you mean 'swiglu'?)" and nearest("zzz", FFNS) == ""


# Fuzz: whatever the text, a result or a ValueError of one line

WORDS = [
    "gqa",
    "mlp",
    "none",
    "kv_heads",
    "=",
    ":",
    "(",
    ")",
    "*",
    "9999",
    "2",
    " ",
    ",",
    "+",
    "\n",
    "\u2028",
    "²",
    "true",
    "é",
    "\0",
]
TEXTS = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(WORDS), max_size=14).map("".join))


@given(TEXTS, st.sampled_from([bool, int, float, str, Literal["a"], tuple[int, ...], tuple[float, float], int | None]))
@settings(max_examples=400, deadline=None)
def test_any_text(text, kind):
    calls = [
        lambda: resolve(text, SUBLAYERS, "sublayer"),
        lambda: resolve("everything:" + text, FAMILY, "thing"),
        lambda: layers(text, "none", 3),
        lambda: layers("gqa", text, 3),
        lambda: parse_stack(text),
        lambda: parse_value(text, kind),
        lambda: listing(FAMILIES, text),
    ]
    for call in calls:
        try:
            call()
        except ValueError as error:
            if call is not calls[5]:  # half a sentence, which resolve completes
                checked(error)


IMPOSSIBLE = [
    "(gqa)*99999", "((((gqa)*9999)*9999)*9999)*9999", "(gqa*9999 mlp)*9999", "gqa*10001", "gqa " * 20_000, "(" * 5000,
    ")" * 5000, "*", "()*", "gqa**2", "gqa*-1", "gqa*2*3", "(gqa", "gqa)", "gqa*²", "gqa*٣",
]  # fmt: skip


@pytest.mark.parametrize("text", IMPOSSIBLE, ids=range(len(IMPOSSIBLE)))
def test_impossible_stacks(text):
    message = complaint(parse_stack, text)
    assert "stack" in message or "sublayer" in message


def spec_of(name: str, make) -> st.SearchStrategy[str]:
    """Specs with right keys and any values of their types, sensible or not."""
    numbers = st.integers(-3, 40).map(str)
    kinds = {
        int: numbers,
        float: st.floats(allow_nan=False).map(repr) | numbers,
        bool: st.sampled_from(["true", "false"]),
        str: st.text(max_size=3),
    }
    values = {}
    for key, (kind, default) in arguments(make).items():
        plain = next((k for k in kinds if kind in (k, k | None)), None)
        values[key] = kinds[plain].filter(lambda v: ":" not in v) if plain else st.just(str(default))
    chosen = st.fixed_dictionaries({}, optional=values)
    return chosen.map(lambda picked: ":".join([name, *(f"{key}={value}" for key, value in picked.items())]))


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, family in FAMILIES.items() for name in family])
def test_any_options(kind, name):
    """Whatever its values, a concept is made or says in one line which argument is wrong."""
    family = FAMILIES[kind]

    @given(spec_of(name, family[name]))
    @settings(max_examples=60, deadline=None)
    def check(spec):
        where = () if kind == "position" else (8,)
        try:
            with torch.device("meta"):
                build(spec, family, kind, *where, **dict(dim=8) if not where else {}, seq_len=16)
        except ValueError as error:
            assert any(checked(error).startswith(argument) for argument in inspect.signature(family[name]).parameters)

    check()
