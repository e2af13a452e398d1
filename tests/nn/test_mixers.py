"""The contract of a mixer, for every member of MIXERS with every option of it, and of models made of each.

A mixer that is added to the family is tested here without a change.
"""

import math
import re
from dataclasses import replace
from functools import partial
from typing import Literal, get_args, get_origin

import pytest
import torch
from torch import Tensor, nn

from models import Config, LanguageModel
from models.stack import MIXERS
from nn.context import Context
from nn.position import POSITIONS
from nn.spec import arguments, build

BATCH, TIME, DIM, HEADS, VOCAB = 3, 9, 16, 4, 23
MORE = [
    "gqa:kv_heads=2",
    "gqa:kv_heads=1:head_dim=6",
    "gqa:kv_heads=2:out_bias=true",
    "mha:heads=2",
    "dca:chunk=3:original=5:kv_heads=2",
    "gqa:window=3",
    "gqa:window=4:kv_heads=2",
    "gqa:window=3:global_tokens=2:sinks=true",
    "gqa:softcap=2:scale=0.4",
    "longformer:window=3:global_tokens=2",
    "bigbird:block=16:random_blocks=0",
    "gqa:temperature=0.8:sinks=true:gate=true",
    "mla:q_rank=6:kv_rank=5:nope_dim=3:rope_dim=4:value_dim=7",
    "mla:kv_rank=300",
    "tpa:q_rank=0:k_rank=1:v_rank=3",
    "tpa:head_dim=6:q_rank=2",
    "mhe:head_dim=6:kind=add",
    "normalised:length_scale=true:power=3:offset=0.5",
    "mamba:state=3:expand=1:conv=2:dt_rank=3",
    "mamba2:state=5:head_dim=8:groups=2",
    "mamba2:state=3:head_dim=4:groups=2:expand=3:conv=2:dt_min=0.6:dt_max=0.9",
    "discrete_mamba2:kv_heads=2:head_dim=3:conv=2",
    "s4d:state=3:expand=1:conv=2",
    "bimamba:state=2:expand=1",
    "linear:weights=none:head_dim=3",
    "lightning:layer=2:layers=4",
    "hgrn2:layer=2:layers=4:expand=3",
    "gated_delta:conv=0:head_dim=3:beta_max=2",
    "longconv:length=4:conv=2",
    "atlas:window=1:degree=1:conv=0",
    "atlas:window=3:degree=3:head_dim=2",
    "lolcats:window=0:width=3",
    "lolcats:window=2:kv_heads=2:width=3:head_dim=6",
    "moa:experts=4:top_k=3:kv_heads=2:head_dim=6",
]  # options that are numbers


SMALL = {"lolcats": "lolcats:window=3"}  # whose default is longer than the sequences here, which then do not see all of it


def spellings() -> list[str]:
    """Every mixer: as it is, with each switch turned over, with each choice made; and MORE."""
    specs = []
    for name, make in MIXERS.items():
        name = SMALL.get(name, name)
        specs.append(name)
        for key, (kind, default) in arguments(make).items():
            if kind is bool:
                specs.append(f"{name}:{key}={str(not default).lower()}")
            elif get_origin(kind) is Literal:
                specs += [f"{name}:{key}={choice}" for choice in get_args(kind) if choice != default]
    return specs + [spec for spec in MORE if spec.partition(":")[0] in MIXERS]


SPECS = spellings()
rotating = [name for name, make in POSITIONS.items() if make.rotate is not POSITIONS["none"].rotate]
each_mixer = pytest.mark.parametrize("spec", SPECS)
each_position = pytest.mark.parametrize("position", ["none", *rotating])


def make(spec: str, position: str = "rope", dtype: torch.dtype = torch.float64) -> nn.Module:
    """A mixer with random weights of such a size that its outputs are of size 1."""
    torch.manual_seed(0)
    encoding = build(position, POSITIONS, "position", dim=DIM, seq_len=64)
    mixer = build(spec, MIXERS, "mixer", DIM, heads=HEADS, position=encoding, vocab_size=VOCAB)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=1 / math.sqrt(DIM))
    return mixer.to(dtype)


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def context(length: int, start: int = 0, batch: int = BATCH, **given) -> Context:
    tokens = torch.randint(VOCAB, (batch, 64), generator=torch.Generator().manual_seed(2))[:, start : start + length]
    return Context(tokens, torch.arange(start, start + length), **given)


