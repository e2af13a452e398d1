"""Speed beside the plain way, in one run on one machine: `python -m tests.bench [part ...]`.

    training   tokens a second of the gpt2 shape (4 layers, 4 heads, dim 256, T 256, batch 16, vocabulary 4096):
               PyTorch's own transformer in a plain float32 loop, the same under autocast, and ours
    quality    seconds to 1.92 bits per byte on the default corpus: the plain loop and the default recipe (about 5 minutes)
    decoding   tokens a second at batch 1 with equal weights: transformers' `generate`, if installed, and ours
    text       seconds for training the default tokenizer, and for tokenizing the default corpus

Ratios within one run are what counts: machines differ, and noise moves both sides.
"""

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from data import Loader, load, load_tokenizer, training_documents, windows
from data.bpe import train as train_bpe
from models import Config, build_model
from models.describe import forward_flops
from models.generate import Sampler, generate
from models.huggingface import export
from models.log import read
from models.machine import autocast, choose_dtype, matmul_peak, tune_cpu
from models.score import bits_per_byte
from nn.linear import decode_in_half

CPU = torch.device("cpu")
SHAPE = dict(
    model="gpt2", depth=4, heads=4, dim=256, vocab_size=4096, seq_len=256, batch_size=16,
    ffn="mlp:bias=true",  # the exact GELU, as in nanoGPT; the preset's approximation takes a CPU four times as long
)  # fmt: skip
TARGET = 1.92  # bits per byte


class PlainGPT(nn.Module):
    """GPT-2's shape out of PyTorch's own modules, as one would write it first."""

    def __init__(self, vocab_size: int, seq_len: int, dim: int, depth: int, heads: int):
        super().__init__()
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.stack = nn.TransformerEncoder(layer, depth, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.tokens, self.positions = nn.Embedding(vocab_size, dim), nn.Embedding(seq_len, dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor, documents: None = None) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.tokens(tokens) + self.positions(torch.arange(length))
        logits = self.head(self.stack(x, mask=mask, is_causal=True))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def plain_gpt() -> PlainGPT:
    torch.manual_seed(0)
    return PlainGPT(*(SHAPE[key] for key in ("vocab_size", "seq_len", "dim", "depth", "heads")))


def plain_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


def one_step(model: nn.Module, optimizer, inputs: Tensor, targets: Tensor, dtype: torch.dtype) -> float:
    with autocast(CPU, dtype):
        loss = model(inputs, targets) / targets.numel()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def training() -> None:
    """Plain loops first, since keeping freed memory cannot be undone in a process."""
    dtype = choose_dtype("auto", CPU)
    config = Config.of(**SHAPE, optimizer="adamw:lr=0.001", rest_optimizer="adamw:lr=0.001", embedding_lr=0.001)
    tokens = torch.randint(4096, (16, 257), generator=torch.Generator().manual_seed(0))
    flops = 3 * forward_flops(build_model(config), 256) * 16

    def speed(model: nn.Module, optimizer, dtype: torch.dtype) -> float:
        seconds = []
        for _ in range(12):
            start = time.perf_counter()
            one_step(model, optimizer, tokens[:, :-1], tokens[:, 1:], dtype)
            seconds.append(time.perf_counter() - start)
        return 16 * 256 / statistics.median(seconds[2:])

    rows = []
    for name, precision in (("plain PyTorch, float32", torch.float32), ("plain PyTorch, autocast", dtype)):
        model = plain_gpt()
        rows.append((name, speed(model, plain_optimizer(model), precision)))
    tune_cpu()
    model = build_model(config)
    rows.append((f"ours, {str(dtype)[6:]}", speed(model, train.build_optimizer(config, model), dtype)))
    peak = matmul_peak(CPU, dtype, seconds=0.5)
    peaks = f"{matmul_peak(CPU, torch.float32) / 1e9:,.0f} GFLOP/s in float32, {peak / 1e9:,.0f} in {str(dtype)[6:]}"
    print(f"\ntraining, gpt2 shape; matmul peak {peaks}")
    for name, value in rows:
        share = value / (16 * 256) * flops / peak
        print(f"  {name:28}{value:>9,.0f} tokens/s {value / rows[0][1]:6.2f}x {share:6.0%} of the peak")


def quality() -> None:
    """Seconds of the plain loop's steps and of the default recipe's until validation costs TARGET bits a byte."""

    def texts():
        return (document.text for document in training_documents("python"))

    tokenizer = load_tokenizer("bpe", texts=texts, vocab_size=4096)
    tokens, validation = load("python", tokenizer)
    model, spent, step, bpb = plain_gpt(), 0.0, 0, math.inf
    optimizer, loader = plain_optimizer(model), Loader(tokens, batch_size=16, seq_len=256, seed=0)
    while bpb > TARGET and spent < 600:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 100)
        inputs, targets, _ = next(loader)
        start = time.perf_counter()
        one_step(model, optimizer, inputs, targets, torch.float32)
        spent, step = spent + time.perf_counter() - start, step + 1
        if step % 25 == 0:
            batches = windows(validation, batch_size=16, seq_len=256, limit=32768)
            bpb = bits_per_byte(model, batches, tokenizer.token_bytes)
    print(f"\nseconds of training to {TARGET} bits per byte on the default corpus")
    print(f"  plain PyTorch, float32      {spent:9.1f} s, {step * 4096:>12,} tokens")
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--eval-every", "10", "--eval-tokens", "32768", "--save-every", "0", "--sample", "1"]
        if train.main(["--out", f"{folder}/run", *flags]):
            raise SystemExit("the default recipe failed")
        records = read(Path(folder) / "run" / "log.jsonl")
    curve = [(r["elapsed"], r["bpb"]) for r in records if "bpb" in r]
    reached = next((record for record in records if record.get("bpb", math.inf) <= TARGET), None)
    if reached is None:
        raise SystemExit(f"the default recipe ended at {curve[-1][1]:.3f} bits per byte")
    tokens_each = Config.of().batch_size * Config.of().seq_len
    print(f"  the default recipe          {reached['elapsed']:9.1f} s, {reached['step'] * tokens_each:>12,} tokens, "
          f"its evaluations included: {spent / reached['elapsed']:.1f}x")  # fmt: skip
    print("  and on:", ", ".join(f"{seconds:.0f} s {bpb:.3f}" for seconds, bpb in [*curve[4::10], curve[-1]]))


