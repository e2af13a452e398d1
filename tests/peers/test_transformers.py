"""Against the `transformers` package: its checkpoints give its logits and its text here, and ours give ours there."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models import Config, LanguageModel, build_model, huggingface
from models.generate import Sampler, generate
from models.weights import load_model, read_config

transformers = pytest.importorskip("transformers")

VOCAB = 61
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
    rope_theta=500.0,
)
GPT2S = {
    "plain": dict(),
    "narrow ffn, gelu": dict(n_inner=20, activation_function="gelu"),
    "relu, eps": dict(activation_function="relu", layer_norm_epsilon=1e-3),
    "silu, one head": dict(activation_function="silu", n_head=1),
    "tanh, untied": dict(activation_function="gelu_pytorch_tanh", tie_word_embeddings=False),
}
LLAMAS = {
    "plain": dict(),
    "gqa, tied": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "mqa, eps": dict(num_key_value_heads=1, rms_norm_eps=1e-3),
    "attention bias": dict(attention_bias=True, num_key_value_heads=2),
    "mlp bias": dict(mlp_bias=True),
    "head dim": dict(head_dim=10, num_key_value_heads=2),
    "theta": dict(rope_parameters=dict(rope_type="default", rope_theta=777.0)),
    "llama3": dict(rope_parameters=LLAMA3),
}
BLOOMS = {
    "plain": dict(),
    "heads that are no power of two, eps": dict(n_head=6, layer_norm_epsilon=1e-3),
    "one head, untied": dict(n_head=1, tie_word_embeddings=False),
    "as it was split over GPUs": dict(n_head=3, pretraining_tp=2),
}


WINDOWED = dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)
RELATIVES = {
    "mistral": {"window": dict(sliding_window=6), "window, gqa": dict(sliding_window=3, num_key_value_heads=2, head_dim=8)},
    "qwen2": {"plain": dict(), "last layers windowed, tied": WINDOWED | dict(tie_word_embeddings=True, num_key_value_heads=2)},
    "qwen3": {"plain": dict(), "windowed": WINDOWED, "bias": dict(attention_bias=True, num_key_value_heads=2, head_dim=6)},
    "olmo2": {"plain": dict(), "gqa, eps": dict(num_key_value_heads=2, rms_norm_eps=1e-3)},
    "gemma2": {
        "plain": dict(sliding_window=6),
        "bare": dict(sliding_window=7, attn_logit_softcapping=None, final_logit_softcapping=None, query_pre_attn_scalar=10),
        "gqa, softcaps": dict(
            sliding_window=4, num_key_value_heads=2, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
            layer_types=["full_attention", "sliding_attention"],
        ),
    },
}  # fmt: skip
MIXTURES = {
    "mixtral": {
        "plain": dict(num_local_experts=4),
        "one of three, gqa, window": dict(num_local_experts=3, num_experts_per_tok=1, num_key_value_heads=2, sliding_window=6),
    },
    "olmoe": {
        "plain": dict(num_experts=6, num_experts_per_tok=3),
        "renormalised, gqa, bias": dict(
            num_experts=3, num_experts_per_tok=2, norm_topk_prob=True, num_key_value_heads=2, attention_bias=True
        ),
    },
    "qwen2_moe": {
        "plain": dict(num_experts=5, num_experts_per_tok=3, moe_intermediate_size=12, shared_expert_intermediate_size=20),
        "renormalised, tied": dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True,
                                   shared_expert_intermediate_size=8, tie_word_embeddings=True),
    },
    "qwen3_moe": {
        "plain": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12),
        "renormalised, gqa": dict(
            num_experts=4, num_experts_per_tok=3, moe_intermediate_size=8, norm_topk_prob=True, num_key_value_heads=2
        ),
    },
}  # fmt: skip
CLASSES = dict(llama="Llama", mistral="Mistral", qwen2="Qwen2", qwen3="Qwen3", olmo2="Olmo2", gemma2="Gemma2")
CLASSES |= dict(mixtral="Mixtral", olmoe="Olmoe", qwen2_moe="Qwen2Moe", qwen3_moe="Qwen3Moe")


def theirs(family: str, **options) -> nn.Module:
    """A small model of theirs with random weights, of which none is at its initial 0 or 1."""
    torch.manual_seed(0)
    if family == "gpt2":
        sizes = dict(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=4, n_positions=48)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | options, bos_token_id=0, eos_token_id=None))
    elif family == "bloom":
        sizes = dict(vocab_size=VOCAB, hidden_size=24, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=None)
        model = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes | options))
    else:
        sizes = dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
        sizes |= dict(max_position_embeddings=64, bos_token_id=0, eos_token_id=None, pad_token_id=None)
        sizes |= {} if family == "llama" else dict(num_key_value_heads=4, head_dim=6)
        if family in ("qwen2", "olmo2", "olmoe", "qwen2_moe"):
            del sizes["head_dim"]
        config = getattr(transformers, f"{CLASSES[family]}Config")(**sizes | options)
        config._attn_implementation = "eager"  # for gemma2 the one that knows a softcap
        model = getattr(transformers, f"{CLASSES[family]}ForCausalLM")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


ALL = [
    (family, name, options)
    for family, cases in dict(gpt2=GPT2S, llama=LLAMAS, bloom=BLOOMS, **RELATIVES, **MIXTURES).items()
    for name, options in cases.items()
]
each = pytest.mark.parametrize(("family", "options"), [pytest.param(f, options, id=f"{f}: {name}") for f, name, options in ALL])


def tokens(batch: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same(ours: nn.Module, peer: nn.Module) -> None:
    """Logits equal to 1e-5 of their size in float32, and the text that each goes on with, token for token."""
    logits = peer(tokens()).logits
    torch.testing.assert_close(ours(tokens()), logits, rtol=0, atol=1e-5 * logits.abs().max().item())
    prompt = tokens(length=7)
    expected = peer.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, pad_token_id=0)
    found = torch.stack(list(generate(ours, prompt, new_tokens=24, sampler=Sampler(temperature=0))), dim=1)
    assert torch.equal(found, expected[:, 7:])


@each
@pytest.mark.parametrize("shard_size", ["1GB", "8KB"])
def test_theirs_here(family, options, shard_size, tmp_path):
    peer = theirs(family, **options)
    peer.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "8KB")
    ours = huggingface.load(tmp_path)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in peer.parameters())
    assert_same(ours, peer)
    assert_same(load_model(tmp_path), peer)  # what eval.py calls


@each
@pytest.mark.parametrize("shard_bytes", [10**9, 8000])
def test_theirs_here_and_back(family, options, shard_bytes, tmp_path):
    """Exported again, the folder is theirs: every tensor bit for bit, under its name."""
    peer = theirs(family, **options)
    peer.save_pretrained(tmp_path / "theirs")
    huggingface.export(huggingface.load(tmp_path / "theirs"), tmp_path / "ours", shard_bytes=shard_bytes)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists() == (shard_bytes == 8000)
    back = type(peer).from_pretrained(tmp_path / "ours")
    assert back.dtype == torch.float32
    weights = back.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in peer.state_dict().items())
    assert_same(huggingface.load(tmp_path / "ours"), back)


SMALL = dict(vocab_size=VOCAB, dim=24, heads=4, depth=2, seq_len=48)
EXPORTED = [
    dict(model="gpt2"),
    dict(model="gpt2", ffn="mlp:activation=relu:bias=1:width=20", tie=False),
    dict(model="gpt2", mixer="mha:bias=yes:heads=2", position="learned:seq_len=50", norm="layernorm:eps=1e-3"),
    dict(model="llama-1m"),
    dict(model="llama-1m", mixer="gqa:kv_heads=2:bias=1:head_dim=10", ffn="swiglu:width=16:bias=yes", tie=False),
    dict(model="llama-1m", mixer="mqa", position="rope:theta=500:factor=8:original=16", norm="rmsnorm:eps=1e-3"),
    dict(model="llama-1m", mixer="mha:heads=2", position="rope"),
    dict(model="gpt2", position="alibi", embedding_norm="extra", norm="layernorm:eps=1e-3"),
    dict(model="gpt2", position="alibi", embedding_norm="extra", mixer="gqa:bias=true:heads=3", tie=False),
    dict(model="llama-1m", ffn="moe:experts=4:width=16:balance=0.3:z=0:capacity=2"),
    dict(model="llama-1m", mixer="mha:qk_norm=all", norm="rmsnorm:eps=1e-6", ffn="moe:width=16:top_k=3:router=topk/over=all"),
    dict(model="llama-1m", mixer="gqa:bias=1:out_bias=0", ffn="moe:width=8:shared=2:shared_gate=1:router=topk/over=all"),
    dict(model="llama-1m", mixer="gqa:qk_norm=head:kv_heads=2", norm="rmsnorm:eps=1e-6", ffn="moe:width=16:router=switch"),
]


def ours(**options) -> LanguageModel:
    model = build_model(Config.of(**SMALL | options))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("options", EXPORTED)
@pytest.mark.parametrize("shard_bytes", [10**9, 8000])
def test_ours_there(options, shard_bytes, tmp_path):
    model = ours(**options)
    model(tokens(), tokens()).backward()  # a trained model leaves as a new one does
    huggingface.export(model, tmp_path, shard_bytes=shard_bytes)
    peer, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    peer.generation_config.eos_token_id = peer.config.eos_token_id = None  # 2 in Bloom, if its file does not say
    assert_same(model, peer.eval())
    assert_same(huggingface.load(tmp_path), peer)


@pytest.mark.parametrize(
    "options",
    [
        dict(model="small"), dict(model="gpt2", mixer="mha"), dict(model="gpt2", position="rope"),
        dict(model="gpt2", position="alibi"), dict(model="gpt2", position="alibi", embedding_norm="first"),
        dict(model="gpt2", position="alibi", embedding_norm="extra", ffn="mlp:bias=true:activation=gelu"),
        dict(model="gpt2", position="alibi", embedding_norm="extra", ffn="mlp:bias=true:activation=gelu_tanh:width=90"),
        dict(model="gpt2", position="alibi", embedding_norm="extra", mixer="gqa:bias=true:window=9"),
        dict(model="gpt2", position="alibi", embedding_norm="extra", objective="masked"),
        dict(model="gpt2", embedding_norm="extra"), dict(model="gpt2", head="linear:decoder_bias=true"),
        dict(model="llama-1m", head="transform"), dict(model="llama-1m", mixer="gqa:theta=100"),
        dict(model="llama-1m", embedding_norm="first"),
        dict(model="gpt2", softcap=5.0), dict(model="llama-1m", mixer="gqa:value_embedding=true"),
        dict(model="gpt2", norm="layernorm:gain=false"), dict(model="gpt2", norm_place="post"),
        dict(model="llama-1m", norm_place="sandwich"), dict(model="llama-1m", embedding_scale=2.0),
        dict(model="gpt2", mixer="mha:bias=true:head_dim=4"),
        dict(model="gpt2", mixer="mha:bias=true:qk_norm=unit"), dict(model="gpt2", stack="mha:bias=true mlp:bias=true"),
        dict(model="gpt2", ffn="mlp:bias=true:activation=relu2"), dict(model="llama-1m", mixer="gqa:sinks=true"),
        dict(model="llama-1m", mixer="gqa:out_bias=true"), dict(model="llama-1m", mixer="gqa,mqa"),
        dict(model="llama-1m", norm="rmsnorm:gain=no"),
        dict(model="llama-1m", position="rope:fraction=0.5:interleaved=true"), dict(model="llama-1m", mixer="none"),
        dict(model="llama-1m", ffn="moe,swiglu"), dict(model="llama-1m", ffn="moe,moe:top_k=3"),
        dict(model="llama-1m", ffn="moe:router=topk/over=all"), dict(model="llama-1m", ffn="moe:router=topk/bias=true"),
        dict(model="llama-1m", ffn="moe:router=noisy"), dict(model="llama-1m", ffn="moe:router=bias"),
        dict(model="llama-1m", ffn="moe:gated=false:activation=gelu"), dict(model="llama-1m", ffn="moe:activation=gelu"),
        dict(model="llama-1m", ffn="moe:shared=1"), dict(model="llama-1m", ffn="moe:shared=1:shared_gate=true"),
        dict(model="llama-1m", ffn="moe:scaling=2"), dict(model="llama-1m", ffn="moe:eval_capacity=1"),
        dict(model="llama-1m", ffn="moe", mixer="moa"), dict(model="llama-1m", ffn="moe:router=bias", mixer="mha:qk_norm=head"),
    ],
)  # fmt: skip
def test_what_no_family_holds(options, tmp_path):
    with pytest.raises(ValueError, match="^export: no published family has this stack; there are gpt2, llama, "):
        huggingface.export(ours(**options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "mixtral"])
def test_bfloat16(family, tmp_path):
    theirs(family).to(torch.bfloat16).save_pretrained(tmp_path)
    kept, widened = huggingface.load(tmp_path, dtype=torch.bfloat16), huggingface.load(tmp_path)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16} and {p.dtype for p in widened.parameters()} == {
        torch.float32
    }
    assert all(torch.equal(a.float(), b) for a, b in zip(kept.parameters(), widened.parameters(), strict=True))
    assert_same(widened, type(theirs(family)).from_pretrained(tmp_path, dtype=torch.float32))
    huggingface.export(kept, tmp_path / "again")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "again").dtype == torch.bfloat16


# Folders that are not as they should be: each is one line that names what is wrong


def edit_json(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def complaint(folder) -> str:
    with pytest.raises(ValueError) as caught:
        load_model(folder)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "parts"),
    [
        ("gpt2", dict(activation_function="quick_gelu"), ["activation_function = 'quick_gelu' is not supported", "gelu_new"]),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx = True is not supported"]),
        ("gpt2", dict(scale_attn_weights=False), ["scale_attn_weights = False is not supported"]),
        ("gpt2", dict(add_cross_attention=True), ["add_cross_attention = True is not supported"]),
        ("gpt2", dict(n_layer=...), ["config.json: n_layer is missing"]),
        ("gpt2", dict(n_embd="wide"), ["dim: 'wide' is not of type int"]),
        ("gpt2", dict(n_head=5), ["heads: a dim of 24 does not divide into 5 heads"]),
        ("bloom", dict(apply_residual_connection_post_layernorm=True), ["post_layernorm = True is not supported"]),
        ("bloom", dict(n_head=...), ["config.json: num_attention_heads is missing"]),
        ("bloom", dict(n_head=5), ["heads: a dim of 24 does not divide into 5 heads"]),
        ("bloom", dict(n_layer=3), ["'h.2.input_layernorm.weight' is missing"]),
        ("llama", dict(hidden_act="gelu"), ["hidden_act = 'gelu' is not supported, only silu"]),
        ("llama", dict(pretraining_tp=2), ["pretraining_tp = 2 is not supported"]),
        ("llama", dict(rope_scaling=dict(rope_type="yarn", factor=4.0)),
        ["rope_type 'yarn' is not supported, only default and llama3"]),
        ("llama", dict(rope_scaling=dict(rope_type="llama3", factor=4.0)), ["config.json: low_freq_factor is missing"]),
        ("llama", dict(num_key_value_heads=3), ["kv_heads: 4 query heads"]),
        ("llama", dict(hidden_size=0), ["dim: 0 is too small"]),
        ("llama", dict(num_hidden_layers=3), ["'layers.2.input_layernorm.weight' is missing"]),
        ("llama", dict(num_hidden_layers=1), ["no place for: layers.1."]),
        ("llama", dict(vocab_size=60), ["embed_tokens.weight"]),
        ("mixtral", dict(router_jitter_noise=0.1), ["router_jitter_noise = 0.1 is not supported, only 0.0"]),
        ("mixtral", dict(hidden_act="gelu"), ["hidden_act = 'gelu' is not supported, only silu"]),
        ("mixtral", dict(num_local_experts=...), ["config.json: num_local_experts is missing"]),
        ("mixtral", dict(num_experts_per_tok=9), ["top_k: 9 of 8 experts"]),
        ("mixtral", dict(num_local_experts=9), ["layers.0.block_sparse_moe.gate.weight' has 8 rows, not 9"]),
        ("mixtral", dict(intermediate_size=41), ["layers.0.block_sparse_moe.experts.0.w1.weight' has 40 rows, not 41"]),
        ("olmoe", dict(clip_qkv=8.0), ["clip_qkv = 8.0 is not supported"]),
        ("olmoe", dict(num_experts=...), ["config.json: num_experts is missing"]),
        ("qwen2_moe", dict(decoder_sparse_step=2), ["decoder_sparse_step = 2 is not supported, only 1"]),
        ("qwen2_moe", dict(mlp_only_layers=[0]), ["mlp_only_layers = [0] is not supported"]),
        ("qwen2_moe", dict(use_sliding_window=True), ["use_sliding_window = True is not supported, only False"]),
        ("qwen2_moe", dict(qkv_bias=False), ["qkv_bias = False is not supported, only True"]),
        ("qwen2_moe", dict(shared_expert_intermediate_size=0), ["shared_width: 0 is too small"]),
        ("qwen2_moe", dict(shared_expert_intermediate_size=7), ["shared_expert.gate_proj.weight' has", "rows, not 7"]),
        ("qwen3_moe", dict(num_experts_per_tok=...), ["config.json: num_experts_per_tok is missing"]),
        ("llama", dict(model_type="llamma"), ["model_type 'llamma' is not known here; there are gpt2, llama, "]),
        ("llama", dict(model_type=None), ["model_type None is not known here"]),
    ],
)  # fmt: skip
def test_unsupported_options(family, changes, parts, tmp_path):
    theirs(family).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    message = complaint(tmp_path)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "mixtral"])
def test_tensors_missing_left_over_or_misshapen(family, tmp_path):
    theirs(family, **dict(num_local_experts=2, num_hidden_layers=1) if family == "mixtral" else {}).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    good = load_file(path)
    for name, tensor in good.items():
        save_file({key: value for key, value in good.items() if key != name}, path)
        assert name.removeprefix("model.").removeprefix("transformer.") in complaint(tmp_path)
        save_file(good | {name: torch.zeros(3 * tensor.shape[0], *tensor.shape[1:])}, path)
        complaint(tmp_path)
        for shape in ((*tensor.shape, 2), ()):
            save_file(good | {name: torch.zeros(shape)}, path)
            complaint(tmp_path)
    save_file(good | {"model.extra.weight": torch.zeros(1)}, path)
    assert "extra.weight" in complaint(tmp_path)
    save_file(
        good | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3), "transformer.h.0.attn.bias": torch.zeros(3)},
        path,
    )
    assert ("inv_freq" in complaint(tmp_path)) == (family not in ("llama", "mixtral"))
    path.write_bytes(path.read_bytes()[:-100])
    assert "not a readable safetensors file" in complaint(tmp_path)
    path.unlink()
    assert "model.safetensors" in complaint(tmp_path)


def test_shards_that_lie(tmp_path):
    theirs("llama").save_pretrained(tmp_path, max_shard_size="8KB")
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    name, first = next(iter(good.items()))
    other = next(shard for shard in good.values() if shard != first)
    edit_json(index, weight_map=good | {name: other})
    assert f"{name!r} is not in {other!r}" in complaint(tmp_path)
    edit_json(index, weight_map=good | {name: "../" + first})
    assert f"{name!r} is not in '../{first}'" in complaint(tmp_path)
    edit_json(index, weight_map=good)
    (tmp_path / first).unlink()
    assert first in complaint(tmp_path)


def test_bloom_as_it_was_published(tmp_path):
    """No prefix before the names, and sizes under their longer or older names."""
    peer = theirs("bloom")
    peer.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}, path)
    sizes = dict(num_attention_heads=4, n_embed=24, num_hidden_layers=2, seq_length=77)
    edit_json(tmp_path / "config.json", n_head=..., hidden_size=..., n_layer=..., **sizes)
    assert_same(huggingface.load(tmp_path), peer)
    assert read_config(tmp_path).seq_len == 77


def test_config_as_older_files_write_it(tmp_path):
    """rope_theta and rope_scaling beside everything else, as Llama 3.1 was published."""
    peer = theirs("llama", rope_parameters=LLAMA3)
    peer.save_pretrained(tmp_path)
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    edit_json(tmp_path / "config.json", rope_parameters=..., rope_theta=500.0, rope_scaling=scaling)
    assert_same(huggingface.load(tmp_path), peer)
    assert read_config(tmp_path).position == "rope:theta=500.0:factor=8.0:low=1.0:high=4.0:original=16"
