"""Plans: their sums are the model's, their formulas the published ones, their predictions ordered as they must be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import Config, LanguageModel
from models.describe import activation_bytes, describe, forward_flops, kept_bytes, main
from models.hardware import HARDWARE, predict, rate_of, seconds
from models.parts import parts_of
from models.plan import Part, Run, Stage, all_gather, all_reduce, all_to_all, model_state_bytes, pass_round, plan
from nn.parallel.mesh import parse_mesh

TINY = dict(vocab_size=31, dim=32, heads=4, depth=4, seq_len=64)
MODELS = {
    "default": dict(),
    "llama": dict(model="llama-1m"),
    "tied": dict(model="gpt2", init="gpt2"),
    "experts": dict(mixer="gqa", ffn="moe:experts=4:top_k=2:width=24:shared=1,swiglu"),
    "hybrid": dict(mixer="mamba2:state=8:head_dim=16,gqa:kv_heads=2", ffn="mlp", stem=""),
    "side by side": dict(stack="(gqa+mlp)*3"),
    "many": dict(mixer="mla,tpa,retention,mamba", stem="ngram"),
}
each = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)


def make(options, mesh="", **words) -> tuple[list[Part], Run]:
    config, sizes = Config.of(**TINY | options), parse_mesh(mesh)
    return parts_of(config, sizes), Run(sizes, config.dim, config.seq_len, **words)


def numel(config: Config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in LanguageModel(config).parameters())


def test_zero_reproduces_its_published_table():
    """Rajbhandari et al. 2019, figure 1: 7.5 billion parameters on 64 ranks."""
    gigabytes = [sum(model_state_bytes(7.5e9, 64, stage).values()) / 1e9 for stage in range(4)]
    assert [round(size, 1) for size in gigabytes] == [120.0, 31.4, 16.6, 1.9]
    for stage, expected in enumerate((16, 4 + 12 / 8, 2 + 14 / 8, 16 / 8)):
        assert sum(model_state_bytes(1.0, 8, stage).values()) == pytest.approx(expected)
    with pytest.raises(ValueError, match="^zero: a stage from 0 to 3, not 4$"):
        model_state_bytes(1, 1, 4)


@pytest.mark.parametrize("zero, traffic", [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_zero_sends_what_it_says(zero, traffic):
    """2 P a step, and 3 P with shared parameters (section 7), but for the part that stays: (n - 1) / n of it."""
    parts, run = make({}, "dp=8", zero=zero)
    (stage,) = plan(parts, run)
    parameters = sum(part.parameters for part in parts)
    assert sum(stage.sent.values()) == pytest.approx(traffic * 2 * parameters * 7 / 8)
    assert {name: stage.bytes[name] for name in ("weights", "gradients", "optimizer")} == model_state_bytes(parameters, 8, zero)


def test_shards_send_weights_twice_and_gradients_once_a_micro_batch():
    """3 P a micro-batch, less what the ends, which stay gathered between the passes, save."""
    parts, run = make({}, "fsdp=4", micro_batches=3)
    ends, layers = parts[0].parameters + parts[-1].parameters, sum(part.parameters for part in parts[1:-1])
    assert plan(parts, run)[0].sent == {
        "fsdp all-gather": pytest.approx(3 * 2 * (2 * layers + ends) * 3 / 4),
        "fsdp reduce-scatter": pytest.approx(3 * 2 * (layers + ends) * 3 / 4),
    }
    parts, run = make({}, "dp=4", micro_batches=3)
    assert plan(parts, run)[0].sent == {"dp all-reduce": pytest.approx(3 * 2 * 2 * (layers + ends) * 3 / 4)}


def test_collectives():
    for n in (1, 2, 5):
        assert all_reduce(60.0, n) == pytest.approx(2 * all_gather(60.0, n))  # a reduce-scatter and an all-gather
        assert all_to_all(60.0 / n, n) == pytest.approx(all_gather(60.0, n) / n)
        assert pass_round(60.0 / n, n) == pytest.approx(all_gather(60.0, n))
    assert all_gather(60.0, 4) == 45


@each
def test_the_parts_are_the_model(options):
    config = Config.of(**TINY | options)
    with torch.device("meta"):
        model = LanguageModel(config)
    parts, run = make(options)
    assert sum(part.parameters for part in parts) == numel(config)
    assert sum(part.flops for part in parts) == forward_flops(model, 64)
    assert sum(part.kept for part in parts) == sum(kept_bytes(config, 64, torch.bfloat16))
    (stage,) = plan(parts, run._replace(rows=3))
    assert stage.sent == {}
    assert stage.bytes["activations"] == pytest.approx(3 * activation_bytes(config, 64, torch.bfloat16))
    assert sum(stage.bytes.values()) - stage.bytes["activations"] == 16 * numel(config)
    assert stage.flops == 3 * 3 * forward_flops(model, 64)


def test_kept_bytes_are_those_of_each_sublayer():
    """A stack of two sorts of sublayers keeps for each as much as wherever else it stands."""
    config = Config.of(**TINY, mixer="gqa", ffn="swiglu:width=80", stem="", norm="rmsnorm")
    *layers, rest = kept_bytes(config, 64, torch.bfloat16)
    assert len(layers) == 8 and layers[1:-1:2] == layers[1:2] * 3 and layers[2::2] == layers[2:3] * 3
    assert layers[1] >= 2 * 64 * (2 * 32 + 3 * 80)  # x, its norm, gate, up and their product, in bfloat16
    assert rest >= 2 * 64 * 32


@pytest.mark.parametrize("options, mesh, copies", [
    ({}, "fsdp=4", 1), ({}, "dp=2,fsdp=2", 2), ({}, "fsdp=2,ulysses=2", 1), ({}, "ring=4", 4), ({}, "fsdp=2,ring=2", 1),
    ({}, "pp=2,dp=2", 2), ({}, "pp=2,fsdp=2", 1), (dict(model="gpt2", init="gpt2"), "pp=4", 1),
    (dict(mixer="gqa", ffn="moe:experts=4:top_k=2:width=24"), "ep=4", 4),
])  # fmt: skip
def test_all_ranks_together_hold_the_model(options, mesh, copies):
    """Every number once a copy; experts once in all; a tied head is on the first and on the last stage."""
    parts, run = make(options, mesh)
    stages = plan(parts, run)
    ranks = math.prod(run.sizes.values()) // run.sizes["pp"]
    weights = sum(stage.bytes["weights"] for stage in stages) * ranks / 2
    config = Config.of(**TINY | options)
    twice = config.vocab_size * config.dim if config.tie else 0
    experts = sum(part.experts for part in parts)
    assert weights == pytest.approx((numel(config) - experts + twice) * copies + experts * copies / run.sizes["ep"])


@pytest.mark.parametrize("mesh", ["ep=4", "ep=2,dp=2", "dp=4", "fsdp=2,dp=2"])
def test_nothing_is_held_twice_at_stage_3(mesh):
    """Of copies that share the parameters out, each number is on one rank: experts on one of those that have them."""
    options = dict(mixer="gqa", ffn="moe:experts=4:top_k=2:width=24")
    parts, run = make(options, mesh, zero=3)
    held = plan(parts, run)[0].bytes
    states = held["weights"] + held["gradients"] + held["optimizer"]
    assert 4 * states == pytest.approx(16 * numel(Config.of(**TINY | options)))


@pytest.mark.parametrize("mesh, zero", [("", 0), ("dp=4", 1), ("fsdp=2,pp=3", 0)])
def test_offload_puts_the_optimizer_on_the_host(mesh, zero):
    """All else stays; of the 16 bytes a parameter the device keeps 4, and as many go down and up in a step of its share."""
    for here, there in zip(plan(*make({}, mesh, zero=zero)), plan(*make({}, mesh, zero=zero, offload=True)), strict=True):
        assert there.bytes == here.bytes | {"optimizer": 0} and here.host == {} and there.sent == here.sent
        assert there.host == {"optimizer": here.bytes["optimizer"], "down and up": here.bytes["optimizer"] / 3}
        assert here.moved - there.moved == pytest.approx(2 * here.bytes["optimizer"])


def test_offload_is_a_flag_of_the_plan(capsys):
    assert main(["--model", "llama-1m", "--mesh", "fsdp=2", "--offload"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("host: ")] == [["host:", "optimizer"], ["host:", "down"]]
    assert "optimizer                                    0 bytes a rank" in lines


def test_tensor_parallelism_holds_its_cuts():
    """By hand: heads and neurons are shared out, norms, embedding and head are not."""
    config = Config.of(**TINY, model="llama-1m", mixer="gqa:kv_heads=2", ffn="swiglu:width=48", tie=False)
    sizes = parse_mesh("tp=2")
    parts = parts_of(config, sizes)
    attention, ffn = 32 * 32 + 2 * 16 * 32 + 32 * 32, 3 * 48 * 32
    assert [part.cut for part in parts] == [0, *[attention, ffn] * 4, 0]
    (stage,) = plan(parts, Run(sizes, 32, 64))
    assert stage.bytes["weights"] == 2 * (4 * (attention + ffn) / 2 + 9 * 32 + 2 * 31 * 32)
    row = 2 * 64 * 32
    assert stage.sent["tp all-gather"] == stage.sent["tp reduce-scatter"] == 8 * 2 * row / 2
    assert stage.sent["tp all-reduce"] == 2 * (9 * 32 + 2 * 31 * 32)
    kept = activation_bytes(config, 64, torch.bfloat16)
    assert stage.bytes["activations"] == kept / 2 + 8 * row / 2  # and the rows gathered


def test_buffers():
    """Two sublayers gathered and the gradient of one; in a pipeline of all; with tp two rows of the stream."""
    parts, run = make({}, "fsdp=2")
    ends, largest = parts[0].parameters + parts[-1].parameters, max(part.parameters for part in parts[1:-1])
    assert plan(parts, run)[0].bytes["buffers"] == 2 * (2 * largest + ends) + 2 * (largest + ends)
    parts, run = make({}, "fsdp=2,pp=3")
    middle = [part.parameters for part in parts[4:7]]
    assert plan(parts, run)[1].bytes["buffers"] == 2 * sum(middle) + 2 * sum(middle)
    assert plan(*make({}, "tp=2", rows=3))[0].bytes["buffers"] == 2 * 3 * 64 * 32 * 2
    assert plan(*make({}, "dp=2"))[0].bytes["buffers"] == 0


def test_layers_that_cannot_be_cut_are_whole():
    parts, run = make(dict(mixer="mla", ffn="swiglu"), "tp=2")
    mixers = parts[2:-1:2]
    assert {(part.cut, part.shared) for part in mixers} == {(0, False)}
    assert all(part.shared and part.cut for part in parts[3:-1:2])
    (stage,), (alone,) = plan(parts, run), plan(*make(dict(mixer="mla", ffn="swiglu")))
    assert alone.flops / 2 < stage.flops < alone.flops


def test_a_pipeline_shares_out_the_sublayers():
    parts, run = make({}, "pp=3", micro_batches=8)
    stages = plan(parts, run)
    layers, states = parts[1:-1], [stage.bytes["weights"] / 2 for stage in stages]
    assert len(layers) == 9
    assert states[1] == sum(part.parameters for part in layers[3:6])
    assert states[0] == parts[0].parameters + sum(part.parameters for part in layers[:3])
    assert stages[1].bytes["activations"] == pytest.approx(2 * sum(part.kept for part in layers[3:6]))  # min(m, p - rank)
    stream = 8 * 2 * 64 * 32
    assert [stage.sent["pp send"] for stage in stages] == [stream, 2 * stream, stream]
    with pytest.raises(ValueError, match="^mesh: pp=10 cannot share out 9 sublayers$"):
        plan(*make({}, "pp=10"))


def sent_of(mesh: str, name: str, tokens: int, options=dict(mixer="gqa:kv_heads=4", ffn="swiglu", stem="")) -> float:  # noqa: B006
    parts, run = make(options | dict(heads=16, dim=64, seq_len=tokens, depth=1), mesh)
    return plan(parts, run)[0].sent[name]


def test_ulysses_sends_as_much_when_ranks_and_tokens_grow_together():
    """4 T C / P numbers a layer and pass (Jacobs et al. 2023, section 3.2), of which 1 / P stays; the others grow with T."""
    whole = dict(mixer="gqa", ffn="swiglu", stem="")
    for ranks in (2, 4, 16):
        expected = 2 * 4 * 64 * 64 * 2 * (ranks - 1) / ranks  # passes, q k v and y, tokens a rank, width, bytes
        assert sent_of(f"ulysses={ranks}", "ulysses all-to-all", 64 * ranks, whole) == pytest.approx(expected)
        assert sent_of(f"ring={ranks}", "ring send", 64 * ranks, whole) == pytest.approx(4 * 2 * 64 * 64 * 2 * (ranks - 1))
        assert sent_of(f"tp={ranks}", "tp all-gather", 64 * ranks, whole) == pytest.approx(2 * 2 * 64 * 64 * 2 * (ranks - 1))
    for ranks, heads in ((4, 4), (8, 8)):  # of 4 key heads of width 4, each is sent to whoever needs it
        expected = 2 * 64 * 2 * 4 * (16 + heads) * 2 * (ranks - 1) / ranks
        assert sent_of(f"ulysses={ranks}", "ulysses all-to-all", 64 * ranks) == pytest.approx(expected)


def test_what_is_run_again_trades_work_for_memory():
    ways = {way: plan(*make({}, "fsdp=2", rows=4, backprop=way))[0] for way in ("plain", "selective", "checkpoint", "stream")}
    parts, _ = make({}, "fsdp=2")
    layers, inputs = parts[1:-1], 64 * 32 * 2
    most = max(part.kept - inputs for part in layers)
    expected = 4 * (9 * inputs + most + parts[-1].kept)
    assert ways["checkpoint"].bytes["activations"] == ways["stream"].bytes["activations"] == pytest.approx(expected)
    sizes = [ways[way].bytes["activations"] for way in ("checkpoint", "selective", "plain")]
    work = [ways[way].flops for way in ("plain", "selective", "checkpoint")]
    assert sizes == sorted(set(sizes)) and work == sorted(set(work))
    assert work[2] == pytest.approx(work[0] + 4 * sum(part.flops for part in layers))
    assert ways["checkpoint"].sent == ways["plain"].sent
    again, once = (plan(*make(dict(stem=""), "tp=2", backprop=way))[0].sent["tp all-gather"] for way in ("checkpoint", "plain"))
    assert again == 1.5 * once


def test_selective_keeps_the_products():
    config = Config.of(**TINY, mixer="gqa:kv_heads=2", ffn="swiglu:width=48", stem="")
    sizes = parse_mesh("")
    _, attention, ffn, *_ = parts_of(config, sizes)
    assert attention.products == 2 * 64 * (32 + 2 * 16 + 32) and ffn.products == 2 * 64 * (2 * 48 + 32)
    assert ffn.mixing == 0 and attention.mixing == 2 * 2 * 64 * 64 * 32


def utilisation(mesh: str, hardware: str = "h100", options=None, **words) -> float:
    big = dict(model="llama-1b", seq_len=2048, depth=2) | (options or {})
    config, sizes = Config.of(**big), parse_mesh(mesh)
    return predict(parts_of(config, sizes), Run(sizes, config.dim, config.seq_len, **words), HARDWARE[hardware])[1]


def test_predictions_are_ordered_as_they_must_be():
    assert 0 < utilisation("fsdp=8") < utilisation("fsdp=8", rows=4) < 1
    assert utilisation("fsdp=16") < utilisation("fsdp=8")  # over the network
    assert utilisation("tp=2") > utilisation("tp=4") > utilisation("tp=8")
    assert utilisation("tp=8", options=dict(heads=16, mixer="gqa:kv_heads=16")) > utilisation(
        "tp=16", options=dict(heads=16, mixer="gqa:kv_heads=16"))  # fmt: skip
    assert utilisation("pp=4", micro_batches=4) < utilisation("pp=4", micro_batches=16)
    assert utilisation("fsdp=8", backprop="checkpoint", rows=8) < utilisation("fsdp=8", rows=8)
    assert utilisation("fsdp=8") <= utilisation("fsdp=8", "h200")  # more memory bandwidth
    assert utilisation("fsdp=8", "a100", rows=4) > utilisation("fsdp=8", rows=4)  # slower products wait less


def test_the_time_of_a_step_by_hand():
    """One second of products, one of memory, one of tp's messages, 7 of the copies', and a bubble of 1 / 4."""
    h100, sizes = HARDWARE["h100"], parse_mesh("pp=2,dp=4,tp=2")
    stage = Stage({}, {"tp all-gather": h100.link, "dp all-reduce": 7 * h100.link}, h100.flops, h100.memory_rate)
    run = Run(sizes, 1, 1, micro_batches=4)
    assert seconds([stage], run, h100) == pytest.approx((1 + 1 + 1) * 5 / 4 + 7 - 2)
    assert seconds([stage._replace(flops=9 * h100.flops), stage], run, h100) == pytest.approx(11 * 5 / 4)


def test_an_axis_is_as_fast_as_its_longest_link():
    h100 = HARDWARE["h100"]
    sizes = parse_mesh("fsdp=4,ring=2,tp=4")
    assert [rate_of(axis, sizes, h100) for axis in ("tp", "ring", "fsdp")] == [h100.link, h100.link, h100.network]
    assert rate_of("dp", parse_mesh("ep=8,dp=2"), h100) == h100.network
    assert rate_of("pp", parse_mesh("pp=8"), h100) == h100.link


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_no_plan_is_better_than_the_hardware(data):
    sizes = {axis: data.draw(st.sampled_from([1, 2, 4])) for axis in ("pp", "dp", "fsdp", "ring", "ulysses", "tp")}
    words = dict(
        rows=data.draw(st.integers(1, 3)), micro_batches=data.draw(st.integers(1, 4)), zero=data.draw(st.integers(0, 3))
    )
    options = dict(
        heads=16, dim=64, seq_len=128, mixer="gqa,mamba2:state=8:head_dim=2", ffn="swiglu,moe:experts=4:width=16:top_k=2"
    )
    mesh = ",".join(f"{axis}={size}" for axis, size in sizes.items())
    parts, run = make(options, mesh, backprop=data.draw(st.sampled_from(["plain", "checkpoint", "selective"])), **words)
    for stage in plan(parts, run):
        assert min(stage.bytes.values()) >= 0 and all(size > 0 for size in stage.sent.values())
        assert {name.split()[0] for name in stage.sent} <= {axis for axis, size in run.sizes.items() if size > 1} | {
            "dp",
            "fsdp",
        }
    for hardware in HARDWARE.values():
        seconds, share = predict(parts, run, hardware)
        assert 0 < share < 1 and seconds > 0


def test_seventy_billion_parameters_are_planned_without_memory(capsys):
    assert main(["--model", "llama-70b", "--mesh", "fsdp=64,tp=8", "--seq-len", "8192", "--hardware", "h100"]) == 0
    plain, _, plan_lines = capsys.readouterr().out.partition("\n\nfsdp=64,tp=8: 512 ranks, a step of 64 x 8,192 tokens\n\n")
    assert "70,553,706,496" in plain
    numbers = {
        line[:28].strip(): float(line[28:].split()[0].strip("%").replace(",", "")) for line in plan_lines.split("\n") if line
    }
    cut, whole = 68_451_041_280, 2 * 128256 * 8192 + 161 * 8192
    assert numbers["weights"] == round(2 * (cut / 8 + whole) / 64)
    assert numbers["optimizer"] == 6 * numbers["weights"]
    assert numbers["tp all-gather"] == 160 * 2 * 2 * 8192 * 8192 * 7 / 8
    assert numbers["together"] == sum(numbers[name] for name in ("weights", "gradients", "optimizer", "activations", "buffers"))
    assert 0 < numbers["h100"] < 100 and "h200" not in plan_lines


def test_without_a_mesh_nothing_is_planned(capsys):
    for mesh in ([], ["--mesh", "dp=1"]):
        assert main(["--model", "llama-1m", *mesh]) == 0
        text = describe(Config.of(model="llama-1m"))
        printed = capsys.readouterr().out
        assert printed.startswith(text + "\n") and ("one rank: 1 ranks" in printed) == bool(mesh)
        assert (printed == text + "\n") == (not mesh)


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("--mesh tq=2", "mesh: there is no axis 'tq'"),
        ("--mesh tp=0", "mesh: 'tp=0' has no size"),
        ("--mesh tp=3", "mesh: tp=3 cannot share out 4 heads evenly"),
        ("--mesh pp=99", "mesh: pp=99 cannot share out 7 sublayers"),
        ("--mesh ulysses=8", "mesh: ulysses=8 cannot share out 4 heads of a rank evenly"),
        ("--mesh ring=3", "mesh: 256 tokens of a row cannot be shared out in 6 parts evenly"),
        ("--mesh ep=3 --ffn moe:experts=4", "mesh: ep=3 cannot share out 4 experts evenly"),
        ("--mesh ep=2,tp=2 --ffn moe:experts=4", "mesh: ep goes together with dp, ring, ulysses, not with tp=2"),
        ("--mesh dp=2 --zero 5", "zero: a stage from 0 to 3, not 5"),
        ("--mesh dp=2 --rows 0", "rows: at least 1, not 0"),
        ("--mesh dp=2 --micro-batches -1", "micro_batches: at least 1, not -1"),
    ],
)
def test_a_mistake_is_one_line(flags, complaint, capsys):
    assert main(flags.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"describe: {complaint}") and len(printed.err.splitlines()) == 1 and not printed.out
