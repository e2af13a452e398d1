import numpy as np
import torch

from nn.context import Context
from nn.recurrent import LSTM, LSTMCells


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_against_the_equations():
    torch.manual_seed(0)
    B, T, C, W = 2, 6, 3, 4
    cells = LSTMCells(C, W).double()
    x = torch.randn(B, T, C, dtype=torch.float64)
    begin = cells.init_state(B, dtype=torch.float64)
    begin.h.normal_()
    begin.c.normal_()
    y, last = cells(x, begin)
    weights = (p.detach().numpy() for p in (cells.input.weight, cells.recur.weight, cells.input.bias))
    (Wi, Wf, Wg, Wo), (Ui, Uf, Ug, Uo), (bi, bf, bg, bo) = (np.split(w, 4) for w in weights)
    for row in range(B):
        h, c = begin.h[row].numpy(), begin.c[row].numpy()
        for t in range(T):
            x_t = x[row, t].numpy()
            i, f, o = (sigmoid(W @ x_t + U @ h + b) for W, U, b in ((Wi, Ui, bi), (Wf, Uf, bf), (Wo, Uo, bo)))
            c = f * c + i * np.tanh(Wg @ x_t + Ug @ h + bg)
            h = o * np.tanh(c)
            np.testing.assert_allclose(y[row, t].detach(), h, rtol=1e-12)
        np.testing.assert_allclose(last.c[row].detach(), c, rtol=1e-12)


def test_against_pytorchs():
    torch.manual_seed(0)
    cells, theirs = LSTMCells(5, 7).double(), torch.nn.LSTM(5, 7, batch_first=True).double()
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(cells.input.weight)
        theirs.weight_hh_l0.copy_(cells.recur.weight)
        theirs.bias_ih_l0.copy_(cells.input.bias)
        theirs.bias_hh_l0.zero_()
    x = torch.randn(3, 9, 5, dtype=torch.float64, requires_grad=True)
    ours, wanted = cells(x, cells.init_state(3, dtype=torch.float64))[0], theirs(x)[0]
    torch.testing.assert_close(ours, wanted)
    dy = torch.randn_like(ours)
    found = torch.autograd.grad(ours, [x, cells.recur.weight, cells.input.weight], dy)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, [x, theirs.weight_hh_l0, theirs.weight_ih_l0], dy))


def test_the_state_that_comes_in_belongs_to_the_first_document():
    torch.manual_seed(0)
    mixer = LSTM(4, width=3).double()
    torch.nn.init.normal_(mixer.out.weight)
    x = torch.randn(1, 5, 4, dtype=torch.float64)
    documents = torch.tensor([[7, 7, 8, 8, 8]])
    state = mixer.init_state(1, 5, dtype=torch.float64)
    state.h.normal_()
    state.c.normal_()
    alone = mixer.init_state(1, 5, dtype=torch.float64)
    alone.h.copy_(state.h)
    alone.c.copy_(state.c)
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    y = mixer(x, Context(tokens, torch.arange(5), documents, state=state))
    torch.testing.assert_close(y[:, :2], mixer(x[:, :2], Context(tokens[:, :2], torch.arange(2), state=alone)))
    torch.testing.assert_close(y[:, 2:], mixer(x[:, 2:], Context(tokens[:, 2:], torch.arange(3))))


def test_forget_gates_begin_open():
    bias = LSTM(4, width=3).cells.input.bias.detach()
    assert bias.tolist() == [0] * 3 + [1] * 3 + [0] * 6
