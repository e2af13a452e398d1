"""Judge a model or let it speak.

    python eval.py bpb                                  bits per byte on the validation text
    python eval.py sample --prompt "def main("          text that follows a prompt, as it is made
    python eval.py speed                                prefill and decoding, tokens a second
    python eval.py export --to FOLDER                   write it as a published (Hugging Face) model

--checkpoint takes a run, a checkpoint, a folder in the Hugging Face format, or nothing: the newest run of all.
"""

import codecs
import sys
import time
from pathlib import Path

import torch

from data import Tokenizer, load, load_tokenizer, windows
from models import LanguageModel
from models.checkpoint import find
from models.config import Parser
from models.generate import Sampler, generate
from models.huggingface import export
from models.machine import autocast, choose_device, choose_dtype, synchronise, tune_cpu
from models.score import bits_per_byte, posed
from models.weights import load_model, read_config
from nn.linear import decode_in_half
from nn.objective import OBJECTIVES
from nn.spec import build


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        tune_cpu()
        folder = find(Path(args.checkpoint))
        device = choose_device(args.device)
        rows = args.command in (sample, speed) and device.type == "cpu" and args.dtype == "auto"  # one row at a time
        dtype = choose_dtype("float32" if rows else args.dtype, device)
        model = load_model(folder).to(device).eval()
        print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, {dtype} on {device}", file=sys.stderr)
        if rows:
            decode_in_half(model)
        with autocast(device, dtype):
            return args.command(args, folder, model)
    except ValueError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def bpb(args, folder: Path, model: LanguageModel) -> int:
    """Print bits per byte over the validation text."""
    tokenizer, config = tokenizer_of(folder, args.tokenizer), read_config(folder)
    _, validation = load(args.data or config.data, tokenizer, val_spec=args.val_data or config.val_data or None)
    seq_len = args.seq_len or config.seq_len
    batches = windows(validation, batch_size=args.batch_size, seq_len=seq_len, limit=args.tokens or None)
    batches = posed(batches, build(config.objective, OBJECTIVES, "objective"), tokenizer.vocab_size)
    print(f"{bits_per_byte(model, batches, tokenizer.token_bytes, packed=config.packed):.4f} bits per byte")
    return 0


def sample(args, folder: Path, model: LanguageModel) -> int:
    """Print what follows the prompt, piece by piece; characters appear when all their bytes are there."""
    tokenizer = tokenizer_of(folder, args.tokenizer)
    sampler = Sampler(args.temperature, args.top_k, args.top_p, args.min_p, args.seed)
    ids = [tokenizer.eot, *tokenizer.encode(args.prompt)]
    prompt = torch.tensor([ids], device=model.head.weight.device)
    characters = codecs.getincrementaldecoder("utf-8")("replace")
    print(args.prompt, end="", flush=True)
    for token in generate(model, prompt, new_tokens=args.tokens, sampler=sampler, stop=tokenizer.eot):
        if token.item() != tokenizer.eot:
            print(characters.decode(tokenizer.decode_bytes([token.item()])), end="", flush=True)
    print(characters.decode(b"", final=True))
    return 0


def speed(args, folder: Path, model: LanguageModel) -> int:
    """Print tokens a second of reading a prompt and of writing after it."""
    device, vocab_size = model.head.weight.device, model.config.vocab_size
    prompt = torch.randint(vocab_size, (args.batch_size, args.prompt_tokens), device=device)
    greedy = Sampler(temperature=0)
    best = {"prefill": 0.0, "decode": 0.0}
    for _ in range(args.repeats):
        tokens = generate(model, prompt, new_tokens=args.tokens + 1, sampler=greedy)
        for phase, count in (("prefill", prompt.numel()), ("decode", args.batch_size * args.tokens)):
            start = time.perf_counter()
            list(tokens) if phase == "decode" else next(tokens)
            synchronise(device)
            best[phase] = max(best[phase], count / (time.perf_counter() - start))
    rates = ", ".join(f"{phase} {rate:,.0f} tokens/s" for phase, rate in best.items())
    print(f"{rates} (batch {args.batch_size}, best of {args.repeats})")
    return 0


def export_published(args, folder: Path, model: LanguageModel) -> int:
    """Write the model in the Hugging Face format, its tokenizer beside it."""
    export(model, Path(args.to))
    tokenizer_of(folder, args.tokenizer).save(args.to)
    print(f"wrote {args.to}")
    return 0


def tokenizer_of(folder: Path, spec: str) -> Tokenizer:
    """The tokenizer that `--tokenizer` names, or else the one that lies with the model."""
    if spec:
        return load_tokenizer(spec)
    return Tokenizer.load(folder / "tokenizer") if (folder / "tokenizer").is_dir() else load_tokenizer(str(folder))


def parse(argv: list[str] | None):
    shared = Parser(add_help=False)
    shared.add_argument("--checkpoint", default="runs", metavar="FOLDER",
                        help="a run, a checkpoint or a published model [the newest run]")  # fmt: skip
    shared.add_argument("--tokenizer", default="", metavar="…",
                        help="where the checkpoint has none: a path or a tiktoken name")  # fmt: skip
    shared.add_argument("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    shared.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser = Parser(prog="eval.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, function) -> Parser:
        made = commands.add_parser(name, parents=[shared], help=function.__doc__, description=function.__doc__)
        made.set_defaults(command=function)
        return made

    def number(parser: Parser, flag: str, default, help: str) -> None:
        parser.add_argument(flag, type=type(default), default=default, metavar="N", help=f"{help} [{default}]")

    p = command("bpb", bpb)
    p.add_argument("--data", default="", metavar="…", help="the text, as for train.py [that of the run]")
    p.add_argument("--val-data", default="", metavar="…", help="judge on all of this instead")
    number(p, "--seq-len", 0, "tokens a window (0: that of the training)")
    number(p, "--tokens", 0, "how many, spread over the text (0: all)")
    number(p, "--batch-size", 16, "windows at once")

    p = command("sample", sample)
    p.add_argument("--prompt", default="", metavar="TEXT", help="the text to go on from")
    number(p, "--tokens", 256, "most tokens to make")
    number(p, "--temperature", 0.8, "flatter above 1, greedy at 0")
    number(p, "--top-k", 0, "only the k likeliest (0: all)")
    number(p, "--top-p", 1.0, "only the fewest that hold this probability")
    number(p, "--min-p", 0.0, "only those at least this fraction as likely as the likeliest")
    number(p, "--seed", 0, "of the draws")

    p = command("speed", speed)
    number(p, "--batch-size", 1, "sequences at once")
    number(p, "--prompt-tokens", 128, "tokens read")
    number(p, "--tokens", 128, "tokens written")
    number(p, "--repeats", 3, "times; the best counts")

    p = command("export", export_published)
    p.add_argument("--to", required=True, metavar="FOLDER", help="where to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
