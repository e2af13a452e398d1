"""Training objectives."""

from nn.objective.next_token import next_token_loss

__all__ = ["next_token_loss"]
