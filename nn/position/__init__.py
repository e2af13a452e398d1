"""Position encodings: what is added to the embeddings, what turns queries and keys, and what is added to the scores."""

from nn.position.alibi import ALiBi
from nn.position.learned import LearnedPosition
from nn.position.none import NoPosition
from nn.position.relative import RelativePosition
from nn.position.rope import RoPE
from nn.position.sinusoidal import SinusoidalPosition
from nn.position.t5 import T5Bias

POSITIONS = {
    "none": NoPosition,
    "learned": LearnedPosition,
    "sinusoidal": SinusoidalPosition,
    "rope": RoPE,
    "alibi": ALiBi,
    "t5": T5Bias,
    "relative": RelativePosition,
}
