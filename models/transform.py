"""Commands that read a checkpoint, change its model and write it to a folder of its own."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from models.checkpoint import find
from models.config import Parser
from models.language_model import LanguageModel
from models.weights import load_model, save_model


def command(argv: list[str] | None, name: str, doc: str, flags: Callable[[Parser], None],
            change: Callable[..., LanguageModel], *, told: Callable[..., dict] = lambda **_: {}) -> int:  # fmt: skip
    """Read a checkpoint, change its model, write it to a folder with its tokenizer. 2 after a mistake, told in one line.

    `flags` adds options to the parser; `change(model, **options)` gives the new model. What differs is printed, where both
    are told `told(**options)` beside the tokens.
    """
    parser = Parser(prog=f"python -m models.{name}", description=doc.splitlines()[0])
    parser.add_argument("checkpoint", help="a run, a checkpoint or a published model")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the new model goes; must not exist yet")
    flags(parser)
    options = vars(parser.parse_args(argv))
    place, target = options.pop("checkpoint"), options.pop("out")
    try:
        folder, out = find(Path(place)), Path(target)
        if out.exists():
            raise ValueError(f"out: {target!r} exists already")
        model = load_model(folder).eval()
        made = change(model, **options)
        tokens = torch.randint(model.config.vocab_size, (1, min(model.config.seq_len, 64)))
        with torch.inference_mode():
            before, after = (m(tokens, **told(**options)) for m in (model, made))
        out.mkdir(parents=True)
        save_model(made, out)
        copy_tokenizer(folder, out)
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    print(*changes(model, made), sep="\n")
    print(f"wrote {target}: {made.config.norm}, width {made.config.dim} (was {model.config.norm}, {model.config.dim}); "
          f"of logits up to {before.abs().max():.3g} none moved by more than {(after - before).abs().max():.1g}")  # fmt: skip
    return 0


def changes(model: LanguageModel, made: LanguageModel) -> list[str]:
    """What became of each kind of sublayer, and how many sublayers and parameters there were and are."""
    sizes = [(len(m.specs), sum(parameter.numel() for parameter in m.parameters())) for m in (model, made)]
    pairs = zip(model.specs, made.specs, strict=True) if sizes[0][0] == sizes[1][0] else ()
    lines = [f"{old} -> {new}" for old, new in sorted(set(pairs)) if old != new]
    return [*lines, "{:,} sublayers, {:,} parameters -> {:,} sublayers, {:,} parameters".format(*sizes[0], *sizes[1])]


def copy_tokenizer(source: Path, target: Path) -> None:
    for path in source.glob("*"):
        if path.name == "tokenizer" and path.is_dir():
            shutil.copytree(path, target / path.name)
        elif path.name.startswith(("tokenizer", "vocab", "merges")):
            shutil.copy(path, target)
