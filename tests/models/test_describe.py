"""What models.describe predicts, counted on the real thing: parameters, FLOPs, state, activations."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import PRESETS, Config, LanguageModel
from models.describe import activation_bytes, active, describe, forward_flops, main, parameters, state_bytes, training_flops
from nn.norm import LayerNorm

TINY = dict(vocab_size=31, dim=16, heads=2, depth=2, seq_len=64)
STACKS = {
    "default": dict(),
    "gpt2": dict(model="gpt2"),
    "llama": dict(model="llama-1m", heads=4),
    "grouped, wide heads": dict(mixer="gqa:kv_heads=1:head_dim=12", ffn="swiglu:width=24"),
    "hybrid": dict(mixer="gqa:qk_norm=unit,mha:bias=true,none", ffn="mlp,none,swiglu", depth=6),
    "spelled": dict(stack="(gqa mlp)*2 mqa swiglu:bias=true mlp", tie=True),
    "post-norm": dict(norm_place="post", norm="layernorm", position="sinusoidal", softcap=3.0),
    "nothing": dict(stack="none"),
    "monarch": dict(ffn="monarch:width=48"),
    "sandwich": dict(norm_place="sandwich", norm="layernorm"),
    "bert": dict(model="gpt2", norm_place="post", embedding_norm="extra", head="transform", objective="masked", init="gpt2"),
    "modernbert": dict(
        norm="layernorm:bias=false", stem="", embedding_norm="first", ffn="geglu", head="transform:bias=false", tie=True,
        mixer="gqa,gqa:theta=30", objective="masked",
    ),
    "bias of words": dict(head="linear:decoder_bias=true", softcap=3.0),
}
each = pytest.mark.parametrize("options", STACKS.values(), ids=STACKS)


def make(options) -> LanguageModel:
    return LanguageModel(Config.of(**TINY | options))


def counter() -> FlopCounterMode:
    """PyTorch's counter, which does not know the product that is added in place."""

    def flops(total, a, b, **_) -> int:  # of shapes
        return 2 * math.prod(a) * b[-1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: flops})


@each
@pytest.mark.parametrize("seq_len", [2, 7, 64])
def test_flops(options, seq_len):
    """The forward pass costs what was predicted, and training three times that, where words have no bias.

    In bfloat16, because PyTorch's counter does not know the fused kernel that float32 takes on a CPU.
    """
    model, tokens = make(options).bfloat16(), torch.zeros(1, seq_len, dtype=torch.int64)
    with counter() as forward, torch.no_grad():
        model(tokens)
    with counter() as training:
        model(tokens, tokens).backward()
    assert forward.get_total_flops() == forward_flops(model, seq_len)
    assert training.get_total_flops() == training_flops(model, seq_len)
    assert (training_flops(model, seq_len) == 3 * forward_flops(model, seq_len)) == (model.head.bias is None)


def test_flops_at_256():
    """Two blocks of queries: the first is not multiplied with the second's keys, a quarter of the square."""
    model, tokens = make({}).bfloat16(), torch.zeros(2, 256, dtype=torch.int64)
    with counter() as counted, torch.no_grad():
        model(tokens, tokens)
    mixing = sum(s.layer.mixing_flops(256, 256) for s in model.stack if s.is_mixer)
    assert counted.get_total_flops() == 2 * (forward_flops(model, 256) - mixing // 4)


@each
def test_parameters(options):
    model = make(options)
    counts = parameters(model)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    own = [] if model.config.tie else [model.head.weight]
    own += [p for name, p in model.named_parameters() if name == "head.bias" or name.startswith("transform.dense")]
    assert counts["embedding"] == 31 * 16 and counts["head"] == sum(p.numel() for p in own)
    norms = [p for name, p in model.named_parameters() if "norm." in name and not name.startswith("position")]
    assert counts["norms"] == sum(p.numel() for p in norms)
    mixers = sum(p.numel() for s in model.stack if s.is_mixer for p in s.layer.parameters())
    assert mixers == sum(count for part, count in counts.items() if part.startswith("mixers"))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes(options, dtype):
    model = make(options)
    assert state_bytes(model, 20, dtype) == model.init_state(1, 20, dtype=dtype).bytes()
    assert 3 * state_bytes(model, 20, dtype) == model.init_state(3, 20, dtype=dtype).bytes()


def kept_for_backward(model: LanguageModel, tokens: torch.Tensor) -> int:
    """Bytes of what a real forward pass on the CPU keeps, each storage once, parameters not counted."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, tokens)
    return sum(storage.nbytes() for storage in kept.values())


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_bytes(options, dtype):
    config = Config.of(**TINY | options)
    model = LanguageModel(config).to(dtype)
    sizes = [activation_bytes(config, length, dtype) for length in (16, 32, 64)]
    counted = [kept_for_backward(model, torch.zeros(1, length, dtype=torch.int64)) for length in (16, 32, 64)]
    norms = sum(p.numel() for module in model.modules() if isinstance(module, LayerNorm) for p in module.parameters())
    copies = norms * 4 if dtype == torch.bfloat16 else 0  # on a CPU: gain and bias in float32
    assert counted == [size + copies for size in sizes]
    assert 0 < sizes[0] < sizes[1] < sizes[2] <= 16 * sizes[0]  # of order T to T^2


@pytest.mark.parametrize("preset", PRESETS)
def test_the_table(preset, capsys):
    """Printed for every preset in a moment, 8 billion parameters too."""
    assert main(["--model", preset, "--seq-len", "64"]) == 0
    text = capsys.readouterr().out
    with torch.device("meta"):
        model = LanguageModel(Config.of(model=preset, seq_len=64))
    for number in (
        sum(p.numel() for p in model.parameters()),
        active(model),
        forward_flops(model, 64) // 64,
        state_bytes(model, 64, torch.bfloat16),
    ):
        assert f"{number:,}" in text


def test_the_table_says_what_it_counts():
    text = describe(Config.of(model="gpt2"))
    for words in (
        "124,439,808",
        "forward FLOPs a token",
        "training FLOPs a token",
        "decoding state",
        "activations for backward",
    ):
        assert words in text


def test_a_mistake_is_one_line(capsys):
    assert main(["--mixer", "gqaa"]) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith("describe: unknown mixer 'gqaa' (did you mean 'gqa'?); there are: mha, ") and len(err.splitlines()) == 1
    )
