# %% [markdown]
# # A memory that learns
#
# The memory of linear attention is a matrix M that is read as M q and written to by adding v k^T. The delta rule corrects
# it: a step of gradient descent on how well it recalls the pair at hand. ATLAS (Behrouz et al. 2025, arXiv:2505.23735)
# names what is left: the step looks at one pair only, a matrix holds as many pairs as a key has numbers, and gradient descent
# is a poor optimiser. It answers with a window of c pairs (the Omega rule), polynomial features of the keys, and Muon.
#
# Here nothing is trained: random keys and values are written once, in order, and asked for afterwards.
#
# Letters: n pairs, D numbers of a key, N features of it, V of a value, c pairs of the window, p degree.

# %%
import lectern
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

from nn.linear_attention.atlas import Atlas
from nn.linear_attention.delta_rule import delta_rule
from nn.linear_attention.omega_rule import in_window, omega_rule, orthogonal

torch.manual_seed(0)
torch.set_num_threads(1)
MEMORIES, D, V = 8, 16, 16
PAIRS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def pairs(n: int, common: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys (MEMORIES, n, 1, D) of unit length, all with a share of one direction in common, and values."""
    generator = torch.Generator().manual_seed(seed)
    keys, shared = torch.randn(MEMORIES, n, 1, D, generator=generator), torch.randn(MEMORIES, 1, 1, D, generator=generator)
    keys = F.normalize(F.normalize(keys, dim=-1) + common * F.normalize(shared, dim=-1), dim=-1)
    return keys, torch.randn(MEMORIES, n, 1, V, generator=generator)


FEATURES = {p: Atlas(D, heads=1, degree=p).features for p in (1, 2)}  # 1 is the identity

# %% [markdown]
# ## How much there is room for
#
# The best matrix for n pairs is that of least squares. It recalls all exactly while there are no more pairs than
# features, D for degree 1 and D + D (D + 1) / 2 for degree 2, and then fails: the knee is at D, or near D^2 / 2.


# %%
@torch.no_grad()
def least_squares(n: int, p: int) -> float:
    """The error of recall of the best M, as a share of the variance of the values."""
    keys, values = (x[:, :, 0].double() for x in pairs(n))
    features = FEATURES[p](keys[:, :, None])[:, :, 0]
    M = torch.linalg.pinv(features) @ values
    return ((features @ M - values).square().mean() / values.square().mean()).item()


ROOM = {p: FEATURES[p](pairs(1)[0]).shape[-1] for p in (1, 2)}
for p, room in ROOM.items():
    errors = {n: least_squares(n, p) for n in (room // 2, room, 2 * room)}
    print(f"degree {p}, {room} features: error of recall " + ", ".join(f"{e:.2f} for {n} pairs" for n, e in errors.items()))
    assert errors[room] < 1e-6
    assert errors[2 * room] > 0.3
assert ROOM == {1: 16, 2: 152}

# %% [markdown]
# ## One pass by the Omega rule
#
# At each pair the memory takes one step down the error on the last c pairs, of the largest length that overshoots in no
# direction. With c = 1 and degree 1 this is the delta rule with beta = 1. Capacity: at how many pairs the error of recall
# crosses one half.


# %%
@torch.no_grad()
def recalled(n: int, c: int, p: int, *, muon: float = 0.0, common: float = 0.0, seed: int = 0) -> float:
    """The error of recall after one pass over n pairs; `muon`: the length of its steps, or 0 for gradient descent."""
    keys, values = pairs(n, common, seed)
    k, v = (F.pad(x, (0, 0, 0, 0, c - 1, 0)) for x in (FEATURES[p](keys), values))
    gates = in_window(torch.ones(MEMORIES, c - 1 + n, 1), c)
    window = k[:, :, 0].unfold(1, c, 1)  # (MEMORIES, n, N, c)
    steepest = torch.linalg.eigvalsh(window.mT @ window)[..., -1:]  # (MEMORIES, n, 1)
    eta, theta = (torch.full_like(steepest, muon), torch.zeros_like(steepest)) if muon else (1 / steepest, None)
    _, (M, _) = omega_rule(k[:, c - 1 :], k, v, eta, gates, None, theta)
    recall = torch.einsum("bnhf,bhfv->bnhv", k[:, c - 1 :].to(M.dtype), M)
    return ((recall - values).square().mean() / values.square().mean()).item()


keys, values = pairs(40)
one = torch.ones(MEMORIES, 40, 1)
_, (by_omega, _) = omega_rule(keys, keys, values, one, one[..., None], None, None)
_, by_delta = delta_rule(keys, keys, values, one)
print(f"\nc = 1, degree 1, and the delta rule: memories differ by {(by_omega - by_delta).abs().max():.0e}")
assert torch.allclose(by_omega, by_delta, atol=1e-4)


def crossing(errors: list[float]) -> float:
    """At how many pairs the error is one half, on a straight line between the two counts around it."""
    i = next(i for i, error in enumerate(errors) if error > 0.5)
    share = (0.5 - errors[i - 1]) / (errors[i] - errors[i - 1])
    return PAIRS[i - 1] + share * (PAIRS[i] - PAIRS[i - 1])


WINDOWS = (1, 4, 16, 64)
ERRORS = {(p, c): [recalled(n, c, p) for n in PAIRS] for p in (1, 2) for c in WINDOWS}
CAPACITY = {key: crossing(errors) for key, errors in ERRORS.items()}
print("capacity in pairs" + "".join(f"{f'c = {c}':>9}" for c in WINDOWS))
for p in (1, 2):
    print(f"degree {p}         " + "".join(f"{CAPACITY[p, c]:9.0f}" for c in WINDOWS))
for p in (1, 2):
    for fewer, more in zip(WINDOWS, WINDOWS[1:], strict=False):
        assert CAPACITY[p, more] > 1.02 * CAPACITY[p, fewer]
    assert CAPACITY[p, 16] > 1.5 * CAPACITY[p, 1]
assert all(CAPACITY[2, c] > 2 * CAPACITY[1, c] for c in WINDOWS)

# %% [markdown]
# Both levers work, and they multiply: features make room, the window makes use of it. With c = 1 a pair is written once and
# every later one spoils it a little; in a window of c pairs it is put right c times, at c times the price. The delta rule
# reaches a part of the room only, and of the larger room a smaller part.
#
# ## Muon inside
#
# Gradient descent is slow where keys resemble each other: the direction they share is learned at once, what
# tells them apart hardly. Newton-Schulz makes all directions of a step alike long, singular values between 0.68 and 1.14.

# %%
gaussian = torch.randn(100, D, ROOM[2])
values = torch.linalg.svdvals(orthogonal(gaussian))
print(f"\nfive steps of Newton-Schulz on Gaussian matrices: singular values from {values.min():.2f} to {values.max():.2f}")
assert values.min() > 0.68
assert values.max() < 1.14
INNER = {}
for common in (0.0, 2.0):
    for n in (16, 64):
        INNER[common, n] = [recalled(n, 16, 2, common=common), recalled(n, 16, 2, common=common, muon=1.0)]
        kind = "keys alike" if common else "keys at random"
        print(f"{kind:15}{n:3} pairs, c = 16, degree 2: gradient {INNER[common, n][0]:.2f}, muon {INNER[common, n][1]:.2f}")
assert INNER[2.0, 16][1] < INNER[2.0, 16][0] - 0.1
assert INNER[2.0, 64][1] > INNER[2.0, 64][0]

# %% [markdown]
# While the window holds all the pairs, Muon recalls keys that are alike far better. When pairs have left the window, steps of
# full length in every direction, however small the error, undo what was learned: `--mixer atlas:inner=muon` therefore
# takes steps of at most 0.1. All of it is in `--mixer atlas:window=16:degree=2`, where the token chooses steps and gates.

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
for (p, c), errors in ERRORS.items():
    axes[0].semilogx(PAIRS, errors, "o-" if p == 2 else "o:", color=f"C{WINDOWS.index(c)}", label=f"degree {p}, c = {c}")
for room in ROOM.values():
    axes[0].axvline(room, color="gray", linewidth=0.8)
axes[0].axhline(0.5, color="gray", linewidth=0.8)
axes[0].set(xlabel="pairs (gray: numbers of features)", ylabel="error of recall", title="written once")
for p in (1, 2):
    axes[1].loglog(WINDOWS, [CAPACITY[p, c] for c in WINDOWS], "o-", label=f"degree {p}")
axes[1].set(xlabel="window c", ylabel="pairs at an error of one half", title="capacity against window")
for axis in axes:
    axis.legend(fontsize=8)
lectern.save_figure(figure, "18_memory_that_learns")
