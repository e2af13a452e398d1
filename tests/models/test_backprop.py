"""Every strategy gives the gradients of a plain backward pass, keeps what it says, and leaves nothing else different."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import train
from models import Config, LanguageModel
from models.auxiliary import after_step
from models.backprop import BACKPROPS, backprop
from models.backprop.carry import Borders, Carry, Keys, carry_of
from models.checkpoint import checkpoints, read_tensors
from models.learn_only import learn_only
from models.live_bytes import LiveBytes
from models.log import read as read_log
from models.stack import FFNS, MIXERS
from nn.adapt import ADAPTERS
from nn.context import Context
from nn.norm import NORMS
from nn.spec import build
from tests.models.drawn import drawn

ROOT = Path(__file__).parents[2]
OTHERS = [name for name in BACKPROPS if name != "plain"]
RECURRENCES = {"s4d", "mamba", "mamba2", "discrete_mamba2", "linear", "retention", "lightning", "cosformer2", "gla", "hgrn2",
               "delta", "gated_delta", "atlas", "lstm", "longconv"}  # fmt: skip
STACKS = [
    "gqa swiglu:width=24",
    "gqa:kv_heads=1:window=3 mlp",
    "gqa:window=3:global_tokens=2:sinks=true gqa:window=5:sinks=true:gate=true",
    "gqa:qk_norm=head:value_embedding=true gqa:qk_norm=all:bias=true:softcap=2",
    "mha mqa gqa:theta=100:scale=0.3",
    "mamba2:state=4 mlp mamba2:state=3:groups=2:head_dim=4 gqa glu",
    "lstm delta mamba:state=3",
    "gqa+mlp mamba2:state=4+swiglu:width=24",
    "ngram gqa moe:experts=3:width=10 gqa:kv_heads=1 moe:experts=4:top_k=1:capacity=1",
]  # fmt: skip


def passage(model: LanguageModel, *, length: int = 20, packed: bool = True, seed: int = 0) -> Tensor:
    """The loss of three texts after its backward pass; packed, documents end at different places."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(40, (3, length), generator=generator)
    documents = (torch.rand(3, length, generator=generator) < 0.2).long().cumsum(1) if packed else None
    torch.manual_seed(seed)  # of routers that draw
    loss = model(tokens, tokens.roll(-1, 1), documents=documents)
    loss.backward()
    return loss.detach()


def assert_same(ours: LanguageModel, plain: LanguageModel) -> None:
    """Gradients within 1e-10 of the largest; buffers and what modules count, exactly."""
    largest = max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None)
    for (name, one), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or (one.grad - other.grad).abs().max() <= 1e-10 * largest, name
    for (name, one), other in zip(ours.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0, msg=name)
    for one, other in zip(ours.modules(), plain.modules(), strict=True):
        assert vars(one).keys() == vars(other).keys() and getattr(one, "auxiliary", None) is None
        assert getattr(one, "taken", None) is None
        for owner, counts in (("self", "counts"), ("balance_loss", "buffer")):
            a, b = (
                getattr(module if owner == "self" else getattr(module, owner, None), counts, None) for module in (one, other)
            )
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), (type(one), counts)


def compare(spec: str, *, length: int = 20, packed: bool = True, steps: int = 1, **options) -> None:
    ours, plain = drawn(backprop=spec, **options), drawn(**options)
    for step in range(steps):
        losses = [passage(model, length=length, packed=packed, seed=step) for model in (ours, plain)]
        torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    assert_same(ours, plain)


