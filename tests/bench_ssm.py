"""Training speed of the state space models beside other implementations, in one run: `python -m tests.bench_ssm`.

Tokens a second at 6 layers x 256, vocabulary 4096, batch 4, T 256, float32, forward, backward and an AdamW step: Mamba
beside mambapy's, Mamba-2 beside transformers' (its PyTorch path). Each pair has the same sizes and takes turns, so that
noise of the machine meets both.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from models import Config, build_model
from models.machine import tune_cpu

BATCH, TIME, DEPTH, DIM, VOCAB, STATE = 4, 256, 6, 256, 4096, 128


def their_mamba() -> nn.Module:
    """mambapy's stack between embedding and head; its own model of a language asks for mamba_ssm."""
    from mambapy.mamba import Mamba, MambaConfig

    stack = Mamba(MambaConfig(d_model=DIM, n_layers=DEPTH))
    return nn.Sequential(nn.Embedding(VOCAB, DIM), stack, nn.RMSNorm(DIM, 1e-5), nn.Linear(DIM, VOCAB, bias=False))


def their_mamba2() -> nn.Module:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = dict(num_heads=8, head_dim=64, state_size=STATE, n_groups=1)
    config = Mamba2Config(vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=DEPTH, use_cache=False, **sizes)
    return Mamba2ForCausalLM(config)


def their_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor) -> None:
    logits = model(inputs)
    logits = logits if isinstance(logits, Tensor) else logits.logits
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def our_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor) -> None:
    (model(inputs, targets) / targets.numel()).backward()
    optimizer.step()
    optimizer.zero_grad()


def compare(name: str, mixer: str, other: str, make: Callable[[], nn.Module]) -> None:
    tokens = torch.randint(VOCAB, (BATCH, TIME + 1), generator=torch.Generator().manual_seed(0))
    peer = make()
    adamw = "adamw:lr=0.001"
    config = Config.of(model="mamba", mixer=mixer, tie=False, optimizer=adamw, rest_optimizer=adamw, embedding_lr=0.001)
    model = build_model(config)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (peer, model)]
    if sizes[0] != sizes[1]:
        raise SystemExit(f"{name}: {sizes[0]:,} and {sizes[1]:,} parameters are not the same model")
    sides = {
        other: (their_step, peer, torch.optim.AdamW(peer.parameters(), lr=1e-3)),
        "ours": (our_step, model, train.build_optimizer(config, model)),
    }
    seconds = {side: [] for side in sides}
    for _ in range(8):
        for side, (step, module, optimizer) in sides.items():
            start = time.perf_counter()
            step(module, optimizer, tokens[:, :-1], tokens[:, 1:])
            seconds[side].append(time.perf_counter() - start)
    rates = {side: BATCH * TIME / statistics.median(values[2:]) for side, values in seconds.items()}
    print(f"\n{name}, {DEPTH} layers x {DIM}, {sizes[0]:,} parameters, float32, {torch.get_num_threads()} threads")
    for side, rate in rates.items():
        print(f"  {side:28}{rate:>8,.0f} tokens/s {rate / rates[other]:6.2f}x")


PARTS = {
    "mamba": ("mamba", "mambapy", their_mamba),
    "mamba2": (f"mamba2:state={STATE}", "transformers", their_mamba2),
}

if __name__ == "__main__":
    tune_cpu()
    for part, arguments in PARTS.items():
        try:
            compare(part, *arguments)
        except ImportError as missing:
            print(f"\n{part}: skipped, {missing.name} is not installed")
