"""Position encodings: what is added to the embeddings, and what turns queries and keys."""

from nn.position.learned import LearnedPosition
from nn.position.none import NoPosition
from nn.position.rope import RoPE
from nn.position.sinusoidal import SinusoidalPosition

POSITIONS = {
    "none": NoPosition,
    "learned": LearnedPosition,
    "sinusoidal": SinusoidalPosition,
    "rope": RoPE,
}
