"""Feed-forward layers `(x, context) -> y`."""

from nn.ffn.glu import GLU, SGLU, GeGLU, SwiGLU
from nn.ffn.mlp import MLP

FFNS = {
    "mlp": MLP,
    "glu": GLU,
    "swiglu": SwiGLU,
    "geglu": GeGLU,
    "sglu": SGLU,
}
