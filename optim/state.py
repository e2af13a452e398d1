"""A state_dict as named tensors and JSON, and back: checkpoints keep the first as safetensors and never need pickle.

JSON has no tensors, tuples or integer keys, so each is written as an object of one key that says what it is:
`{"tensor": name}`, `{"tuple": [items]}`, `{"dict": [[key, value], …]}`. Names are the paths through the state_dict,
`optimizers/0/state/3/mean`, the same in every process.
"""

from torch import Tensor

from .base import require

PLAIN = (type(None), bool, int, float, str)


def flatten_state(state_dict: dict) -> tuple[dict[str, Tensor], object]:
    """Split nested dicts, lists and tuples into tensors by name (same memory) and a tree for `json.dumps`.

    Leaves are tensors, None, bools, ints, floats and strings; keys are the latter five. ValueError naming any other.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: object, path: str) -> object:
        require(type(value) in PLAIN, path or "state_dict", value, "a tensor or what JSON can hold")
        return value

    def flatten(value: object, path: str) -> object:
        kind = type(value)
        if isinstance(value, Tensor):
            while path in tensors:  # "a/b" and "a", "b" spell the same path: prime the second
                path += "'"
            tensors[path] = value.detach()
            return {"tensor": path}
        below = f"{path}/" if path else ""
        if kind is dict:
            return {"dict": [[plain(key, path), flatten(item, f"{below}{key}")] for key, item in value.items()]}
        if kind in (list, tuple):
            items = [flatten(item, f"{below}{number}") for number, item in enumerate(value)]
            return items if kind is list else {"tuple": items}
        return plain(value, path)

    return tensors, flatten(state_dict, "")


def unflatten_state(tensors: dict[str, Tensor], tree: object) -> dict:
    """Inverse of `flatten_state`, exact. ValueError naming a tensor missing or left over, or a malformed tree."""
    unused = set(tensors)

    def unflatten(node: object) -> object:
        if isinstance(node, list):
            return [unflatten(item) for item in node]
        if not isinstance(node, dict):
            return node
        require(len(node) == 1, "tree", node, "made of objects of one key")
        ((kind, content),) = node.items()
        if kind == "tensor":
            require(content in tensors, "tensors", sorted(tensors), f"with {content!r}")
            unused.discard(content)
            return tensors[content]
        require(kind in ("tuple", "dict"), "tree", kind, "made of tensor, tuple and dict")
        if kind == "tuple":
            return tuple(unflatten(item) for item in content)
        return {key: unflatten(item) for key, item in content}

    state_dict = unflatten(tree)
    require(not unused, "tensors", sorted(unused), "all named in the tree")
    return state_dict
