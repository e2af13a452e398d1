"""Training speed of the state space models beside other implementations, in one run: `python -m tests.bench_ssm`.

Tokens a second at 6 layers x 256, vocabulary 4096, batch 4, T 256, forward, backward and an AdamW step: Mamba beside
mambapy's, Mamba-2 beside transformers' (its PyTorch path), of the same sizes. Each side runs in a process of its own,
as its users run it: the others in float32 with the allocator as it is, ours with the settings and the dtype that train.py
chooses. So that nothing hides in that difference, each runs the other way too. The sides take turns, so that noise of the
machine meets all of them.
"""

import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from models import Config, build_model
from models.machine import autocast, tune_cpu

BATCH, TIME, DEPTH, DIM, VOCAB, STATE = 4, 256, 6, 256, 4096, 128
ROUNDS, STEPS = 3, 6  # processes of a side; timed steps of a process, after two others
MIXERS = {"mambapy": "mamba", "transformers": f"mamba2:state={STATE}"}


def mambapy() -> nn.Module:
    """mambapy's stack between embedding and head; its own model of a language asks for mamba_ssm."""
    from mambapy.mamba import Mamba, MambaConfig

    stack = Mamba(MambaConfig(d_model=DIM, n_layers=DEPTH))
    return nn.Sequential(nn.Embedding(VOCAB, DIM), stack, nn.RMSNorm(DIM, 1e-5), nn.Linear(DIM, VOCAB, bias=False))


def transformers() -> nn.Module:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = dict(num_heads=8, head_dim=64, state_size=STATE, n_groups=1)
    config = Mamba2Config(vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=DEPTH, use_cache=False, **sizes)
    return Mamba2ForCausalLM(config)


def their_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    logits = model(inputs)
    logits = logits if isinstance(logits, Tensor) else logits.logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def our_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return model(inputs, targets) / targets.numel()


def rate(who: str, peer: str, tuned: bool, dtype: torch.dtype) -> tuple[float, int]:
    """Tokens a second of one side, the median of its steps, and its number of parameters."""
    if tuned:
        tune_cpu()
    if who == "ours":
        adamw = "adamw:lr=0.001"
        rates = dict(optimizer=adamw, rest_optimizer=adamw, embedding_lr=0.001)
        sizes = dict(depth=DEPTH, dim=DIM, vocab_size=VOCAB, seq_len=TIME)
        model = build_model(Config.of(model="mamba", mixer=MIXERS[peer], tie=False, **sizes, **rates))
        optimizer, loss = train.build_optimizer(model.config, model), our_loss
    else:
        model, loss = {"mambapy": mambapy, "transformers": transformers}[peer](), their_loss
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(VOCAB, (BATCH, TIME + 1), generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(STEPS + 2):
        start = time.perf_counter()
        with autocast(torch.device("cpu"), dtype):
            loss(model, tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return BATCH * TIME / statistics.median(seconds[2:]), sum(p.numel() for p in model.parameters())


def compare(peer: str) -> None:
    sides = [("theirs", "plain", "float32"), ("theirs", "tuned", "float32"), ("theirs", "tuned", "bfloat16"),
             ("ours", "tuned", "bfloat16"), ("ours", "tuned", "float32"), ("ours", "plain", "float32")]  # fmt: skip
    rates, sizes = {side: [] for side in sides}, set()
    for _ in range(ROUNDS):
        for side in sides:
            command = [sys.executable, "-m", "tests.bench_ssm", peer, *side]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
            rates[side].append(float(done[0]))
            sizes.add(int(done[1]))
    if len(sizes) > 1:
        raise SystemExit(f"{peer}: {sizes} parameters are not the same model")
    print(f"\n{MIXERS[peer]}, {DEPTH} layers x {DIM}, {sizes.pop():,} parameters, {torch.get_num_threads()} threads")
    plain = statistics.median(rates[sides[0]])
    for (who, settings, dtype), found in rates.items():
        name, middle = peer if who == "theirs" else "ours", statistics.median(found)
        print(f"  {name:14}{settings:7}{dtype:10}{middle:>8,.0f} tokens/s {middle / plain:6.2f}x", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        peer, who, settings, dtype = sys.argv[1:]
        print(*rate(who, peer, settings == "tuned", getattr(torch, dtype)))
    else:
        for peer in MIXERS:
            try:
                __import__(peer)
            except ImportError:
                print(f"\n{peer}: skipped, it is not installed")
            else:
                compare(peer)
