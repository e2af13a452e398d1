"""Feed-forward layers `(x, context) -> y`."""

from nn.ffn.mlp import MLP
from nn.ffn.swiglu import SwiGLU

FFNS = {
    "mlp": MLP,
    "swiglu": SwiGLU,
}
