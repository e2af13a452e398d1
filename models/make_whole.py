"""A checkpoint that several processes wrote, each its parts, as a plain folder: config.json, one model.safetensors, tokenizer.

    python -m models.make_whole runs/20261130-201500 --out plain

Everything reads either kind, so this is for other programs, and for who wants the weights without the optimizer.
"""

import sys
from pathlib import Path

from models.checkpoint import find, write_tensors
from models.config import Parser
from models.transform import copy_tokenizer
from models.weights import read_config, save_config, tensors_of


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m models.make_whole", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a run or a checkpoint of ours")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the plain folder goes; must not exist yet")
    given = parser.parse_args(argv)
    try:
        folder, out = find(Path(given.checkpoint)), Path(given.out)
        if out.exists():
            raise ValueError(f"out: {given.out!r} exists already")
        config, tensors = read_config(folder), tensors_of(folder, "model")
        out.mkdir(parents=True)
        save_config(config, out)
        write_tensors(out / "model.safetensors", tensors)
        copy_tokenizer(folder, out)
    except (ValueError, OSError) as error:
        print(f"make_whole: {error}", file=sys.stderr)
        return 2
    print(f"wrote {out}: {sum(tensor.numel() for tensor in tensors.values()):,} numbers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
