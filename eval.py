"""Judge a model or let it speak.

    python eval.py bpb                                  bits per byte on the validation text
    python eval.py sample --prompt "def main("          text that follows a prompt, as it is made
    python eval.py speed                                prefill and decoding, tokens a second
    python eval.py length --multiples 1,2,4,8           bits per byte beyond the length of the training
    python eval.py passkey                              find a number that was told long ago
    python eval.py task --lengths 64,256,1024           accuracy on a task: that of the training, or another
    python eval.py layers                               what each layer does, and what is lost without it
    python eval.py maps --prompt "def main("            where attention looks, as a picture
    python eval.py experts --domains python my/texts    what the experts of a mixture are used for
    python eval.py export --to FOLDER                   write it as a published (Hugging Face) model

--checkpoint takes a run, a checkpoint, a folder in the Hugging Face format, or nothing: the newest run of all.
"""

import sys
from pathlib import Path

import torch

from data import TASKS, Tokenizer, examples, load, load_tokenizer, windows
from data.passkey import passkey
from data.sources import entries
from data.text import validation_of_domain
from data.tokens import Tokens, load_domains
from models import Config, LanguageModel
from models.checkpoint import find
from models.config import Parser, numbers
from models.extract_domain import extract
from models.generate import Sampler, answers, fastest, generate, spoken
from models.huggingface import export
from models.machine import autocast, choose_device, choose_dtype, tune_cpu
from models.probe import attention_maps, draw_maps, layer_effects, loss_by_position, sinks_of
from models.probe_experts import draw_experts, entropy, expert_loads, specialisation
from models.score import answered, bits_per_byte, posed
from models.weights import load_model, read_config
from nn.linear import decode_in_half
from nn.moe.hashed import domains_of
from nn.objective import OBJECTIVES
from nn.spec import arguments, build, resolve, signature


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        tune_cpu()
        folder = find(Path(args.checkpoint))
        device = choose_device(args.device)
        rows = args.command in (sample, speed) and device.type == "cpu" and args.dtype == "auto"  # one row at a time
        dtype = choose_dtype("float32" if rows else args.dtype, device)
        model = load_model(folder)
        model = (model if args.domain < 0 else extract(model, domain=args.domain)).to(device).eval()
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
    validation = validation_text(args, config, tokenizer)
    seq_len = args.seq_len or config.seq_len
    batches = windows(validation, batch_size=args.batch_size, seq_len=seq_len, limit=args.tokens or None)
    batches = posed(batches, build(config.objective, OBJECTIVES, "objective"), tokenizer.vocab_size)
    print(f"{bits_per_byte(model, batches, tokenizer.token_bytes, packed=config.packed):.4f} bits per byte")
    return 0


def sample(args, folder: Path, model: LanguageModel) -> int:
    """Print what follows the prompt, piece by piece."""
    tokenizer = tokenizer_of(folder, args.tokenizer)
    sampler = Sampler(args.temperature, args.top_k, args.top_p, args.min_p, args.seed)
    ids = [tokenizer.eot, *tokenizer.encode(args.prompt)]
    prompt = torch.tensor([ids], device=model.head.weight.device)
    print(args.prompt, end="", flush=True)
    tokens = generate(model, prompt, new_tokens=args.tokens, sampler=sampler, stop=tokenizer.eot)
    for piece in spoken((token.item() for token in tokens), tokenizer):
        print(piece, end="", flush=True)
    print()
    return 0


def speed(args, folder: Path, model: LanguageModel) -> int:
    """Print tokens a second of reading a prompt and of writing after it."""
    prompt = torch.randint(model.config.vocab_size, (args.batch_size, args.prompt_tokens), device=model.head.weight.device)
    best = fastest(model, prompt, new_tokens=args.tokens, repeats=args.repeats)
    rates = ", ".join(f"{phase} {rate:,.0f} tokens/s" for phase, rate in best.items())
    print(f"{rates} (batch {args.batch_size}, best of {args.repeats})")
    return 0


