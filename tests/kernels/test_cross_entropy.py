"""Cross-entropy: what its SPEC does not say."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels.cross_entropy import SLICE, cross_entropy, slices
from kernels.launch import use
from tests.kernels.contract import interpreted

PATHS = ["torch", pytest.param("triton", marks=interpreted)]
logits, targets = torch.zeros(3, 5), torch.tensor([0, 4, -100])


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("logits", dict(logits=torch.zeros(2, 3, 5))),
        ("logits", dict(logits=torch.zeros(3, 5, dtype=torch.int64))),
        ("logits", dict(logits=torch.zeros(3, 0))),
        ("targets", dict(targets=targets[:2])),
        ("targets", dict(targets=targets.int())),
        ("targets", dict(targets=torch.tensor([0, 5, 1]))),
        ("targets", dict(targets=torch.tensor([0, -1, 1]))),
        ("targets", dict(ignore_index=-1)),
        ("label_smoothing", dict(label_smoothing=-0.1)),
        ("label_smoothing", dict(label_smoothing=1.1)),
        ("z_loss", dict(z_loss=-1e-4)),
        ("softcap", dict(softcap=-30.0)),
    ],
)
def test_what_does_not_fit_is_named(name, arguments):
    with pytest.raises(ValueError, match=f"^{name}: "):
        cross_entropy(**{"logits": logits, "targets": targets, **arguments})


@pytest.mark.parametrize("path", PATHS)
def test_equal_logits_cost_the_logarithm_of_their_number(path):
    with use(path):
        losses, lse = cross_entropy(logits, targets)
    torch.testing.assert_close(losses, torch.tensor([math.log(5), math.log(5), 0]))
    torch.testing.assert_close(lse, torch.full((3,), math.log(5)))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("softcap", [0.0, 50.0])
def test_pytorchs_own_at_many_slices(path, softcap):
    """More rows and columns than a slice or block takes, some ignored, rows that lie apart; in bfloat16 to one rounding."""
    N, V = (2 * SLICE // 1500 + 7, 1500) if path == "torch" else (6, 3 * 32 + 5)
    for dtype in (torch.float32, torch.bfloat16):
        wide = 5 * torch.randn(N, V + 3)
        x = wide.to(dtype)[:, 3:].requires_grad_()
        t = torch.randint(V, (N,))
        t[::3] = -100
        dlosses = torch.randn(N)
        with use(path):
            losses, _ = cross_entropy(x, t, label_smoothing=0.1, softcap=softcap)
            (dx,) = torch.autograd.grad(losses, x, dlosses)
        exact = x.detach().double().requires_grad_()
        z = softcap * torch.tanh(exact / softcap) if softcap else exact
        want = F.cross_entropy(z, t, label_smoothing=0.1, reduction="none")
        (dwant,) = torch.autograd.grad(want, exact, dlosses.double())
        assert losses.dtype == torch.float32 and dx.dtype == dtype
        torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(dx.double(), dwant, rtol=torch.finfo(dtype).eps, atol=3e-6)
        assert (losses[::3] == 0).all() and (dx[::3] == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_terms_add_up(path):
    """The z-loss is weight times lse^2; full smoothing asks for every word alike, whatever the target is."""
    x, t = 3 * torch.randn(4, 40), torch.tensor([0, 39, 7, 31])
    with use(path):
        plain, lse = cross_entropy(x, t)
        torch.testing.assert_close(cross_entropy(x, t, z_loss=0.25)[0], plain + lse**2 / 4)
        smooth = cross_entropy(x, t, label_smoothing=1.0)[0]
        torch.testing.assert_close(smooth, cross_entropy(x, t.roll(1), label_smoothing=1.0)[0])
        torch.testing.assert_close(smooth, lse - x.mean(-1))
        torch.testing.assert_close(cross_entropy(x, t, softcap=1e4)[0], plain, rtol=1e-4, atol=1e-4)
        capped = cross_entropy(x, t, softcap=0.5)[1]
    assert ((capped > math.log(40) - 0.5) & (capped < math.log(40) + 0.5)).all()


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("path", PATHS)
def test_extreme_logits(path):
    """Logits that overflow when exponentiated, rows that only fall or only rise, words that are ruled out by -infinity.

    At 300 a logit in float32 is known to 3e-5.
    """
    ramp = torch.linspace(-300, 300, 100)
    masked = torch.randn(100)
    masked[10:90] = -math.inf
    x = torch.stack([ramp, ramp.flip(0), masked, torch.full((100,), 1e4), torch.full((100,), -1e4)]).requires_grad_()
    t = torch.tensor([0, 0, 99, 5, 5])
    with use(path):
        losses, lse = cross_entropy(x, t)
        (dx,) = torch.autograd.grad(losses.sum(), x)
    exact = x.detach().double().requires_grad_()
    want = F.cross_entropy(exact, t, reduction="none")
    torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=1e-3)  # 1e4 + log 100 has three decimals in float32
    torch.testing.assert_close(dx.double(), torch.autograd.grad(want.sum(), exact)[0], rtol=1e-3, atol=3e-5)


@pytest.mark.parametrize("path", PATHS)
def test_soft_caps_of_small_logits_keep_their_digits(path):
    """c tanh(x / c) of x much smaller than c is x; as a difference of exponentials it would be good to c eps only."""
    x = (1e-3 * torch.randn(4, 33)).requires_grad_()
    t = torch.tensor([0, 1, 2, 32])
    with use(path):
        losses, lse = cross_entropy(x, t, softcap=1e4)
        plain, _ = cross_entropy(x, t)
    torch.testing.assert_close(losses, plain, rtol=0, atol=2e-6)


@interpreted
def test_a_target_that_is_no_column_is_nan_in_the_kernel():
    """There nothing is looked up for it; the other rows are as ever."""
    from kernels.cross_entropy import CrossEntropy

    x = torch.randn(4, 40)
    with use("triton"):
        losses, _ = CrossEntropy.apply(x, torch.tensor([40, -1, 3, 1 << 40]), -100, 0.0, 0.0, 0.0)
        assert losses.isnan().tolist() == [True, True, False, True]
        torch.testing.assert_close(losses[2], F.cross_entropy(x[2], torch.tensor(3)))


def test_lse_has_a_gradient_of_its_own_even_where_the_loss_is_ignored():
    x = torch.randn(3, 5, requires_grad=True)
    _, lse = cross_entropy(x, targets)
    torch.testing.assert_close(torch.autograd.grad(lse.sum(), x)[0], x.detach().softmax(-1))


def test_slices_cover_all_rows_once():
    for N, V in [(0, 5), (1, 5), (7, SLICE // 3), (5, 2 * SLICE)]:
        rows = [n for s in slices(torch.empty(N, V, device="meta")) for n in range(N)[s]]
        assert rows == list(range(N))
    assert len(slices(torch.empty(7, SLICE // 3, device="meta"))) == 3


def test_a_trace_has_no_node_for_every_slice():
    nodes = []

    def count(graph, _):
        nodes.append(len(graph.graph.nodes))
        return graph

    def run(x, t):
        return cross_entropy(x, t)[0]

    for N in (3, 40):
        torch._dynamo.reset()
        torch.compile(run, fullgraph=True, backend=count)(torch.zeros(N, SLICE // 2), torch.zeros(N, dtype=torch.int64))
    assert nodes[0] == nodes[1] > 0
