import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """A context that counts the bytes of the tensors made within it: `now` alive, and `peak`, the most there were at once.

    A tensor is counted from the operation that makes its memory until nobody refers to that memory; views count nothing. What
    an operation takes and gives back before it ends is not seen, nor what a Triton kernel or a library takes. It works on
    any device, on the meta device too, and in the backward pass if that runs in the same thread, as it does on a CPU.

        with LiveBytes() as live:
            loss = model(tokens, targets)
            kept = live.now
            loss.backward()
        print(kept, live.peak)
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {address(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        result = function(*args, **kwargs or {})
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and address(value) not in given | self.known:
                self.count(value)
        return result

    def count(self, made: Tensor) -> None:
        storage = made.untyped_storage()
        size = storage.nbytes()
        self.known.add(address(made))
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, address(made), size)

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def address(value: Tensor) -> int:
    return value.untyped_storage()._cdata
