"""A text to learn: its tokenizer, and its tokens for training and for validation."""

from pathlib import Path

from data.corpus import training_documents
from data.sources import entries
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokens import Tokens, load, load_domains


def open_text(
    spec: str,
    *,
    val_spec: str = "",
    tokenizer: str = "bpe",
    vocab_size: int,
    saved: Path | None = None,
    domains: bool = False,
) -> tuple[Tokenizer, Tokens, Tokens]:
    """The tokenizer in the folder `saved`, or else the one that `tokenizer` names ("bpe" learns from the text); and tokens.

    `spec` and `val_spec` are as --data and --val-data have them, "" a share of `spec`; with `domains` each of their entries
    is a kind of text of its own. ValueError for what cannot be read.
    """

    def texts():
        return (document.text for document in training_documents(spec, val_spec or None))

    made = Tokenizer.load(saved) if saved else load_tokenizer(tokenizer, texts=texts, vocab_size=vocab_size)
    return made, *(load_domains if domains else load)(spec, made, val_spec=val_spec or None)


def validation_of_domain(spec: str, val_spec: str, tokenizer: Tokenizer, domain: int) -> Tokens:
    """What `open_text` keeps for validation of one of its domains. ValueError where there is no such domain."""
    data, held = (entries(each) if each else [] for each in (spec, val_spec))
    if not 0 <= domain < len(data):
        raise ValueError(f"domain: {domain} is none of 0 to {len(data) - 1}")
    return load(data[domain], tokenizer, val_spec=held[domain] if held else None)[1]
