"""A Hugging Face tokenizer.json with a byte-level BPE model, as tiktoken ranks: GPT-2's, Llama 3's and their kin.

Both formats hold the same tokenizer, written differently. There a piece is spelt in GPT-2's byte alphabet and the order
of merging is a list; here a piece is bytes and its id is its place in that order. The two encode alike where ids grow
along the list of merges, which is checked. What tiktoken cannot express is refused by name rather than approximated.
"""

import json
import os

from data.bpe import byte_alphabet

# How GPT-2 (Radford et al. 2019) cuts text into words; what `ByteLevel` uses when no `Split` stands before it.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# The special tokens that end a text, in published vocabularies: GPT-2 and its kin, Llama 3.
END_NAMES = ("<|endoftext|>", "<|end_of_text|>")


def read_tokenizer_json(path: str | os.PathLike) -> dict:
    """Keyword arguments for `Tokenizer`: ranks {piece: id}, pattern, specials {name: id} and eot, its name.

    All added tokens become specials, so that text never turns into one. Raises ValueError, one line naming the file and
    the part, for: a model other than byte-level BPE (sentencepiece, WordPiece, Unigram), a normalizer, a prefix space,
    several splits, added words that take part in ordinary text, ids that do not follow the merges, no end of text.
    """
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    try:
        return _convert(document, path)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a tokenizer.json ({type(error).__name__}: {error})") from None


def _convert(document: dict, path) -> dict:
    model = document["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or model.get("continuing_subword_prefix"):
        kind = "BPE with byte fallback (sentencepiece)" if model.get("byte_fallback") else model.get("type")
        raise ValueError(f"{path}: the model is {kind}; only byte-level BPE (as GPT-2's, Llama 3's) can be read")
    if document.get("normalizer"):
        raise ValueError(f"{path}: it changes text before encoding (normalizer {document['normalizer'].get('type')})")

    tokens = document.get("added_tokens") or []
    added = {str(token["content"]): int(token["id"]) for token in tokens}
    words = [token["content"] for token in tokens if token["normalized"] and not token["special"]]
    if words:
        raise ValueError(f"{path}: {len(words)} added tokens such as {words[0]!r} are words outside the merges")
    eot = next((name for name in END_NAMES if name in added), None)
    if eot is None:
        raise ValueError(f"{path}: no added token named {' or '.join(END_NAMES)} to mark the end of a text")

    alphabet, ranks = byte_alphabet(), {}
    for piece, i in model["vocab"].items():
        if added.get(piece) == i:
            continue
        if not isinstance(i, int):
            raise TypeError(f"id {i!r}")
        if not piece or any(char not in alphabet for char in piece):
            raise ValueError(f"{path}: piece {piece!r} is not spelt in the byte alphabet, so it is no byte-level BPE")
        ranks[bytes(alphabet[char] for char in piece)] = i
    _check_merges(model, path)
    return {"ranks": ranks, "pattern": _pattern(document["pre_tokenizer"], path), "specials": added, "eot": eot}


def _check_merges(model: dict, path) -> None:
    """tiktoken joins the pair whose result has the lowest id: right only if results come in order of id."""
    last = -1
    for merge in model["merges"]:
        left, _, right = merge.partition(" ") if isinstance(merge, str) else (merge[0], "", merge[1])
        result = model["vocab"][left + right]
        if result < last:
            raise ValueError(f"{path}: merge {left!r} + {right!r} gives id {result} after {last}, out of order")
        last = result


def _pattern(pre_tokenizer: dict | None, path) -> str:
    """The regular expression: of the one `Split` before `ByteLevel`, or GPT-2's, which is `ByteLevel`'s own."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    kinds = [step and step["type"] for step in steps]
    plain = kinds and kinds[-1] == "ByteLevel" and not steps[-1]["add_prefix_space"]
    if plain and kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return GPT2_PATTERN
    if plain and kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        split = steps[0]
        if split["behavior"] == "Isolated" and not split["invert"] and isinstance(split["pattern"].get("Regex"), str):
            return split["pattern"]["Regex"]
    raise ValueError(f"{path}: pre_tokenizer {kinds} so set; only [Split by a regex,] ByteLevel can be read")
