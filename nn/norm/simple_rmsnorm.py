from nn.norm.rmsnorm import RMSNorm


class SimpleRMSNorm(RMSNorm):
    """Root-mean-square normalisation with nothing to learn: y = x / sqrt(mean(x^2) + eps); `rmsnorm:gain=false` by its name.

    Qin et al. 2023, "Scaling TransNormer to 175 Billion Parameters" (arXiv:2307.14995), which writes it
    sqrt(dim) x / |x|. Shapes: (…, dim) -> (…, dim), same dtype.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6):
        super().__init__(dim, eps=eps, gain=False)