def length(args, folder: Path, model: LanguageModel) -> int:
    """Print bits per byte at multiples of the trained length, and the loss of the last tokens of each."""
    tokenizer, config = tokenizer_of(folder, args.tokenizer), read_config(folder)
    validation = validation_text(args, config, tokenizer)
    print(f"{'tokens':>8} {'bits per byte':>14} {'loss of the last eighth':>24}")
    for multiple in numbers(args.multiples, "multiples"):
        seq_len = int(multiple * config.seq_len)
        if model.position.max_len is not None and seq_len > model.position.max_len:
            raise ValueError(f"multiples: {config.position} ends at {model.position.max_len} tokens, before {seq_len}")

        def batches(seq_len=seq_len):
            return windows(validation, batch_size=args.batch_size, seq_len=seq_len, limit=args.tokens or None)

        bits = bits_per_byte(model, batches(), tokenizer.token_bytes)
        late = loss_by_position(model, batches())[-max(1, seq_len // 8) :].nanmean().item()
        print(f"{seq_len:>8} {bits:>14.4f} {late:>24.4f}")
    return 0


def passkeys(args, folder: Path, model: LanguageModel) -> int:
    """Print how often a number told long ago is said again, by length and by the place where it was told."""
    tokenizer, depths = tokenizer_of(folder, args.tokenizer), numbers(args.depths, "depths")
    print(f"{'characters':>10}" + "".join(f"  told at {depth:>4.0%}" for depth in depths) + f"   (chance {10**-args.digits:g})")
    for characters in numbers(args.lengths, "lengths"):
        rates = []
        for depth in depths:
            seeds = range(args.seed, args.seed + args.count)
            asked = (passkey(int(characters), depth=depth, seed=seed, digits=args.digits) for seed in seeds)
            rates.append(sum(answers(model, tokenizer, task.prompt, task.answer) for task in asked) / args.count)
        print(f"{int(characters):>10}" + "".join(f"{rate:>14.0%}" for rate in rates))
    return 0


def task(args, folder: Path, model: LanguageModel) -> int:
    """Print how often a task is answered rightly, beside guessing and the oracle."""
    kind, _, learned = read_config(folder).data.partition(":")
    if not args.name and kind != "task":
        raise ValueError(f"task: the model was trained on text, so name one: {', '.join(TASKS)}")
    make, options = resolve(args.name or learned, TASKS, "task")
    if kind == "task" and resolve(learned, TASKS, "task")[0] is make:
        options = resolve(learned, TASKS, "task")[1] | options  # those of the training where no others are given
    if args.lengths and "length" not in arguments(make):
        raise ValueError(f"lengths: {signature((args.name or learned).partition(':')[0], make)} has no length")
    print(f"{'tokens':>8} {'accuracy':>9} {'all right':>10} {'chance':>8} {'oracle':>8}")
    for length in numbers(args.lengths, "lengths") if args.lengths else [None]:
        made = make(**options if length is None else options | dict(length=int(length)))
        if made.vocab_size > model.config.vocab_size:
            raise ValueError(f"task: {made} has {made.vocab_size} ids, the model knows only {model.config.vocab_size}")
        rows = examples(made, batch_size=args.batch_size, count=args.count, seed=args.seed)
        cells = "{:>8} {accuracy:>9.2%} {complete:>10.2%} {:>8.2%} {oracle:>8.2%}"
        print(cells.format(made.seq_len, made.chance, **answered(model, rows, made.oracle)))
    return 0


def layers(args, folder: Path, model: LanguageModel) -> int:
    """Print for each layer what the loss rises by without it, how far it turns the stream, and the variance after it."""
    tokenizer, config = tokenizer_of(folder, args.tokenizer), read_config(folder)
    validation = validation_text(args, config, tokenizer)
    batch = next(iter(posed(windows(validation, batch_size=args.batch_size, seq_len=config.seq_len),
                            build(config.objective, OBJECTIVES, "objective"), tokenizer.vocab_size)))  # fmt: skip
    print(f"{'layer':>5} {'skipped, nats':>14} {'angle / pi':>11} {'variance':>10}")
    for number, effect in enumerate(layer_effects(model, *(x.to(model.head.weight.device) for x in batch[:2])), 1):
        print(f"{number:>5} {effect['skipped']:>14.4f} {effect['angle']:>11.4f} {effect['variance']:>10.3f}")
    return 0


def maps(args, folder: Path, model: LanguageModel) -> int:
    """Draw the attention of every head over a prompt, and print which tokens are sinks."""
    tokenizer = tokenizer_of(folder, args.tokenizer)
    ids = [tokenizer.eot, *tokenizer.encode(args.prompt)]
    weights = attention_maps(model, torch.tensor([ids], device=model.head.weight.device))
    if not weights:
        raise ValueError("checkpoint: the model has no layer of softmax attention")
    draw_maps(weights, Path(args.to))
    for number, found in enumerate(weights, 1):
        share, columns = found[0, :, 1:, 0].mean().item(), sinks_of(found)[0].any(0).nonzero()[:, 0].tolist()
        words = ", ".join(repr(tokenizer.decode([ids[i]])) for i in columns[:8]) or "none"
        print(f"layer {number}: {share:.0%} of the attention goes to the first token; sinks: {words}")
    print(f"wrote {args.to}")
    return 0


def experts(args, folder: Path, model: LanguageModel) -> int:
    """Print how even the loads of the experts are, and what an expert tells of the kind of text; draw their shares."""
    tokenizer, config, counted = tokenizer_of(folder, args.tokenizer), read_config(folder), []
    domains = args.domains or (entries(config.data) if config.domains else [config.data])
    told = domains_of(model, told=len(domains)) > 1
    for number, spec in enumerate(domains):
        text = load(spec, tokenizer)[1]
        batches = windows(text, batch_size=args.batch_size, seq_len=config.seq_len, limit=args.tokens)
        counted.append(expert_loads(model, batches, domain=number if told else None))
    loads = torch.stack(counted)  # (domains, layers, E)
    print(f"{'mixture':>7} {'busiest / mean':>15} {'idlest / mean':>14} {'entropy, bits':>14} {'of the domain, bits':>20}")
    for number, (row, told) in enumerate(zip(loads.sum(0), specialisation(loads), strict=True), 1):
        ratios = row.double() / row.double().mean()
        print(f"{number:>7} {ratios.max():>15.2f} {ratios.min():>14.2f} {entropy(row):>14.3f} {told:>20.3f}")
    draw_experts(loads, [Path(spec).name for spec in domains], Path(args.to))
    print(f"wrote {args.to}")
    return 0


def export_published(args, folder: Path, model: LanguageModel) -> int:
    """Write the model in the Hugging Face format, its tokenizer beside it."""
    export(model, Path(args.to))
    tokenizer_of(folder, args.tokenizer).save(args.to)
    print(f"wrote {args.to}")
    return 0


def validation_text(args, config: Config, tokenizer: Tokenizer) -> Tokens:
    """The validation text that --data and --val-data name, or else that of the run: of one domain, if the model is."""
    data, held = args.data or config.data, args.val_data or config.val_data
    told = config.domains and not (args.data or args.val_data)
    if told and args.domain >= 0:
        return validation_of_domain(data, held, tokenizer, args.domain)
    return (load_domains if told else load)(data, tokenizer, val_spec=held or None)[1]


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
    shared.add_argument("--domain", type=int, default=-1, metavar="N",
                        help="what the model is for this kind of text alone, where its experts belong to kinds")  # fmt: skip
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

    def text(parser: Parser) -> None:
        parser.add_argument("--data", default="", metavar="…", help="the text, as for train.py [that of the run]")
        parser.add_argument("--val-data", default="", metavar="…", help="judge on all of this instead")

    p = command("bpb", bpb)
    text(p)
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

    p = command("length", length)
    p.add_argument("--multiples", default="1,2,4,8", metavar="N,N", help="of the training length [1,2,4,8]")
    text(p)
    number(p, "--tokens", 32768, "how many, spread over the text (0: all)")
    number(p, "--batch-size", 4, "windows at once")

    p = command("passkey", passkeys)
    p.add_argument("--lengths", default="500,1000,2000", metavar="N,N", help="characters of the text [500,1000,2000]")
    p.add_argument("--depths", default="0,0.5,1", metavar="X,X", help="where the number is told [0,0.5,1]")
    number(p, "--digits", 5, "digits of the number")
    number(p, "--count", 10, "numbers a cell")
    number(p, "--seed", 0, "of the numbers")

    p = command("task", task)
    p.add_argument("name", nargs="?", default="", metavar="NAME:key=value", help="the task [that of the training]")
    p.add_argument("--lengths", default="", metavar="N,N", help="tokens of a sequence [that of the task]")
    number(p, "--count", 512, "sequences a length")
    number(p, "--batch-size", 16, "sequences at once")
    number(p, "--seed", 0, "of the sequences")

    p = command("layers", layers)
    text(p)
    number(p, "--batch-size", 16, "windows to look at")

    p = command("maps", maps)
    p.add_argument("--prompt", required=True, metavar="TEXT", help="the text to look at")
    p.add_argument("--to", default="attention.png", metavar="FILE", help="where to write [attention.png]")

    p = command("experts", experts)
    p.add_argument("--domains", nargs="+", default=[], metavar="…", help="kinds of text, as --data [the run's]")
    p.add_argument("--to", default="experts.png", metavar="FILE", help="where to write [experts.png]")
    number(p, "--tokens", 32768, "how many of each, spread over its validation text")
    number(p, "--batch-size", 16, "windows at once")

    command("export", export_published).add_argument("--to", required=True, metavar="FOLDER", help="where to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
