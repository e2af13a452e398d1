"""Text in: from a corpus to batches of token ids. In reading order:

    sources      what `--data` names: files, folders, globs, downloads
    download     an http(s) file, resumed and whole
    corpus       documents, and which of them are for validation
    bpe          byte-pair encoding learnt from text
    tokenizer    text to ids and back; `load_tokenizer` for `--tokenizer`
    hf_tokenizer a Hugging Face tokenizer.json as ranks
    token_files  files of ids written elsewhere
    tokens       text as a memory-mapped stream of ids; `load` for the whole way, `load_domains` for several kinds of text
    text         the whole way: a tokenizer, and tokens for training and validation
    loader       batches: random windows for training, all windows for evaluation
    tasks        sequences made by a rule, with answers that are known
    task_loader  batches of a task
    tfidf        texts as points
    balanced     k-means with clusters of equal size
    cluster      a corpus in parts, an expert for each
    contexts     how far a text so far is from each cluster
    cache        where all of this is kept, and how it is written whole

The whole way:

    tokenizer, training, validation = open_text("python", vocab_size=4096)
    for inputs, targets, documents in Loader(training, batch_size=16, seq_len=256, seed=0): ...
"""

from data.cache import cache_folder
from data.corpus import Document, documents, is_validation, python_library, training_documents, validation_documents
from data.loader import IGNORE, Batch, Loader, windows
from data.task_loader import TaskLoader, examples
from data.tasks import TASKS, Task
from data.text import open_text
from data.token_files import write_shard
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokens import Tokens, load, load_domains, tokenize

__all__ = [
    "IGNORE",
    "TASKS",
    "Batch",
    "Document",
    "Loader",
    "Task",
    "TaskLoader",
    "Tokenizer",
    "Tokens",
    "cache_folder",
    "documents",
    "examples",
    "is_validation",
    "load",
    "load_domains",
    "load_tokenizer",
    "open_text",
    "python_library",
    "tokenize",
    "training_documents",
    "validation_documents",
    "windows",
    "write_shard",
]
