"""The linear layer is PyTorch's, also when it decodes in half precision; inputs are cast once; residual outputs are marked."""

import torch
from torch import nn

from nn.linear import Linear, cast_once, decode_in_half, output_projection


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