def decoding() -> None:
    """Greedy decoding after a prompt of 8 tokens, batch 1, float32, the same weights on both sides."""
    import transformers

    prompt, new = torch.arange(8)[None], 200
    model = build_model(Config.of(**{k: v for k, v in SHAPE.items() if k != "batch_size"})).eval()

    def ours() -> Tensor:
        return torch.cat([prompt[0], *generate(model, prompt, new_tokens=new, sampler=Sampler(temperature=0))])

    with tempfile.TemporaryDirectory() as folder:
        export(model, Path(folder))
        theirs_model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,
                   attention_mask=torch.ones_like(prompt))  # fmt: skip

    def theirs() -> Tensor:
        return theirs_model.generate(prompt, **options)[0]

    if not torch.equal(ours(), theirs()):
        raise SystemExit("decoding: the two do not say the same")

    def speed(function: Callable[[], Tensor]) -> float:
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        return new / statistics.median(seconds)

    rates = {"transformers": speed(theirs)}  # as it comes, before our habits of memory
    tune_cpu()
    rates["ours"] = speed(ours)
    decode_in_half(model)
    rates["ours, as eval.py does, weights read in half precision"] = speed(ours)
    print("\ndecoding, gpt2 shape, batch 1")
    for name, rate in rates.items():
        print(f"  {name:56}{rate:>8,.0f} tokens/s {rate / rates['transformers']:5.2f}x")


def text() -> None:
    texts = [document.text for document in training_documents("python")]
    size = sum(len(text.encode()) for text in texts) / 1e6
    start = time.perf_counter()
    train_bpe(texts, 4095)
    trained = time.perf_counter()
    print(f"\ntext: {size:.1f} MB, byte-pair encoding of 4,096 pieces trained in {trained - start:.1f} s on one core", end="")
    tokenizer = load_tokenizer("bpe", texts=lambda: texts, vocab_size=4096)
    start = time.perf_counter()
    tokenizer.encode_batch(texts)
    print(f", tokenized at {size / (time.perf_counter() - start):.0f} MB/s")


PARTS = {"training": training, "decoding": decoding, "text": text, "quality": quality}

if __name__ == "__main__":
    wanted = sys.argv[1:] or list(PARTS)
    if unknown := [part for part in wanted if part not in PARTS]:
        print(f"bench: no part {unknown[0]!r}; there are {', '.join(PARTS)}", file=sys.stderr)
        sys.exit(2)
    for part in wanted:
        try:
            PARTS[part]()
        except ImportError as missing:
            print(f"\n{part}: skipped, {missing.name} is not installed")
