"""A model as a stack of residual sublayers, spelled in words.

`--mixer mamba2,mamba2,gqa --ffn swiglu` names a mixer and an ffn a layer, the lists cycling over the depth, and
`--stem ngram` what stands before the layers;
`--stack "(mamba2 mlp)*3 gqa moe:experts=8"` spells every sublayer out. `none` leaves a sublayer away.
"""

import re

from torch import Tensor, nn

from nn.attention import ATTENTION
from nn.context import Context
from nn.embedding import EMBEDDINGS
from nn.ffn import FFNS
from nn.norm import NORMS
from nn.spec import build, resolve

MIXERS = {**ATTENTION, **EMBEDDINGS}
SUBLAYERS = {**MIXERS, **FFNS}
TOKEN = re.compile(r"\s*(\(|\)(?:\s*\*\s*[0-9]{1,4})?|[^\s()*]+(?:\s*\*\s*[0-9]{1,4})?|\S)")


def layers(mixer: str, ffn: str, depth: int) -> list[str]:
    """The everyday form written out: sublayer specs of `depth` layers, from comma-separated lists that cycle."""
    mixers, ffns = (check_specs(text.split(","), family, kind) for text, family, kind in
                    ((mixer, MIXERS, "mixer"), (ffn, FFNS, "ffn")))
    pairs = ((mixers[i % len(mixers)], ffns[i % len(ffns)]) for i in range(depth))
    return [spec for pair in pairs for spec in pair if spec != "none"]


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
    for spec in specs:
        if spec != "none":
            resolve(spec, family, kind)
    return specs


class Residual(nn.Module):
    """One sublayer with its norm and its residual connection.

    `pre`: x + f(norm(x)) (Xiong et al. 2020, arXiv:2002.04745). `post`: norm(x + f(x)) (Vaswani et al. 2017).
    """

    def __init__(self, spec: str, dim: int, *, norm: str, norm_place: str, **offered):
        super().__init__()
        self.norm = build(norm, NORMS, "norm", dim)
        self.layer = build(spec, SUBLAYERS, "sublayer", dim, **offered)
        self.is_mixer = spec.partition(":")[0] in MIXERS
        self.pre = norm_place == "pre"

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if self.pre:
            return x + self.layer(self.norm(x), context)
        return self.norm(x + self.layer(x, context))
