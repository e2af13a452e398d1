"""The linear layer is PyTorch's, also when it decodes in half precision; inputs are cast once; residual outputs are marked."""

import torch
from torch import nn

from nn.attention import ATTENTION, GQA
from nn.context import Context
from nn.ffn import SwiGLU
from nn.linear import Linear, cast_once, decode_in_half, output_projection, project
from nn.position import RelativePosition
from nn.spec import build


def test_cast_once():
    x = torch.randn(3)
    assert cast_once(x) is x
    with torch.autocast("cpu", torch.bfloat16):
        assert cast_once(x).dtype == torch.bfloat16 and cast_once(x.to("meta")).device.type == "meta"


def test_outputs_are_marked():
    assert output_projection(3, 4).writes_residual and not hasattr(nn.Linear(3, 4), "writes_residual")


def test_single_rows_in_half_precision_are_close_and_batches_untouched():
    layer = Linear(64, 32)
    x = torch.randn(2, 1, 64)
    before, alone = layer(x), layer(x[:1])
    decode_in_half(nn.Sequential(layer))
    assert torch.equal(layer(x), before)
    half = layer(x[:1])
    assert half.dtype == torch.float32 and 0 < (half - alone).abs().max() < 2e-3
    assert torch.equal(half, nn.functional.linear(x[:1].half(), layer.weight.half(), layer.bias.half()).float())


def test_layers_of_one_input_are_one_product_in_half_precision():
    for model in (GQA(64, heads=4, kv_heads=2, bias=True), SwiGLU(64, width=48)):
        x, names = torch.randn(2, 1, 64), model.together
        layers = [getattr(model, name) for name in names]
        before = project(x, *layers)
        assert all(torch.equal(y, layer(x)) for y, layer in zip(before, layers, strict=True))
        decode_in_half(model)
        assert all(torch.equal(y, z) for y, z in zip(project(x, *layers), before, strict=True))  # two rows: untouched
        for y, layer, whole in zip(project(x[:1], *layers), layers, before, strict=True):
            assert y.shape == (1, 1, layer.out_features)
            torch.testing.assert_close(y, whole[:1], atol=2e-3, rtol=2e-3)
            assert not torch.equal(y, whole[:1])


def test_biases_of_some_layers_of_a_group():
    """Keys without a bias beside values that have one."""
    mixer = build("deberta:p2c=false", ATTENTION, "mixer", 16, heads=2, position=RelativePosition(16, span=4))
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    x, where = torch.randn(1, 1, 16), Context(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    with torch.no_grad():
        whole = mixer(x, where)
        decode_in_half(mixer)
        assert (mixer(x, where) - whole).norm() < 0.01 * whole.norm()
