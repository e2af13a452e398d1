import torch
from torch import Tensor, nn


def output_projection(dim_in: int, dim_out: int, *, bias: bool = False) -> nn.Linear:
    """The linear layer with which a sublayer writes into the residual stream; initialisation treats it apart."""
    linear = nn.Linear(dim_in, dim_out, bias=bias)
    linear.writes_residual = True
    return linear


def cast_once(x: Tensor) -> Tensor:
    """x in the dtype of autocast, if that is on: for inputs of several linear layers, which would each cast them anew."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