@given(
    st.sampled_from(["checkpoint", "selective", *["stream"] * 4]), st.sampled_from(STACKS), st.integers(1, 23),
    st.integers(1, 30), st.booleans(), st.sampled_from(["pre", "scaled", "sandwich", "output", "post", "deepnorm"]),
    st.sampled_from(["rope", "none", "alibi", "learned", "t5"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_gradients_are_those_of_a_plain_backward_pass(name, stack, length, chunks, packed, place, position):
    spec = f"stream:chunks={chunks}" if name == "stream" else name
    position = "rope" if "theta" in stack else position
    compare(spec, stack=stack, length=length, packed=packed, norm_place=place, position=position)


@pytest.mark.parametrize("packed", [False, True])
def test_every_mixer_and_layer_that_is_cut_into_chunks(packed):
    for spec in (*MIXERS, *FFNS):
        position = "relative" if spec == "deberta" else "rope"
        if spec != "lolcats" and kind(drawn(stack=spec, position=position)):
            compare("stream:chunks=6", packed=packed, stack=spec, position=position)


def test_norms_and_their_statistics():
    for norm in NORMS:
        for spec in OTHERS:
            compare(spec, stack="gqa mlp", norm=norm, steps=2)


@pytest.mark.parametrize("spec", OTHERS)
@pytest.mark.parametrize("router", [
    "noisy/importance=0.1/load=0.1", "rl:scope=buffer", "recurrent/hidden=8:scope=buffer", "bias", "topk/jitter=0.1",
])  # fmt: skip
def test_what_routers_leave_behind_is_left_once(spec, router):
    """Losses, counts of a step, and what one layer tells the next, over two parts of a step, with noise."""
    stack = f"(gqa moe:experts=4:width=10:router={router})*2"
    ours, plain = drawn(backprop=spec, stack=stack), drawn(stack=stack)
    for seed in range(3):
        for model in (ours, plain):
            if seed == 2:
                after_step(model)
            passage(model, seed=seed)
        assert_same(ours, plain)


def kind(model: LanguageModel, place: int = 0, **given) -> type[Carry] | None:
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    return carry_of(model.stack[place], Context(tokens, torch.arange(8), **given))


def test_what_is_cut_into_chunks_and_what_is_not():
    kinds = {name: kind(drawn(stack=name, position="relative" if name == "deberta" else "rope"))
             for name in (*MIXERS, *FFNS) if name != "lolcats"}  # fmt: skip
    expected = dict.fromkeys(kinds) | dict.fromkeys(RECURRENCES, Borders) | dict.fromkeys(("mha", "mqa", "gqa"), Keys)
    assert kinds == expected | dict.fromkeys(("mlp", "glu", "swiglu", "geglu", "sglu", "monarch"), Carry)
    for norm in NORMS:
        assert kind(drawn(norm=norm)) == (None if norm in ("powernorm", "unifiednorm", "fakenorm") else Keys)
    several = torch.zeros(1, 8, dtype=torch.int64)
    assert kind(drawn(stack="s4d"), documents=several) is None and kind(drawn(stack="mamba"), documents=several) is Borders
    assert kind(drawn(), causal=False) is None and kind(drawn(stack="mlp"), causal=False) is Carry
    assert kind(drawn(position="alibi")) is Keys and kind(drawn(position="t5")) is None
    assert kind(drawn(stack="gqa+mlp")) is Keys and kind(drawn(stack="mlp+glu")) is Carry
    assert kind(drawn(stack="gqa+moe")) is None


def test_a_replaced_branch_and_watched_layers_are_run_whole():
    ours, plain, seen = drawn(backprop="stream:chunks=6", stack="gqa mlp gqa"), drawn(stack="gqa mlp gqa"), []
    for model in (ours, plain):
        model.stack[0].branch = lambda x, context, layer=model.stack[0].layer: 2 * layer(x, context)
        model.stack[2].layer.attend = lambda q, k, v, context: v.cumsum(2)
    ours.stack[1].layer.register_forward_pre_hook(lambda layer, given: seen.append(tuple(given[0].shape)))
    passage(ours), passage(plain)
    assert_same(ours, plain)
    assert seen == [(3, 20, 16)] * 2  # forward, and again backward
    assert "forward" not in vars(ours.stack[0])


@pytest.mark.parametrize("spec", [*OTHERS, "stream:chunks=3"])
def test_frozen_parameters_and_adapters(spec):
    for only in ("*.layer.query.*", "embedding.*", "*.layer.key.*,*.norm.*", "stack.1.*"):
        ours, plain = drawn(backprop=spec), drawn()
        for model in (ours, plain):
            learn_only(model, only)
            passage(model)
        assert_same(ours, plain)
    ours, plain = drawn(backprop=spec, stack="gqa mlp mamba2:state=4"), drawn(stack="gqa mlp mamba2:state=4")
    for model in (ours, plain):
        build("lora:rank=2:targets=query+up+out", ADAPTERS, "adapter", model, generator=torch.Generator().manual_seed(0))
        for layer in model.stack.modules():
            if hasattr(layer, "adapter") and layer.adapter is not None:
                nn.init.normal_(layer.adapter.B.weight, generator=torch.Generator().manual_seed(1))
        model.double()
        passage(model)
    assert_same(ours, plain)


@pytest.mark.parametrize("stack", ["gqa:qk_norm=head mlp", "mamba2:state=4 swiglu", "gqa moe:experts=3"])
def test_what_is_run_again_is_run_under_the_same_autocast(stack):
    """Bit for bit what a plain backward pass gives; chunks differ by the rounding of their sums."""
    grads = {}
    for spec in ("plain", "checkpoint", "selective", "stream:chunks=1", "stream:chunks=4"):
        model = drawn(backprop=spec, stack=stack).float()
        tokens = torch.randint(40, (3, 20), generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, tokens.roll(-1, 1))
        loss.backward()
        grads[spec] = [p.grad for p in model.parameters()]
        exact = drawn(stack=stack)
        exact(tokens, tokens.roll(-1, 1)).backward()
    for spec in ("checkpoint", "selective", "stream:chunks=1"):
        assert all(torch.equal(a, b) for a, b in zip(grads[spec], grads["plain"], strict=True)), spec
    truth = [p.grad for p in exact.parameters()]
    errors = [sum((a - b).square().sum() for a, b in zip(grads[spec], truth, strict=True)) for spec in grads]
    assert 0 < errors[-1] < 1.5 * errors[0]


def test_only_a_pass_that_learns_is_changed():
    """Without gradients, and with a decoding state, sublayers are called as they are."""
    model, tokens = drawn(backprop="stream:chunks=6"), torch.randint(40, (1, 12), generator=torch.Generator().manual_seed(0))
    calls = []
    for sublayer in model.stack:
        sublayer.register_forward_hook(lambda sublayer, given, y: calls.append((y.grad_fn is not None, y.shape[1])))
    whole = model(tokens)
    assert calls == [(True, 12)] * 4
    state = model.init_state(1, 12)
    parts = [model(part, state=state) for part in tokens.split(5, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), whole)
        assert not model(tokens).requires_grad


def held(spec: str, layer: str, *, length: int = 1024, dim: int = 32) -> tuple[int, int]:
    """Bytes that a sublayer keeps for its backward pass, and the most alive until that is over, as LiveBytes counts."""
    model = LanguageModel(Config.of(vocab_size=8, dim=dim, heads=1, stack=layer, stem="", norm="rmsnorm", seq_len=length))
    x = torch.randn(1, length, dim, requires_grad=True)
    context = Context(torch.zeros(1, length, dtype=torch.int64), torch.arange(length))
    with LiveBytes() as live:
        y = backprop(spec)(model.stack[0], x.clone(), context)
        kept, live.peak = live.now, 0
        y.backward(y.detach())
    return kept, live.peak


@pytest.mark.parametrize("layer", ["mlp", "swiglu", "gqa:heads=4", "mamba2:state=16"])
def test_bytes_that_are_kept(layer):
    """In units of the stream: its input and output are two. Linear layers: their products beside it; plain: all."""
    unit = 1024 * 32 * 4
    kept = {spec: held(spec, layer)[0] / unit for spec in ("plain", "checkpoint", "selective", "stream")}
    assert kept["stream"] < kept["checkpoint"] + (0.7 if layer.startswith("mamba") else 0.1) < 2.8, kept  # and tables
    assert kept["checkpoint"] + 3 < kept["selective"] < kept["plain"] - 1, kept
    if layer == "mlp":
        assert abs(kept["selective"] - (2 + 4 + 1)) < 0.1 and abs(kept["plain"] - (2 + 1 + 4 + 4)) < 0.1, kept


@pytest.mark.parametrize("layer", ["mlp", "swiglu", "mamba2:state=4:head_dim=32"])
def test_what_is_alive_at_once_falls_with_the_chunks(layer):
    """Peaks are a + b / chunks: what is held for the whole sequence, and what a chunk takes."""
    unit, chunks = 4096 * 32 * 4, [2, 4, 8, 16]
    peaks = [held(f"stream:chunks={n}", layer, length=4096)[1] / unit for n in chunks]
    fixed = 2 * peaks[1] - peaks[0]  # a, by the first two
    assert fixed < 4 and peaks[0] - fixed > 6, peaks
    for n, peak in zip(chunks, peaks, strict=True):
        assert abs(peak - fixed - 2 * (peaks[0] - fixed) / n) < 0.05 * peaks[0], (peaks, fixed)
    assert peaks[-1] < 0.4 * held("checkpoint", layer, length=4096)[1] / unit


def test_a_window_bounds_what_attention_holds():
    """Keys, values and their gradients stay, and (on a CPU) the scores of 128 queries; a chunk sees what its window reaches."""
    unit = 2048 * 128 * 4
    peaks = [held(f"stream:chunks={n}", "gqa:heads=1:window=128", length=2048, dim=128)[1] / unit for n in (2, 4, 8, 16)]
    assert all(b < a for a, b in zip(peaks, peaks[1:], strict=False)) and peaks[-1] < 0.8 * peaks[0], peaks


def test_data_parallel_processes_equal_one():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = dict(cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=300)
    done = subprocess.run([*command, "-m", "tests.models.backprop_processes"], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["checkpoint fsdp", "selective ddp", "stream:chunks=3 ddp", "stream:chunks=3 fsdp"]


def test_a_run_resumes_bit_for_bit_and_is_that_of_a_plain_one(tmp_path, monkeypatch):
    monkeypatch.setenv("ROSETTA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("".join(f"{a} times {b} is {a * b}.\n" for a in range(40) for b in range(40)))
    flags = "--tokenizer byte --dim 32 --heads 2 --seq-len 32 --batch-size 4 --eval-every 0 --sample 8 --dtype float32 --packed"
    flags = [*flags.split(), "--stack", "mamba2:state=8 mlp gqa swiglu", "--data", str(tmp_path / "text.txt")]
    for name, spec, steps in (("plain", "plain", 8), ("whole", "stream:chunks=3", 8), ("half", "stream:chunks=3", 4)):
        out = str(tmp_path / name)
        given = ["--backprop", spec, "--steps", str(steps), "--schedule", "linear:warmup=0:floor=1", "--out", out]
        assert train.main([*flags, *given]) == 0
    assert train.main(["--resume", str(tmp_path / "half"), "--steps", "8"]) == 0
    ends = [read_tensors(checkpoints(tmp_path / name)[-1] / "model.safetensors") for name in ("whole", "half")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    losses = [[record["loss"] for record in read_log(tmp_path / name / "log.jsonl") if "loss" in record]
              for name in ("plain", "whole", "half")]  # fmt: skip
    assert losses[1] == losses[2] and len(losses[0]) == 8 and losses[0][-1] < losses[0][0] - 0.1
    assert losses[0] != losses[1] and max(abs(a - b) for a, b in zip(*losses[:2], strict=True)) < 1e-4


def test_a_spec_that_names_none_is_one_line(capsys):
    for spec, message in (
        ("strem", "unknown backprop 'strem' (did you mean 'stream'?); there are: plain, checkpoint, selective, stream"),
        ("stream:chunks=0", "chunks: 0 is too small; at least 1"),
        ("stream:chunk=2", "backprop 'stream' has no option 'chunk' (did you mean 'chunks'?); it is stream:chunks=8"),
    ):
        assert train.main(["--backprop", spec, "--steps", "1", "--data", "task:induction:length=16"]) == 2
        assert capsys.readouterr().err == f"train.py: {message}\n"
