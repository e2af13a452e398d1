"""Training objectives: what a model reads, and what it is to say."""

from nn.objective.masked import MaskedTokens
from nn.objective.next_token import NextToken, next_token_loss

__all__ = ["OBJECTIVES", "MaskedTokens", "NextToken", "next_token_loss"]
OBJECTIVES = {
    "next": NextToken,
    "masked": MaskedTokens,
}
