"""What layers share: inputs are cast once where autocast would cast them often, and residual outputs are marked."""

import torch
from torch import nn

from nn.linear import cast_once, output_projection


def test_cast_once():
    x = torch.randn(3)
    assert cast_once(x) is x
    with torch.autocast("cpu", torch.bfloat16):
        assert cast_once(x).dtype == torch.bfloat16 and cast_once(x.to("meta")).device.type == "meta"


def test_outputs_are_marked():
    assert output_projection(3, 4).writes_residual and not hasattr(nn.Linear(3, 4), "writes_residual")