def with_other_token(x: Tensor, where: Context, t: int) -> tuple[Tensor, Context]:
    """The same call, but for token t: its vector and its id."""
    changed, where.tokens = x.clone(), where.tokens.clone()
    changed[:, t] += 1
    where.tokens[:, t] = (where.tokens[:, t] + 1) % VOCAB
    return changed, where


def reads_x(mixer: nn.Module) -> bool:
    """Whether a mixer is more than a function of the tokens' ids."""
    x = numbers(BATCH, TIME, DIM)
    return not torch.equal(mixer(x, context(TIME)), mixer(x + 1, context(TIME)))


def mixes(mixer: nn.Module) -> bool:
    """Whether tokens meet in it at all."""
    x = numbers(BATCH, TIME, DIM)
    other, _ = with_other_token(x, context(TIME), 0)
    return not torch.equal(mixer(x, context(TIME))[:, 1:], mixer(other, context(TIME))[:, 1:])


def tolerance(dtype: torch.dtype) -> dict:
    return dict(rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-5)


@each_mixer
@each_position
def test_causality(spec, position):
    """A token changes nothing that stands before it, and something where it stands."""
    mixer, x = make(spec, position), numbers(BATCH, TIME, DIM)
    y = mixer(x, context(TIME))
    assert y.shape == x.shape
    for t in range(TIME):
        difference = (mixer(*with_other_token(x, context(TIME), t)) - y).abs().amax(-1)  # (B, T)
        assert difference[:, :t].sum() < 1e-12 and difference[:, t].min() > 1e-6


@each_mixer
@each_position
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [1, BATCH])
@torch.no_grad()
def test_prefill_and_steps_equal_the_whole(spec, position, dtype, batch):
    mixer, x = make(spec, position, dtype), numbers(batch, TIME, DIM, dtype=dtype)
    whole = mixer(x, context(TIME, batch=batch))
    for lengths in ([TIME], [1] * TIME, [4, 1, 1, 3], [1, 7, 1], [3, 0, 6]):
        state, parts, start = mixer.init_state(batch, TIME + 2, dtype=dtype), [], 0
        for length in lengths:
            parts.append(mixer(x[:, start : start + length], replace(context(length, start, batch), state=state)))
            start += length
        assert all(part.dtype == dtype for part in parts)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, **tolerance(dtype))


@each_mixer
def test_rows_of_a_batch_do_not_meet(spec):
    mixer, x = make(spec), numbers(BATCH, TIME, DIM)
    whole, where = mixer(x, context(TIME)), context(TIME)
    for row in range(BATCH):
        alone = mixer(x[row : row + 1], replace(where, tokens=where.tokens[row : row + 1], shared={}))
        torch.testing.assert_close(alone, whole[row : row + 1], **tolerance(torch.float64))


@each_mixer
def test_only_distances_count(spec):
    """With rotary positions, only distances count: the same tokens elsewhere give the same."""
    if spec.startswith("lolcats"):
        return  # its features are those of turned queries and keys, by its paper
    mixer, x = make(spec, "rope"), numbers(BATCH, TIME, DIM)
    where = context(TIME)
    torch.testing.assert_close(mixer(x, replace(where, positions=where.positions + 17, shared={})), mixer(x, where))


@each_mixer
def test_gradients_reach_every_parameter(spec):
    mixer, x = make(spec), numbers(BATCH, TIME, DIM).requires_grad_()
    (mixer(x, context(TIME)) * numbers(BATCH, TIME, DIM, seed=3)).sum().backward()
    for name, tensor in [("x", x)] * reads_x(mixer) + [*mixer.named_parameters()]:
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.abs().max() > 1e-8, name


@each_mixer
def test_gradcheck(spec):
    """In respect of the input, of the parameters, and of documents packed into a row."""
    mixer, x = make(spec), numbers(2, 4, DIM).requires_grad_()
    where = context(4, batch=2, documents=torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]]))
    names, parameters = [name for name, _ in mixer.named_parameters()], [*mixer.parameters()]
    call = lambda x, *values: torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x, where))  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)


def typical(error) -> float:
    """The middle one of the errors for three inputs: where a norm divides by what happens to be near 0, one may be large."""
    return sorted(error(seed).item() for seed in range(3))[1]


