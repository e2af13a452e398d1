"""Against the `transformers` package: checkpoints of BERT and ModernBERT give its logits here, and ours give ours there."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models import Config, LanguageModel, build_model, huggingface
from models.describe import parameters
from models.weights import load_model, read_config

transformers = pytest.importorskip("transformers")

VOCAB = 61
ROPES = dict(
    full_attention=dict(rope_type="default", rope_theta=900.0), sliding_attention=dict(rope_type="default", rope_theta=30.0)
)
BERTS = {
    "plain": dict(),
    "relu, eps": dict(hidden_act="relu", layer_norm_eps=1e-3),
    "tanh, one head": dict(hidden_act="gelu_new", num_attention_heads=1, num_hidden_layers=3),
    "silu, narrow": dict(hidden_act="silu", intermediate_size=7),
}
MODERNBERTS = {
    "plain": dict(),
    "every other layer, bases": dict(num_hidden_layers=3, global_attn_every_n_layers=2, rope_parameters=ROPES),
    "biases": dict(norm_bias=True, attention_bias=True, mlp_bias=True, classifier_bias=True, local_attention=3),
    "no bias at all, eps": dict(decoder_bias=False, norm_eps=1e-3, local_attention=2),
    "activations, untied": dict(hidden_activation="silu", classifier_activation="relu", tie_word_embeddings=False),
    "tanh, untied, no bias": dict(hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=False, decoder_bias=False),
    "layers as they come": dict(layer_types=["sliding_attention"] * 2 + ["full_attention"] * 2, rope_parameters=ROPES),
    "all global": dict(global_attn_every_n_layers=1, num_hidden_layers=2),
}
CLASSES = dict(bert="Bert", modernbert="ModernBert")
ALL = [(family, name, options) for family, cases in (("bert", BERTS), ("modernbert", MODERNBERTS))
       for name, options in cases.items()]  # fmt: skip
each = pytest.mark.parametrize(("family", "options"), [pytest.param(f, options, id=f"{f}: {name}") for f, name, options in ALL])
both = pytest.mark.parametrize("family", CLASSES)


def theirs(family: str, **options) -> nn.Module:
    """A small model of theirs with random weights, of which none is at its initial 0 or 1."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=42, num_attention_heads=2, max_position_embeddings=37)
    sizes |= dict(num_hidden_layers=2) if family == "bert" else dict(num_hidden_layers=4, local_attention=9)
    sizes |= dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    config = getattr(transformers, f"{CLASSES[family]}Config")(**sizes | options)
    model = getattr(transformers, f"{CLASSES[family]}ForMaskedLM")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tokens(batch: int = 2, length: int = 37) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same(ours: nn.Module, peer: nn.Module) -> None:
    """Logits equal to 1e-5 of their size in float32, of a whole text and of a short one."""
    for length in (37, 3):
        logits = peer(tokens(length=length)).logits
        torch.testing.assert_close(ours(tokens(length=length)), logits, rtol=0, atol=1e-5 * logits.abs().max().item())


@each
@pytest.mark.parametrize("shard_size", ["1GB", "8KB"])
def test_theirs_here(family, options, shard_size, tmp_path):
    peer = theirs(family, **options)
    peer.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "8KB")
    ours = load_model(tmp_path)  # what eval.py calls
    types = 2 * 24 if family == "bert" else 0
    assert sum(p.numel() for p in ours.parameters()) + types == sum(p.numel() for p in peer.parameters())
    assert_same(ours, peer)
    targets = tokens().roll(1, dims=1).masked_fill(tokens() % 3 > 0, -100)
    with torch.no_grad():
        loss = peer(tokens(), labels=targets).loss * (targets >= 0).sum()  # theirs is the mean
        torch.testing.assert_close(ours(tokens(), targets), loss, rtol=1e-5, atol=0)


