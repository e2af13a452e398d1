from torch import Tensor

from kernels.intervals import spans
from nn.context import Context


def document_spans(context: Context) -> tuple[Tensor, Tensor] | None:
    """What `attention` takes as shared_spans: the interval of keys that each token of a packed row sees.

    Worked out once a call, however many layers ask. None where a row is one document.
    """
    documents = context.documents
    if documents is None:
        return None
    (B, T), causal = documents.shape, context.causal
    return context.once("document spans", lambda: spans(B, T, T, causal=causal, documents=documents))
