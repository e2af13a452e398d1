"""Published weights in and out: folders in the Hugging Face format, config.json beside (sharded) safetensors.

A family of checkpoints is one file that says how its configuration reads as ours and which of its tensors is which of
ours; both directions are made from the same table.
"""

from pathlib import Path

import torch
from torch import Tensor

from models.checkpoint import load_weights, read_json, read_tensors, write_json, write_tensors
from models.config import Config
from models.huggingface import bert, bloom, gpt2, mamba, mamba2, modernbert
from models.huggingface.llama import GEMMA2, LLAMA, MISTRAL, OLMO2, QWEN2, QWEN3
from models.huggingface.mixtral import MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from models.huggingface.table import pick, stacked
from models.language_model import LanguageModel
from nn.attention import GQA, MHA, MQA
from nn.ffn import GLU, GeGLU, SwiGLU
from nn.moe.topk import Switch, TopK

FAMILIES = {
    "gpt2": gpt2,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "olmo2": OLMO2,
    "gemma2": GEMMA2,
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "bloom": bloom,
    "bert": bert,
    "modernbert": modernbert,
    "mamba": mamba,
    "mamba2": mamba2,
}
SAME = {MHA: GQA, MQA: GQA, SwiGLU: GLU, GeGLU: GLU, Switch: TopK}  # names for settings of another class
TIED = ("lm_head.weight", "decoder.weight", "cls.predictions.decoder.weight")  # the embedding, stored a second time
TRAINING = ("training", "balance", "z", "capacity")  # of a module: what inference does not ask for
SHARD_BYTES = 5 * 10**9


def is_huggingface(folder: Path) -> bool:
    """Whether a folder holds a published model rather than one of our checkpoints."""
    published = read_published(folder) if (folder / "config.json").is_file() else None
    return isinstance(published, dict) and "model_type" in published


def read_published(folder: Path) -> dict:
    """config.json, in the words of transformers."""
    published = read_json(folder / "config.json")
    return mamba.from_authors(published) if isinstance(published, dict) and mamba.is_authors(published) else published


def read_config(folder: Path) -> Config:
    """The configuration of a published model as ours. ValueError where the family or an option of it is not known here."""
    published = read_published(folder)
    try:
        return Config.of(**family_of(published.get("model_type")).config_in(published))
    except KeyError as error:
        raise ValueError(f"config.json: {error.args[0]} is missing") from None


def load(folder: Path, *, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A published model with its weights, on the CPU. ValueError naming a tensor that is missing, left over or misshapen."""
    config = read_config(folder)
    family = family_of(read_published(folder)["model_type"])
    with torch.device("meta"):
        model = LanguageModel(config)
    wanted = model.state_dict()
    theirs = {renamed(name.removeprefix(family.PREFIX)): tensor for name, tensor in read_folder(folder).items()}
    ours = {}
    for entry in family.table(model):
        if entry.theirs not in theirs:
            raise ValueError(f"{str(folder)!r}: the tensor {entry.theirs!r} is missing")
        parts = entry.split(theirs.pop(entry.theirs), [len(pick(wanted, name)) for name in entry.ours])
        for name, part in zip(entry.ours, parts, strict=True):
            if part.shape != (shape := pick(wanted, name).shape):
                raise ValueError(f"tensor {entry.theirs!r} gives {name!r} the shape {tuple(part.shape)}, not {tuple(shape)}")
            ours[name] = part.to(dtype) if name not in ours else ours[name] + part.to(dtype)
    for name in TIED if config.tie else ():
        theirs.pop(name, None)
    if left := [name for name in theirs if not family.IGNORED.fullmatch(name)]:
        raise ValueError(f"{str(folder)!r}: tensors that this model has no place for: {', '.join(sorted(left)[:4])}")
    load_weights(model, stacked(ours), str(folder))
    return model


def renamed(name: str) -> str:
    """A tensor's name as it is today: gains and biases of BERT's first checkpoints are called gamma and beta.

    Mamba's authors call the embedding table `embedding`.
    """
    if name == "embedding.weight":
        return "embeddings.weight"
    start, _, last = name.rpartition("LayerNorm.")
    return start + "LayerNorm." + {"gamma": "weight", "beta": "bias"}.get(last, last) if start else name


def export(model: LanguageModel, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model as its published family would be: config.json and model.safetensors, in shards where it is large."""
    if model.config.adapt:
        raise ValueError("export: the model is adapted; python -m models.merge_adapter makes it plain")
    name = next((name for name, family in FAMILIES.items() if holds(family, model)), None)
    if name is None:
        raise ValueError(f"export: no published family has this stack; there are {', '.join(FAMILIES)}")
    family, ours = FAMILIES[name], model.state_dict()
    prefixed = {True: family.PREFIX, False: ""}
    theirs = {prefixed[e.prefixed] + e.theirs: e.join([pick(ours, name) for name in e.ours]) for e in family.table(model)}
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    write_json(folder / "config.json", {"model_type": name, **family.config_out(model), "dtype": dtype, "torch_dtype": dtype})
    write_folder(folder, theirs, shard_bytes)


def holds(family, model: LanguageModel) -> bool:
    """Whether a checkpoint of a family can be this model: what would be written in config.json reads as the same again."""
    if not family.fits(model):
        return False
    with torch.device("meta"):
        again = LanguageModel(Config.of(**family.config_in(family.config_out(model))))
    return facts(again) == facts(model)


def facts(model: LanguageModel) -> list:
    """What a model is made of: its modules with their settings, but for those of training, its tensors with their shapes."""
    simple = (bool, int, float, str)
    modules = [
        (name, SAME.get(type(m), type(m)), {k: v for k, v in vars(m).items() if isinstance(v, simple) and k not in TRAINING})
        for name, m in model.named_modules()
    ]
    whole = [getattr(model.config, name) for name in ("tie", "softcap", "embedding_scale")]
    return [modules, whole, [(name, tensor.shape) for name, tensor in model.state_dict().items()]]


def family_of(model_type: str | None):
    if model_type not in FAMILIES:
        raise ValueError(f"config.json: model_type {model_type!r} is not known here; there are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from model.safetensors or from the shards that model.safetensors.index.json names."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return read_tensors(folder / "model.safetensors")
    places = read_json(index).get("weight_map", {})
    shards = {name: read_tensors(folder / name) for name in sorted(set(places.values())) if Path(name).name == name}
    for tensor, shard in places.items():
        if tensor not in shards.get(shard, {}):
            raise ValueError(f"{str(folder)!r}: {tensor!r} is not in {shard!r}, where the index puts it")
    return {tensor: shards[shard][tensor] for tensor, shard in places.items()}


def write_folder(folder: Path, tensors: dict[str, Tensor], shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        return write_tensors(folder / "model.safetensors", tensors)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, shard)
    places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