@each_mixer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(spec, dtype):
    mixer = make(spec, dtype=dtype)
    exact = make(spec, dtype=dtype).double()  # the same weights, so that a router has the same to choose from

    def error(seed: int) -> Tensor:
        mixer.zero_grad()
        x = numbers(BATCH, TIME, DIM, dtype=dtype, seed=seed).requires_grad_()
        y = mixer(x, context(TIME))
        y.sum().backward()
        assert y.dtype == dtype and all(p.grad.dtype == dtype for p in mixer.parameters())
        assert x.grad is None or x.grad.dtype == dtype
        wanted = exact(x.double(), context(TIME))
        return (y - wanted).norm() / wanted.norm()

    assert typical(error) < (1e-6 if dtype == torch.float32 else 0.03)


@each_mixer
def test_autocast(spec):
    """Weights in float32, products in bfloat16: gradients come back in the dtype of what they belong to."""
    mixer, exact = make(spec, dtype=torch.float32), make(spec)

    def error(seed: int) -> Tensor:
        mixer.zero_grad()
        x = numbers(BATCH, TIME, DIM, dtype=torch.float32, seed=seed).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = mixer(x, context(TIME))
        y.float().sum().backward()
        tensors = [x] if x.grad is not None else []
        assert all(tensor.grad.dtype == torch.float32 for tensor in [*tensors, *mixer.parameters()])
        wanted = exact(x.double(), context(TIME))
        return (y - wanted).norm() / wanted.norm()

    assert typical(error) < 0.03


@each_mixer
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_steps_under_autocast(spec, kept):
    """Decoding as eval.py does it: products in bfloat16, the state in either dtype, one row or several."""
    mixer = make(spec, dtype=torch.float32)

    def error(seed: int, batch: int) -> Tensor:
        x = numbers(batch, TIME, DIM, dtype=torch.float32, seed=seed)
        whole, state, parts, start = mixer(x, context(TIME, batch=batch)), mixer.init_state(batch, TIME, dtype=kept), [], 0
        with torch.autocast("cpu", torch.bfloat16):
            for length in (5, 1, 1, 2):
                parts.append(mixer(x[:, start : start + length], replace(context(length, start, batch), state=state)))
                start += length
        return (torch.cat(parts, dim=1) - whole).norm() / whole.norm()

    for batch in (1, BATCH):
        assert typical(partial(error, batch=batch)) < 0.03


def bytes_in(thing: object) -> int:
    """Bytes of the tensors that an object holds, each storage once."""
    storages = {}

    def visit(value: object) -> None:
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            [visit(item) for item in value.values()]
        elif isinstance(value, list | tuple):
            [visit(item) for item in value]
        elif hasattr(value, "__dict__"):
            visit(vars(value))

    visit(thing)
    return sum(storages.values())


@each_mixer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes(spec, dtype):
    mixer = make(spec)
    for batch, max_len in ((1, 1), (2, 7), (3, 64)):
        state = mixer.init_state(batch, max_len, dtype=dtype)
        assert mixer.state_bytes(batch, max_len, dtype) == state.bytes() == bytes_in(state)


@each_mixer
@torch.no_grad()
def test_a_state_that_is_full_says_so(spec):
    """A state of one size takes any number of tokens; one with room for max_len refuses the next."""
    mixer, x = make(spec), numbers(BATCH, TIME, DIM)
    if mixer.state_bytes(1, 1, torch.float32) == mixer.state_bytes(1, 64, torch.float32):
        return
    state = mixer.init_state(BATCH, TIME - 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="^max_len: .*8 tokens, not for 9$"):
        mixer(x, replace(context(TIME), state=state))


@each_mixer
def test_without_causality(spec):
    """An encoder's token sees the one that follows it; a mixer that has no such form says so, and a table looks back only."""
    mixer, x = make(spec, "none"), numbers(BATCH, TIME, DIM)
    if not (reads_x(mixer) and mixes(mixer)):
        return
    try:
        y = mixer(x, context(TIME, causal=False))
    except ValueError as error:
        assert "causal" in str(error)
        return
    changed = mixer(*with_other_token(x, context(TIME, causal=False), TIME - 1))
    assert (changed - y).abs().amax(-1)[:, -2:].min() > 1e-6


@each_mixer
def test_mixing_flops(spec):
    mixer = make(spec)
    counts = [mixer.mixing_flops(t, t) for t in (0, 8, 16)]
    assert all(isinstance(count, int) for count in counts) and counts[0] == 0
    assert counts[0] < counts[1] < counts[2] if mixes(mixer) else not any(counts)


@pytest.mark.parametrize("heads", [0, -2])
@pytest.mark.parametrize("name", [name for name, make in MIXERS.items() if "heads" in arguments(make)])
def test_impossible_heads(name, heads):
    with pytest.raises(ValueError, match="^heads: "):
        build(name, MIXERS, "mixer", DIM, heads=heads)


