import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """y = x W^T + b, as in PyTorch, which can keep a copy of W in half precision for decoding on a CPU.

    A step of decoding multiplies each weight with one number only, so its time is that of reading the weights: half the
    bytes, half the time. float16 keeps 11 bits of each (bfloat16 8), and PyTorch's CPU kernels are quicker with it; a row
    with a number above 65504 becomes infinite, which `Sampler` refuses.
    """

    halved: tuple[Tensor, Tensor | None] | None = None  # the copies of weight and bias

    def forward(self, x: Tensor) -> Tensor:
        if self.halved is None or x.numel() != self.in_features:
            return super().forward(x)
        return F.linear(x.half(), *self.halved).to(x.dtype)


def decode_in_half(model: nn.Module) -> None:
    """From now on single rows are multiplied in half precision. The copies do not follow later changes of the weights."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.halved = (module.weight.detach().half(), None if module.bias is None else module.bias.detach().half())


def output_projection(dim_in: int, dim_out: int, *, bias: bool = False) -> Linear:
    """The linear layer with which a sublayer writes into the residual stream; initialisation treats it apart."""
    linear = Linear(dim_in, dim_out, bias=bias)
    linear.writes_residual = True
    return linear


def cast_once(x: Tensor) -> Tensor:
    """x in the dtype of autocast, if that is on: for inputs of several linear layers, which would each cast them anew."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
