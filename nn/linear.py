from torch import nn


def output_projection(dim_in: int, dim_out: int, *, bias: bool = False) -> nn.Linear:
    """The linear layer with which a sublayer writes into the residual stream; initialisation treats it apart."""
    linear = nn.Linear(dim_in, dim_out, bias=bias)
    linear.writes_residual = True
    return linear
