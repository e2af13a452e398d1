"""Specs: a concept and its options in one word, as in `gqa:kv_heads=2`.

A spec is `name` or `name:key=value:key=value`. The name is looked up in a family (a dict from name to class or function),
the keys are the keyword-only arguments of what is found there, and each value is read by the type that the argument is
annotated with. Nothing is evaluated. Every mistake is a `ValueError` of one line that says what would be right.
"""

import difflib
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

Family = Mapping[str, Callable]
SIMPLE = (bool, int, float, str)
WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def build(spec: str, family: Family, kind: str, /, *args: Any, **offered: Any) -> Any:
    """Make the thing that `spec` names: its class is called with `args`, the options, and of `offered` what it asks for.

    `offered` is what the surroundings can give (the number of heads, the position encoding, …): an argument is passed
    on only where the signature has it, and an option of the same name in the spec takes precedence.
    """
    make, options = resolve(spec, family, kind)
    wanted = inspect.signature(make).parameters
    return make(*args, **{key: value for key, value in offered.items() if key in wanted} | options)


def resolve(spec: str, family: Family, kind: str) -> tuple[Callable, dict[str, Any]]:
    """Look a spec up and read its options; `kind` is what an error message calls a member of the family."""
    name, *pairs = spec.strip().split(":")
    if name not in family:
        raise ValueError(f"unknown {kind} {name!r}{nearest(name, family)}; there are: {', '.join(family)}")
    make, options = family[name], {}
    accepted = arguments(make)
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{kind} {spec!r}: {pair!r} is not key=value")
        if key not in accepted:
            raise ValueError(f"{kind} {name!r} has no option {key!r}{nearest(key, accepted)}; it is {signature(name, make)}")
        if key in options:
            raise ValueError(f"{kind} {spec!r} gives {key!r} twice")
        try:
            options[key] = parse_value(value, accepted[key][0])
        except ValueError as error:
            raise ValueError(f"{kind} {name!r}: {key}={value!r} {error}; it is {signature(name, make)}") from None
    required = [key for key, (_, default) in accepted.items() if default is inspect.Parameter.empty and key not in options]
    if required:
        raise ValueError(f"{kind} {name!r} needs {', '.join(required)}; it is {signature(name, make)}")
    return make, options


def arguments(make: Callable) -> dict[str, tuple[Any, Any]]:
    """The options of a class or function: {name: (type, default)} of the keyword-only arguments a spec can spell."""
    function = make.__init__ if inspect.isclass(make) else make
    hints = get_type_hints(function)
    parameters = inspect.signature(make).parameters.values()
    keyword_only = [p for p in parameters if p.kind is p.KEYWORD_ONLY and _spellable(hints.get(p.name))]
    return {p.name: (hints[p.name], p.default) for p in keyword_only}


def signature(name: str, make: Callable) -> str:
    """How a member is spelled, with its defaults: `gqa:heads=none:kv_heads=none:bias=false`."""
    return ":".join([name, *(f"{key}={_spell(default)}" for key, (_, default) in arguments(make).items())])


def parse_value(text: str, kind: Any) -> Any:
    """Read `text` as the annotated type: bool, int, float, str, Literal, a tuple (joined by +) of these, or None."""
    options = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        if text.lower() == "none" and type(None) in options:
            return None
        kind = next(option for option in options if option is not type(None))
        return parse_value(text, kind)
    if get_origin(kind) is Literal:
        if text not in options:
            raise ValueError(f"is not one of {', '.join(options)}")
        return text
    if get_origin(kind) is tuple:
        parts = text.split("+")
        if options[-1] is not ... and len(parts) != len(options):
            raise ValueError(f"is not {len(options)} values joined by +")
        return tuple(parse_value(part, options[0]) for part in parts)
    if kind is bool:
        if text.lower() not in WORDS:
            raise ValueError("is neither true nor false")
        return WORDS[text.lower()]
    if kind is int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
            raise ValueError("is not a whole number")
        return int(text)
    if kind is float:
        try:
            number = float(text)
        except ValueError:
            raise ValueError("is not a number") from None
        if number != number or "_" in text:
            raise ValueError("is not a number")
        return number
    return text


def _spellable(kind: Any) -> bool:
    """Whether a value of this annotated type can be written in a spec."""
    if kind in SIMPLE or get_origin(kind) is Literal:
        return True
    if get_origin(kind) is tuple:
        item, *others = get_args(kind)
        return item in SIMPLE and all(other in (item, ...) for other in others)
    if get_origin(kind) in (Union, types.UnionType):
        return all(option is type(None) or _spellable(option) for option in get_args(kind))
    return False


def _spell(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "…"
    if isinstance(value, tuple):
        return "+".join(map(_spell, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def nearest(word: str, words: Iterable[str]) -> str:
    """The hint of an error message: the one of `words` that was probably meant, or nothing."""
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def listing(families: Mapping[str, Family], only: str = "") -> str:
    """Every member of the families (or of the one named `only`): its signature and the first line of its docstring."""
    if only and only not in families:
        raise ValueError(f"list: no family {only!r}{nearest(only, families)}; there are: {', '.join(families)}")
    lines = []
    for kind, family in families.items():
        if only in ("", kind):
            lines.append(kind)
            for name, make in family.items():
                summary = (inspect.getdoc(make) or "").partition("\n")[0]
                lines += [f"  {signature(name, make)}", f"      {summary}"]
    return "\n".join(lines)