@each
@pytest.mark.parametrize("shard_bytes", [10**9, 8000])
def test_theirs_here_and_back(family, options, shard_bytes, tmp_path):
    """Exported again, the folder is theirs: every tensor bit for bit, but for BERT's types, which are in the positions."""
    peer = theirs(family, **options)
    peer.save_pretrained(tmp_path / "theirs")
    huggingface.export(huggingface.load(tmp_path / "theirs"), tmp_path / "ours", shard_bytes=shard_bytes)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists() == (shard_bytes == 8000)
    back, report = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(back) is type(peer) and not any(report.values()) and back.dtype == torch.float32
    expected, found = peer.state_dict(), back.state_dict()
    if family == "bert":
        types = expected["bert.embeddings.token_type_embeddings.weight"]
        expected["bert.embeddings.position_embeddings.weight"] += types[0]
        expected["bert.embeddings.token_type_embeddings.weight"] = torch.zeros_like(types)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert_same(huggingface.load(tmp_path / "ours"), back.eval())


SMALL = dict(
    model="gpt2", vocab_size=VOCAB, dim=24, heads=2, depth=3, seq_len=37, objective="masked", head="transform", tie=True
)
BERT = SMALL | dict(norm="layernorm:eps=1e-12", norm_place="post", embedding_norm="extra", ffn="mlp:bias=true:width=40")
MODERNBERT = SMALL | dict(
    norm="layernorm:bias=false", embedding_norm="first", position="rope:theta=900", ffn="geglu:width=30",
    head="transform:bias=false", mixer="gqa,gqa:window=4:theta=30",
)  # fmt: skip
EXPORTED = [
    BERT,
    BERT | dict(ffn="mlp:activation=relu:bias=1:width=9", head="transform:activation=relu", mixer="gqa:bias=true"),
    BERT | dict(ffn="mlp:activation=gelu_tanh:bias=1", head="transform:activation=gelu_tanh", objective="masked:rate=0.15"),
    MODERNBERT,
    MODERNBERT | dict(mixer="mha", head="transform:decoder_bias=false", tie=False),
    MODERNBERT | dict(mixer="gqa:bias=1:window=4,gqa:bias=1:window=4,gqa:bias=1", norm="layernorm", ffn="swiglu:bias=yes"),
    MODERNBERT | dict(mixer="gqa:window=1:theta=30", ffn="glu:activation=gelu_tanh", head="transform:activation=silu"),
]


def ours(**options) -> LanguageModel:
    model = build_model(Config.of(**options))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("options", EXPORTED)
