"""Training objectives: what a model reads, and what it is to say."""

from nn.objective.masked import MaskedTokens
from nn.objective.next_token import IGNORED, NextToken, next_token_loss

__all__ = ["IGNORED", "OBJECTIVES", "MaskedTokens", "NextToken", "next_token_loss"]
OBJECTIVES = {
    "next": NextToken,
    "masked": MaskedTokens,
}