# Grouped queries


def test_groups_equal_repeated_heads():
    """GQA is MHA whose key and value heads are copies: H/K consecutive queries share one."""
    few, many = make("gqa:kv_heads=2"), make("mha")
    weights = few.state_dict()
    for name in ("key.weight", "value.weight"):
        heads = weights[name].unflatten(0, (2, DIM // HEADS))
        weights[name] = heads.repeat_interleave(HEADS // 2, dim=0).flatten(0, 1)
    many.load_state_dict(weights)
    x = numbers(BATCH, TIME, DIM)
    torch.testing.assert_close(few(x, context(TIME)), many(x, context(TIME)), **tolerance(torch.float64))


def test_mqa_and_mha_are_the_ends_of_gqa():
    x = numbers(BATCH, TIME, DIM)
    for name, kv_heads in (("mqa", 1), ("mha", HEADS)):
        assert torch.equal(make(name)(x, context(TIME)), make(f"gqa:kv_heads={kv_heads}")(x, context(TIME)))


@pytest.mark.parametrize(
    ("spec", "message"), [("gqa:kv_heads=3", "^kv_heads: 4 "), ("gqa:heads=5:kv_heads=5", "^heads: a dim of 16 ")]
)
def test_heads_that_do_not_divide(spec, message):
    with pytest.raises(ValueError, match=message):
        make(spec)


# Whole models: packed documents and decoding, for every mixer and every position encoding


def model(spec: str, position: str, **given) -> LanguageModel:
    torch.manual_seed(0)
    fields = dict(
        vocab_size=VOCAB, dim=DIM, heads=HEADS, depth=2, seq_len=24, stem="", mixer=spec, ffn="mlp:width=16", position=position
    )
    made = LanguageModel(Config.of(**fields | given)).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=1 / math.sqrt(DIM))
    return made


def fitting(position: str, spec: str) -> str:
    """t5's table has a column a head."""
    heads = re.search(":heads=([0-9]+)", spec)
    return f"t5:heads={heads[1]}" if position == "t5" and heads else position


every_position = pytest.mark.parametrize("position", POSITIONS)
LENGTHS = [[5, 1, 2, 7], [1, 8, 4, 2]]


@each_mixer
@every_position
@torch.no_grad()
def test_packed_documents_equal_each_alone(spec, position):
    made = model(spec, fitting(position, spec))
    tokens = torch.randint(VOCAB, (2, 15), generator=torch.Generator().manual_seed(4))
    documents = torch.stack([torch.repeat_interleave(torch.tensor([3, 9, 4, 5]), torch.tensor(row)) for row in LENGTHS])
    logits = made(tokens, documents=documents)
    for row, lengths in enumerate(LENGTHS):
        parts = [made(part[None])[0] for part in tokens[row].split(lengths)]
        torch.testing.assert_close(logits[row], torch.cat(parts), **tolerance(torch.float64))
    if any(mixes(sublayer.layer) for sublayer in made.stack if sublayer.is_mixer):
        assert (logits - made(tokens)).abs().max() > 1e-3  # without documents it is another matter


@each_mixer
@every_position
@torch.no_grad()
def test_a_model_decodes_what_it_scores(spec, position):
    made = model(spec, fitting(position, spec), softcap=2.0)
    tokens = torch.randint(VOCAB, (2, 15), generator=torch.Generator().manual_seed(5))
    whole = made(tokens)
    for lengths in ([15], [1] * 15, [6, 1, 1, 7]):
        state = made.init_state(2, 15)
        parts = [made(part, state=state) for part in tokens.split(lengths, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, **tolerance(torch.float64))
        assert state.length == 15 and state.bytes() == sum(s.bytes() for s in state.sublayers if s is not None)
    assert torch.equal(made(tokens, last=True), whole[:, -1:]) or (made(tokens, last=True) - whole[:, -1:]).abs().max() < 1e-10


def test_documents_and_a_state_together_are_refused():
    made = model("gqa", "rope")
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="^documents: "):
        made(tokens, documents=tokens, state=made.init_state(1, 4))


def test_more_tokens_than_positions():
    made, tokens = model("gqa", "learned"), torch.zeros(1, 25, dtype=torch.int64)
    with pytest.raises(ValueError, match="^tokens: 25 positions, but learned ends at 24$"):
        made(tokens)