def test_ours_there_and_here_again(options, tmp_path):
    model = ours(**options)
    huggingface.export(model, tmp_path)
    peer, report = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_same(model, peer.eval())
    again, before = huggingface.load(tmp_path).state_dict(), model.state_dict()
    assert again.keys() == before.keys() and all(torch.equal(again[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    "options",
    [
        BERT | dict(tie=False), BERT | dict(objective="next"), BERT | dict(embedding_norm="none"),
        BERT | dict(head="linear:decoder_bias=true"), BERT | dict(head="transform:activation=relu"),
        BERT | dict(head="transform:bias=false"), BERT | dict(head="transform:decoder_bias=false"),
        BERT | dict(norm="layernorm:bias=false"), BERT | dict(position="none"), BERT | dict(mixer="gqa:kv_heads=1:bias=1"),
        BERT | dict(softcap=2.0), BERT | dict(mixer="gqa:bias=true:window=5"), BERT | dict(norm="rmsnorm"),
        BERT | dict(ffn="mlp:activation=relu2:bias=true"), BERT | dict(embedding_scale=2.0), BERT | dict(norm_place="pre"),
        MODERNBERT | dict(objective="next"), MODERNBERT | dict(embedding_norm="extra"),
        MODERNBERT | dict(embedding_norm="none"), MODERNBERT | dict(position="none", mixer="gqa"),
        MODERNBERT | dict(mixer="gqa:window=4:theta=30,gqa:window=5:theta=30"), MODERNBERT | dict(head="linear"),
        MODERNBERT | dict(mixer="gqa:window=4:theta=30,gqa:window=4:theta=31"), MODERNBERT | dict(mixer="gqa,gqa:theta=30"),
        MODERNBERT | dict(position="rope:factor=2"), MODERNBERT | dict(position="rope:fraction=0.5"),
        MODERNBERT | dict(mixer="gqa,gqa:bias=true"), MODERNBERT | dict(ffn="glu"), MODERNBERT | dict(norm_place="scaled"),
        MODERNBERT | dict(mixer="gqa:qk_norm=unit"), MODERNBERT | dict(mixer="gqa,gqa:window=4:global_tokens=1"),
    ],
)  # fmt: skip
def test_what_no_family_holds(options, tmp_path):
    with pytest.raises(ValueError, match="^export: no published family has this stack; there are gpt2, .*bert, modernbert"):
        huggingface.export(ours(**options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@both
def test_published_sizes(family):
    """The configuration that their package has by default is that of the published base model: as many parameters here."""
    config = getattr(transformers, f"{CLASSES[family]}Config")()
    with torch.device("meta"):
        peer = getattr(transformers, f"{CLASSES[family]}ForMaskedLM")(config)
        model = LanguageModel(Config.of(**huggingface.FAMILIES[family].config_in(config.to_dict())))
    counts = [sum(p.numel() for p in m.parameters()) for m in (peer, model)]
    types = 2 * 768 if family == "bert" else 0
    assert counts == dict(bert=[109_514_298, 109_514_298 - types], modernbert=[149_655_232] * 2)[family]
    assert sum(parameters(model).values()) == counts[1]


@both
def test_bfloat16(family, tmp_path):
    theirs(family).to(torch.bfloat16).save_pretrained(tmp_path)
    kept, widened = huggingface.load(tmp_path, dtype=torch.bfloat16), huggingface.load(tmp_path)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert_same(widened, type(theirs(family)).from_pretrained(tmp_path, dtype=torch.float32))
    huggingface.export(kept, tmp_path / "again")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "again").dtype == torch.bfloat16


@both
def test_its_config_says_what_it_is(family, tmp_path):
    theirs(family).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert config.objective.startswith("masked") and not load_model(tmp_path).causal
    if family == "modernbert":
        assert config.mixer == "gqa:bias=false" + 2 * ",gqa:bias=false:window=5:theta=10000.0"
        assert (config.position, config.embedding_norm) == ("rope:theta=160000.0", "first")


# Files as they were published, and folders that are not as they should be


def edit_json(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def test_bert_as_google_published_it(tmp_path):
    """LayerNorms of a gamma and a beta, the tied tensors a second time, and what belongs to other tasks."""
    peer = theirs("bert")
    peer.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(path).items()
    }
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    tensors |= {f"bert.pooler.dense.{kind}": torch.zeros(24) for kind in ("weight", "bias")}
    tensors |= {f"cls.seq_relationship.{kind}": torch.zeros(2) for kind in ("weight", "bias")}
    tensors["bert.embeddings.position_ids"] = torch.arange(37)[None]
    save_file(tensors, path)
    edit_json(tmp_path / "config.json", tie_word_embeddings=..., is_decoder=..., add_cross_attention=...)
    assert_same(huggingface.load(tmp_path), peer)


@pytest.mark.parametrize("local", [30.0, None])
def test_modernbert_as_it_was_published(local, tmp_path):
    """Two bases beside everything else (none of its own: that of the others) and the number of layers to each global one."""
    ropes = json.loads(json.dumps(ROPES))
    ropes["sliding_attention"]["rope_theta"] = local or 900.0
    peer = theirs("modernbert", rope_parameters=ropes, global_attn_every_n_layers=2)
    peer.save_pretrained(tmp_path)
    older = dict(global_rope_theta=900.0, local_rope_theta=local, global_attn_every_n_layers=2, deterministic_flash_attn=False)
    edit_json(tmp_path / "config.json", rope_parameters=..., layer_types=..., **older)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["decoder.weight"] = tensors["model.embeddings.tok_embeddings.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(huggingface.load(tmp_path), peer)


def complaint(folder) -> str:
    with pytest.raises(ValueError) as caught:
        load_model(folder)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "parts"),
    [
        ("bert", dict(hidden_act="quick_gelu"), ["hidden_act = 'quick_gelu' is not supported, only gelu, "]),
        ("bert", dict(is_decoder=True), ["is_decoder = True is not supported"]),
        ("bert", dict(add_cross_attention=True), ["add_cross_attention = True"]),
        ("bert", dict(position_embedding_type="relative_key"), ["position_embedding_type = 'relative_key'"]),
        ("bert", dict(type_vocab_size=4), ["type_vocab_size = 4"]),
        ("bert", dict(tie_word_embeddings=False), ["tie_word_embeddings = False"]),
        ("bert", dict(intermediate_size=...), ["config.json: intermediate_size is missing"]),
        ("bert", dict(num_hidden_layers=3), ["'encoder.layer.2.", "is missing"]),
        ("bert", dict(num_hidden_layers=1), ["no place for: encoder.layer.1."]),
        ("bert", dict(max_position_embeddings=36), ["position_embeddings.weight"]),
        ("modernbert", dict(hidden_activation="quick_gelu"), ["hidden_activation = 'quick_gelu'", "gelu_pytorch_tanh"]),
        ("modernbert", dict(classifier_activation="sigmoid"), ["classifier_activation = 'sigmoid'"]),
        ("modernbert", dict(layer_types=["full_attention"]), ["layer_types are full_attention or sliding_attention, 4 of"]),
        ("modernbert", dict(layer_types=["chunked_attention"] * 4), ["layer_types are full_attention or sliding"]),
        ("modernbert", dict(rope_parameters=dict(full_attention=dict(rope_type="yarn"))), ["rope_type = 'yarn'", "default"]),
        ("modernbert", dict(rope_scaling=dict(rope_type="linear", factor=2.0)), ["rope_type = 'linear'"]),
        ("modernbert", dict(layer_types=..., global_attn_every_n_layers=0), ["global_attn_every_n_layers: 0 is too small"]),
        ("modernbert", dict(norm_bias=True), ["'embeddings.norm.bias' is missing"]),
        ("modernbert", dict(decoder_bias=False), ["no place for: decoder.bias"]),
        ("modernbert", dict(num_attention_heads=5), ["heads: a dim of 24 does not divide into 5 heads"]),
        ("modernbert", dict(local_attention=-2), ["window: 0 is too small"]),
    ],
)  # fmt: skip
def test_unsupported_options(family, changes, parts, tmp_path):
    theirs(family).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    message = complaint(tmp_path)
    for part in parts:
        assert part in message


@both
def test_tensors_missing_left_over_or_misshapen(family, tmp_path):
    theirs(family).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    good = load_file(path)
    for name, tensor in good.items():
        save_file({key: value for key, value in good.items() if key != name}, path)
        assert f"{name.removeprefix('model.').removeprefix('bert.')!r} is missing" in complaint(tmp_path)
        for shape in ((3 * tensor.shape[0], *tensor.shape[1:]), (*tensor.shape[:-1], 5), (*tensor.shape, 2), ()):
            save_file(good | {name: torch.zeros(shape)}, path)
            complaint(tmp_path)
    save_file(good | {"model.extra.weight": torch.zeros(1)}, path)
    assert "extra.weight" in complaint(tmp_path)
    save_file(good | {"head.weight": torch.zeros(1)}, path)
    assert "no place for: head.weight" in complaint(tmp_path)
