"""Feed-forward layers `(x, context) -> y`."""

from nn.ffn.glu import GLU, SGLU, GeGLU, SwiGLU
from nn.ffn.mlp import MLP
from nn.ffn.monarch import MonarchMLP

FFNS = {
    "mlp": MLP,
    "glu": GLU,
    "swiglu": SwiGLU,
    "geglu": GeGLU,
    "sglu": SGLU,
    "monarch": MonarchMLP,
}
