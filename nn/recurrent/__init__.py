"""Recurrent networks: what a state at time t depends on is worked out from the state before, one step after the other."""

from nn.recurrent.lstm import LSTM, LSTMCells

__all__ = ["LSTM", "RECURRENT", "LSTMCells"]
RECURRENT = {
    "lstm": LSTM,
}
