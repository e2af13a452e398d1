"""A model as a stack of residual sublayers, spelled in words.

`--mixer mamba2,mamba2,gqa --ffn swiglu` names a mixer and an ffn a layer, the lists cycling over the depth, and
`--stem ngram` what stands before the layers;
`--stack "(mamba2 mlp)*3 gqa moe:experts=8"` spells every sublayer out. `none` leaves a sublayer away; `gqa+mlp` are two
side by side.
"""

import re

from models.residual import BESIDE
from nn.attention import ATTENTION
from nn.embedding import EMBEDDINGS
from nn.ffn import FFNS as DENSE_FFNS
from nn.linear_attention import LINEAR_ATTENTION
from nn.mixing import MIXING
from nn.moe import MOE, MOE_MIXERS
from nn.recurrent import RECURRENT
from nn.spec import resolve
from nn.ssm import SSM

MIXERS = {**ATTENTION, **SSM, **LINEAR_ATTENTION, **RECURRENT, **MIXING, **MOE_MIXERS, **EMBEDDINGS}
FFNS = {**DENSE_FFNS, **MOE}
SUBLAYERS = {**MIXERS, **FFNS}
TOKEN = re.compile(r"\s*(\(|\)(?:\s*\*\s*[0-9]{1,4})?|[^\s()*]+(?:\s*\*\s*[0-9]{1,4})?|\S)")


def layers(mixer: str, ffn: str, depth: int) -> list[str]:
    """The everyday form written out: sublayer specs of `depth` layers, from comma-separated lists that cycle."""
    mixers, ffns = (check_specs(text.split(","), family, kind) for text, family, kind in
                    ((mixer, MIXERS, "mixer"), (ffn, FFNS, "ffn")))
    pairs = ((mixers[i % len(mixers)], ffns[i % len(ffns)]) for i in range(depth))
    return [spec for pair in pairs for spec in pair if spec != "none"]


def cycled(specs: list[str]) -> str:
    """The shortest list, joined by commas, that cycles to one spec a layer; `none` for no layers."""
    period = next((n for n in range(1, len(specs)) if specs == [specs[i % n] for i in range(len(specs))]), len(specs))
    return ",".join(specs[:period]) or "none"


def parse_stack(text: str) -> list[str]:
    """`"(a b)*2 c"` -> ["a", "b", "a", "b", "c"]. A word or a group may be repeated with *N; groups nest."""
    groups: list[list[str]] = [[]]
    for word in TOKEN.findall(text):
        body, _, times = (part.strip() for part in word.partition("*"))
        if times and not times.isdigit() or not body:
            raise ValueError(f"stack: {word!r} in {text!r} is no sublayer, group or repetition, as in (gqa swiglu)*6")
        if body == "(":
            groups.append([])
            continue
        if body == ")":
            if len(groups) == 1:
                raise ValueError(f"stack: a ) too many in {text!r}")
            items = groups.pop()
        else:
            items = [] if body == "none" else check_specs([body], SUBLAYERS, "sublayer")
        if len(groups[-1]) + len(items) * int(times or 1) > 10_000:
            raise ValueError(f"stack: more than 10000 sublayers in {text[:60]!r}")
        groups[-1] += items * int(times or 1)
    if len(groups) > 1:
        raise ValueError(f"stack: a ) is missing in {text!r}")
    return groups[0]


def check_specs(specs: list[str], family: dict, kind: str) -> list[str]:
    """The specs, each of which names a member of the family; what stands beside it after a + may be any sublayer."""
    for spec in specs:
        if spec != "none":
            first, *others = BESIDE.split(spec)
            resolve(first, family, kind)
            for other in others:
                resolve(other, SUBLAYERS, "sublayer")
    return specs


def layer_numbers(specs: list[str]) -> list[int]:
    """Which layer each sublayer belongs to, from 1 on: a mixer begins one, and an ffn that follows none."""
    numbers, before = [], ""
    for spec in specs:
        kind = "stem" if names(spec)[0] in EMBEDDINGS else "mixer" if names(spec)[0] in MIXERS else "ffn"
        begins = kind == "mixer" or kind == "ffn" and before != "mixer"
        numbers.append((numbers[-1] if numbers else 0) + begins)
        before = kind
    return [max(1, number) for number in numbers]


def names(spec: str) -> list[str]:
    return [part.partition(":")[0] for part in BESIDE.split(spec)]
