# %% [markdown]
# # One step of gradient descent, learned by one layer of linear attention
#
# Show a language model a few examples in its prompt, and it continues the pattern: it learns without any of its weights
# changing. What does it compute? For the simplest case the answer is a theorem (Mahankali, Hashimoto and Ma 2023,
# arXiv:2307.03576): a single layer of linear attention, trained on prompts of linear regression, ends as *one step of
# gradient descent*, and no other setting of its weights has a smaller loss.
#
# A prompt is n pairs (x_i, y_i) with y_i = w . x_i + noise, and a query x_q whose y is to be told; every prompt has its own
# w. The layer has no softmax:
#
#     y_q = p . (sum_i m_i m_i^T) A m_q,    m_i = (x_i, y_i),  m_q = (x_q, 0)
#
# A is the product of key and query weights, p the row of value and output weights that writes the last coordinate.

# %%
import lectern
import matplotlib.pyplot as plt
import numpy as np
import torch

from kernels.linear_attention import linear_attention

# B prompts, n pairs in a prompt, d coordinates of x
B, n, d, noise = 2048, 20, 5, 0.5  # noise: its variance
generator = torch.Generator().manual_seed(0)


def prompts(count: int, root: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x (B, n, d) ~ N(0, S) and w ~ N(0, S^-1) for a square root of S; y (B, n), the query (B, d) and its answer (B,)."""
    x = torch.randn(count, n + 1, d, generator=generator) @ root
    w = torch.linalg.solve(root, torch.randn(count, d, 1, generator=generator))
    clean = (x @ w)[..., 0]
    y = clean + noise**0.5 * torch.randn(count, n + 1, generator=generator)
    return x[:, :n], y[:, :n], x[:, n], y[:, n]


def attend(x: torch.Tensor, y: torch.Tensor, query: torch.Tensor, A: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The layer's answer (B,), with the state of the house's linear attention: the sum of m_i (p . m_i)."""
    m = torch.cat([x, y[..., None]], -1)  # (B, n, d + 1)
    _, state = linear_attention(m[:, :, None], m[:, :, None], (m @ p)[..., None, None], scale=1.0)  # (B, 1, d + 1, 1)
    m_q = torch.cat([query, torch.zeros_like(query[:, :1])], -1)
    return (state[:, 0, :, 0] * (m_q @ A.T)).sum(-1)


# %% [markdown]
# ## What gradient descent would do
#
# From w = 0, one step on the squared loss of the n pairs gives w = eta sum_i y_i x_i, and the answer eta sum_i y_i x_i . x_q.
# The best eta is a matter of moments of the normal distribution: with E[(x_q . sum_i y_i x_i) y_q] = n d and the second
# moment n d (n + d + 1 + noise), it is
#
#     eta = 1 / (n + d + 1 + noise),    the loss then d - n d / (n + d + 1 + noise) + noise
#
# The weights that do this can be written down: A with the identity in its x block, p with eta at y, zero elsewhere.

# %%
eta = 1 / (n + d + 1 + noise)
best_loss = d - n * d * eta + noise
identity = torch.eye(d)
A = torch.zeros(d + 1, d + 1)
A[:d, :d] = identity
p = torch.zeros(d + 1)
p[d] = eta
assert abs(eta - 0.03774) < 1e-5 and abs(best_loss - noise - 1.2264) < 1e-4
x, y, query, answer = prompts(50_000, identity)
direction = torch.einsum("bn,bnd,bd->b", y, x, query)  # eta times this is the answer
assert abs((direction * answer).mean().item() / (n * d) - 1) < 0.03
assert abs(direction.square().mean().item() * eta / (n * d) - 1) < 0.03
by_descent = eta * torch.einsum("bn,bnd,bd->b", y, x, query)
assert (attend(x, y, query, A, p) - by_descent).abs().max() < 1e-4
measured = (by_descent - answer).square().mean().item()
print(f"one step of gradient descent, eta {eta:.5f}: loss {measured:.3f}, by the formula {best_loss:.3f}")
assert abs(measured - best_loss) < 0.05

# %% [markdown]
# ## What training finds
#
# Now nothing is written down: A and p begin at random and learn by Adam from fresh prompts. In what they have become, the
# answer is the sum of y_i x_i^T G x_q with G = p_y A_xx, and other products that ought to vanish.


# %%
def learn(root: torch.Tensor, steps: int = 500) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    A = (0.1 * torch.randn(d + 1, d + 1, generator=generator)).requires_grad_()
    p = (0.1 * torch.randn(d + 1, generator=generator)).requires_grad_()
    optimizer = torch.optim.Adam([A, p], lr=0.02, betas=(0.9, 0.95))
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * min(1, 2 * (1 - step / steps))
        x, y, query, answer = prompts(B, root)
        loss = (attend(x, y, query, A, p) - answer).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return A.detach(), p.detach(), losses


A, p, losses = learn(identity)
G = p[d] * A[:d, :d]
learned = G.trace().item() / d
cosine = (G.trace() / (G.norm() * d**0.5)).item()
print(f"learned: eta {learned:.5f} against {eta:.5f}; cosine between G and the identity {cosine:.4f}")
assert abs(learned / eta - 1) < 0.04 and cosine > 0.998
assert np.mean(losses[-50:]) < 0.5 * np.mean(losses[:20])

# %% [markdown]
# A times c and p divided by c is the same layer: only their product can be learned. And the parts of it that are not G, what
# the layer makes of x_i x_i^T and of y_i^2, have become small.

# %%
x, y, query, answer = prompts(50_000, identity)
found = attend(x, y, query, A, p)
assert torch.allclose(attend(x, y, query, 3 * A, p / 3), found, atol=1e-4)
rest = found - torch.einsum("bn,bnd,de,be->b", y, x, G, query)
ridge_w = torch.linalg.solve(x.mT @ x + noise * identity, x.mT @ y[..., None])[..., 0]
LOSSES = {
    "answering 0": answer.square().mean().item(),
    "the learned layer": (found - answer).square().mean().item(),
    "one step, best eta": (eta * torch.einsum("bn,bnd,bd->b", y, x, query) - answer).square().mean().item(),
    "ridge regression": ((ridge_w * query).sum(-1) - answer).square().mean().item(),
}
print("mean squared errors on new prompts")
for name, value in LOSSES.items():
    print(f"  {name:20}{value:8.3f}")
print(f"  share of the answer that is none of gradient descent: {(rest.var() / found.var()).item():.4f}")
assert rest.var() < 0.01 * found.var()
assert LOSSES["the learned layer"] < 1.02 * LOSSES["one step, best eta"]
assert LOSSES["ridge regression"] < LOSSES["one step, best eta"] < LOSSES["answering 0"]

# %% [markdown]
# One step is not the best that can be done with the examples: ridge regression, which inverts a matrix, is much better. It is
# the best that *one layer of linear attention* can do. Deeper networks take more steps.
#
# ## When the inputs have a shape
#
# Let x ~ N(0, S) with S far from the identity, and w ~ N(0, S^-1). Plain gradient descent is slow then, and what is learned is
# *preconditioned*: G is eta S^-1, as if the layer had measured S.

# %%
rotation = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
root = rotation @ torch.diag(torch.linspace(0.7, 1.5, d)) @ rotation.T
S = root @ root
A, p, shaped_losses = learn(root, steps=700)
G = p[d] * A[:d, :d]
inverse = torch.linalg.inv(S)
to_inverse, to_identity = (((G * M).sum() / (G.norm() * M.norm())).item() for M in (inverse, identity))
shaped_eta = ((G * inverse).sum() / inverse.square().sum()).item()
print(f"eigenvalues of S from {0.7**2:.2f} to {1.5**2:.2f}")
print(f"cosine of G to S^-1 {to_inverse:.4f}, to the identity {to_identity:.4f}")
print(f"its eta: {shaped_eta:.5f}, by theory {eta:.5f}")
assert to_inverse > 0.99 > to_identity + 0.02 and abs(shaped_eta / eta - 1) < 0.05

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
axes[0].plot(np.convolve(losses, np.ones(20) / 20, "valid"), label="trained layer")
axes[0].axhline(best_loss, color="k", linestyle="--", label="one step of gradient descent")
axes[0].axhline(LOSSES["ridge regression"], color="C2", linestyle=":", label="ridge regression")
axes[0].set(xlabel="step", ylabel="squared error", ylim=(0, 6.5))
axes[0].legend()
axes[1].scatter(inverse.flatten(), G.flatten() / eta)
axes[1].axline((0, 0), slope=1, color="k", linestyle="--")
axes[1].set(xlabel="entries of S^-1", ylabel="entries of G / eta", title="shaped inputs")
lectern.save_figure(figure, "07_one_step_of_gradient_descent")
