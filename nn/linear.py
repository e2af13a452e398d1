import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """y = x W^T + b, as in PyTorch, which can keep a copy of W in half precision for decoding on a CPU.

    A step of decoding multiplies each weight with one number only, so its time is that of reading the weights: half the
    bytes, half the time. float16 keeps 11 bits of each (bfloat16 8), and PyTorch's CPU kernels are quicker with it; a row
    with a number above 65504 becomes infinite, which `Sampler` refuses. What an adapter (nn/adapt) adds to y is in the copy.
    """

    parts: tuple[int, ...] = ()  # the outputs of each of several matrices, where this layer is a few fused into one
    halved: tuple[Tensor, Tensor | None] | None = None  # copies of weight and bias: of this layer, or of it and others
    sizes: tuple[int, ...] = ()  # the outputs of each of those layers

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_module("adapter", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.halved is None or x.numel() != self.in_features:
            y = super().forward(x)
            return y if self.adapter is None else y + self.adapter(x)
        return F.linear(x.half(), *self.halved).to(x.dtype)

    @property
    def effective_weight(self) -> Tensor:
        """(out, in): what x is multiplied by, W and what its adapter adds; for those who need the matrix itself."""
        return self.weight if self.adapter is None else self.weight + self.adapter.matrix()


def project(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """Several layers of one input: it is cast once, and single rows in half precision are one product."""
    first = layers[0]
    if first.halved is not None and x.numel() == first.in_features:
        return first(x).split(first.sizes, dim=-1)
    x = cast_once(x)
    return tuple(layer(x) for layer in layers)


def decode_in_half(model: nn.Module) -> None:
    """From now on single rows are multiplied in half precision. The copies do not follow later changes of the weights.

    A module says in its attribute `together` which of its layers it gives to `project`.
    """
    for module in model.modules():
        names = getattr(module, "together", ())
        groups = [[getattr(module, name) for name in names]] if names else []
        groups += [[child] for name, child in module.named_children() if isinstance(child, Linear) and name not in names]
        for layers in groups:
            weight = torch.cat([layer.effective_weight.detach().half() for layer in layers])
            biases = [weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in layers]
            bias = None if all(layer.bias is None for layer in layers) else torch.cat(biases).half()
            layers[0].halved, layers[0].sizes = (weight, bias), tuple(layer.out_features for layer in layers)


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
