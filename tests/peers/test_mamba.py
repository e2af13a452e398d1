"""State spaces against the `transformers` package: mixers with copied weights, whole checkpoints, sizes of the presets."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import PRESETS, Config, LanguageModel, build_model, huggingface
from models.generate import Sampler, generate
from models.weights import load_model
from nn.context import Context
from nn.spec import build
from nn.ssm import SSM

transformers = pytest.importorskip("transformers")

VOCAB, DIM = 61, 16
NAMES = {  # of their tensors in a mixer -> of ours
    "in_proj.weight": "up.weight", "in_proj.bias": "up.bias", "out_proj.weight": "out.weight", "out_proj.bias": "out.bias",
    "conv1d.weight": "taps", "conv1d.bias": "taps_bias", "x_proj.weight": "select.weight", "dt_proj.weight": "dt.weight",
    "dt_proj.bias": "dt_bias", "dt_bias": "dt_bias", "A_log": "A_log", "D": "D", "norm.weight": "gain",
}  # fmt: skip
TWO = dict(num_heads=8, head_dim=4, hidden_size=DIM, state_size=6, n_groups=2, chunk_size=4)
BAMBA = dict(mamba_n_heads=8, mamba_d_head=4, mamba_d_state=6, mamba_n_groups=2, mamba_chunk_size=4, num_attention_heads=4)
ZAMBA = dict(n_mamba_heads=8, mamba_headdim=4, mamba_d_state=6, mamba_ngroups=2, chunk_size=4, num_attention_heads=4)
MIXERS = {
    "mamba": ("Mamba", dict(), "mamba"),
    "mamba, sizes": ("Mamba", dict(state_size=5, expand=3, conv_kernel=3, time_step_rank=4, use_bias=True, use_conv_bias=False),
                     "mamba:state=5:expand=3:conv=3:dt_rank=4:bias=true:conv_bias=false"),
    "falcon mamba": ("FalconMamba", dict(state_size=7), "mamba:state=7:inner_norm=true"),
    "mamba2": ("Mamba2", TWO, "mamba2:state=6:head_dim=4:groups=2"),
    "mamba2, limits": ("Mamba2", TWO | dict(time_step_limit=(0.6, 0.9), use_bias=True, use_conv_bias=False, n_groups=1),
                       "mamba2:state=6:head_dim=4:dt_min=0.6:dt_max=0.9:bias=true:conv_bias=false"),
    "bamba": ("Bamba", BAMBA | dict(rms_norm_eps=1e-3), "mamba2:state=6:head_dim=4:groups=2:eps=1e-3"),
    "zamba2": ("Zamba2", ZAMBA | dict(time_step_min=0.6), "mamba2:state=6:head_dim=4:groups=2:dt_min=0.6"),
}  # fmt: skip


def their_mixer(name: str, options: dict) -> nn.Module:
    sizes = dict(hidden_size=DIM) | ({} if name == "Zamba2" else dict(num_hidden_layers=1))
    config = getattr(transformers, f"{name}Config")(**sizes | options)
    module = __import__(f"transformers.models.{config.model_type}.modeling_{config.model_type}", fromlist=["x"])
    kind = "Zamba2MambaMixer" if name == "Zamba2" else f"{name}Mixer"
    mixer = getattr(module, kind)(config, 0, initialize_mixer_weights=False)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return mixer.eval()


def named(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a mixer of theirs under our names."""
    return {NAMES[name]: value[:, 0] if name == "conv1d.weight" else value for name, value in theirs.items() if name in NAMES}


def assert_close(ours: Tensor, theirs: Tensor, what: str) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert ours.shape == theirs.shape and error < 1e-5, f"{what}: {error:.1e}"


@pytest.mark.parametrize(("name", "options", "spec"), MIXERS.values(), ids=MIXERS)
def test_mixers(name, options, spec):
    """Outputs, and the gradients of the input and of every parameter, to 1e-5 of their size in float32."""
    torch.manual_seed(0)
    peer, mixer = their_mixer(name, options), build(spec, SSM, "mixer", DIM)
    mixer.load_state_dict(named({**dict(peer.named_parameters())}))
    x, dy = torch.randn(2, 11, DIM), torch.randn(2, 11, DIM)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    context = Context(torch.zeros(2, 11, dtype=torch.int64), torch.arange(11))
    outputs = [mixer(inputs[0], context), peer(inputs[1])]
    for y in outputs:
        y.backward(dy)
    assert_close(*outputs, "y")
    assert_close(inputs[0].grad, inputs[1].grad, "dx")
    grads = named({name: parameter.grad for name, parameter in peer.named_parameters() if parameter.grad is not None})
    assert set(grads) == {name for name, _ in mixer.named_parameters()}
    for name, parameter in mixer.named_parameters():
        assert_close(parameter.grad, grads[name], name)


MAMBAS = {
    "plain": dict(),
    "sizes, biases": dict(state_size=5, expand=3, conv_kernel=3, time_step_rank=4, use_bias=True, use_conv_bias=False),
    "untied, eps": dict(tie_word_embeddings=False, layer_norm_epsilon=1e-3),
}
MAMBA2S = {
    "plain": dict(),
    "groups, tied": dict(n_groups=2, tie_word_embeddings=True, layer_norm_epsilon=1e-3),
    "sizes, biases": dict(expand=3, num_heads=6, head_dim=8, conv_kernel=3, use_bias=True, use_conv_bias=False),
}
ALL = [("mamba", options) for options in MAMBAS.values()] + [("mamba2", options) for options in MAMBA2S.values()]
IDS = [f"mamba: {name}" for name in MAMBAS] + [f"mamba2: {name}" for name in MAMBA2S]
each = pytest.mark.parametrize(("family", "options"), ALL, ids=IDS)


def theirs(family: str, **options) -> nn.Module:
    """A small model of theirs with random weights, of which none is at its initial 0 or 1."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=2, bos_token_id=0, eos_token_id=None, pad_token_id=None)
    if family == "mamba2":
        sizes |= dict(num_heads=4, head_dim=8, state_size=6, n_groups=1, chunk_size=8)
    name = family.capitalize()
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes | options))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@torch.no_grad()
def assert_same(ours: nn.Module, peer: nn.Module) -> None:
    """Logits equal to 1e-5 of their size in float32, and the text that each goes on with, token for token."""
    tokens = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    assert_close(ours(tokens), peer(tokens).logits, "logits")
    prompt = tokens[:, :7]
    expected = peer.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, pad_token_id=0)
    found = torch.stack(list(generate(ours, prompt, new_tokens=24, sampler=Sampler(temperature=0))), dim=1)
    assert torch.equal(found, expected[:, 7:])


@each
def test_theirs_here_and_back(family, options, tmp_path):
    """Their folder gives their logits and their text; exported again it is theirs, every tensor bit for bit."""
    peer = theirs(family, **options)
    peer.save_pretrained(tmp_path / "theirs")
    ours = huggingface.load(tmp_path / "theirs")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in peer.parameters())
    assert_same(ours, peer)
    huggingface.export(ours, tmp_path / "ours")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    back, report = type(peer).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    back.generation_config.eos_token_id = back.config.eos_token_id = None
    assert_same(load_model(tmp_path / "ours"), back.eval())  # what eval.py calls


def test_step_limits_are_kept(tmp_path):
    """Logits alone: their step of decoding leaves the limits away."""
    peer = theirs("mamba2", time_step_limit=(0.6, 0.9))
    peer.save_pretrained(tmp_path / "theirs")
    ours = huggingface.load(tmp_path / "theirs")
    tokens = torch.arange(20)[None]
    huggingface.export(ours, tmp_path / "ours")
    back = type(peer).from_pretrained(tmp_path / "ours").eval()
    assert list(back.config.time_step_limit) == [0.6, 0.9]
    for model in (peer, back):
        assert_close(ours(tokens), model(tokens).logits, "logits")


def by_authors(peer: nn.Module, folder: Path, **changes) -> None:
    """The same model as mamba_ssm writes it: its names, no model_type, a vocabulary that is not filled up."""
    config, two = peer.config, peer.config.model_type == "mamba2"
    ssm = dict(d_state=config.state_size, d_conv=config.conv_kernel, expand=config.expand)
    ssm |= dict(layer="Mamba2", headdim=config.head_dim, ngroups=config.n_groups, chunk_size=32) if two else {}
    values = dict(d_model=config.hidden_size, n_layer=config.num_hidden_layers, vocab_size=config.vocab_size - 1, ssm_cfg=ssm)
    values |= dict(rms_norm=True, residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=config.vocab_size)
    values |= dict(tie_embeddings=config.tie_word_embeddings, d_intermediate=0, attn_layer_idx=[], attn_cfg={}) if two else {}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values | changes))
    tensors = {name.replace("embeddings.", "embedding."): tensor.clone() for name, tensor in peer.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "options"), [("mamba", {}), ("mamba2", dict(n_groups=2, tie_word_embeddings=True)), ("mamba2", {})]
)
def test_folders_of_the_authors(family, options, tmp_path):
    peer = theirs(family, **options)
    by_authors(peer, tmp_path)
    assert_same(load_model(tmp_path), peer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rms_norm=False), "rms_norm = False is not supported"), (dict(attn_layer_idx=[1]), "attn_layer_idx = "),
        (dict(ssm_cfg=dict(layer="Mamba3")), "layer 'Mamba3' in ssm_cfg"), (dict(ssm_cfg=dict(d_ssm=3)), "d_ssm in ssm_cfg"),
    ],
)  # fmt: skip
def test_options_of_the_authors_that_are_not_here(changes, message, tmp_path):
    by_authors(theirs("mamba"), tmp_path, **changes)
    with pytest.raises(ValueError, match=f"^config.json: {message}"):
        load_model(tmp_path)


SMALL = dict(vocab_size=VOCAB, dim=DIM, depth=2)
EXPORTED = [
    dict(model="mamba"), dict(model="mamba", mixer="mamba:dt_rank=3:bias=true:expand=1:state=4", tie=False),
    dict(model="mamba", stack="mamba*3"), dict(model="mamba2"),
    dict(model="mamba2", mixer="mamba2:groups=2:head_dim=8:state=5", tie=True),
]  # fmt: skip


def ours(**options) -> LanguageModel:
    model = build_model(Config.of(**SMALL | options))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("options", EXPORTED)
def test_ours_there(options, tmp_path):
    model = ours(**options)
    huggingface.export(model, tmp_path)
    peer, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    peer.generation_config.eos_token_id = peer.config.eos_token_id = None
    assert_same(model, peer.eval())


@pytest.mark.parametrize(
    "options",
    [
        dict(model="mamba", mixer="mamba:inner_norm=true"), dict(model="mamba", mixer="s4d"),
        dict(model="mamba", mixer="bimamba"), dict(model="mamba", ffn="mlp"),
        dict(model="mamba", position="rope"), dict(model="mamba", mixer="mamba,mamba2"),
        dict(model="mamba", mixer="mamba,mamba:state=3"), dict(model="mamba2", mixer="mamba2:eps=1e-3"),
        dict(model="mamba", norm_place="post"), dict(model="mamba", softcap=3.0),
    ],
)  # fmt: skip
def test_what_no_family_holds(options, tmp_path):
    with pytest.raises(ValueError, match="^export: no published family has this stack"):
        huggingface.export(ours(**options), tmp_path / "out")


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("mamba") and name[-1] in "mb"])
def test_sizes_of_the_presets(preset):
    """Every tensor of a published size is there in their model of the same size, with the same shape."""
    config = Config.of(model=preset)
    options = dict(vocab_size=config.vocab_size, hidden_size=config.dim, num_hidden_layers=config.depth)
    two = dict(num_heads=config.dim // 32, n_groups=1, tie_word_embeddings=True) if "mamba2" in preset else {}
    name = "Mamba2" if two else "Mamba"
    with torch.device("meta"):
        model = LanguageModel(config)
        peer = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**options | two))
    peer.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in peer.parameters())
    assert huggingface.holds(huggingface.FAMILIES[name.lower()], model)
    table = huggingface.FAMILIES[name.lower()].table(model)
    sizes, found = {name: tensor.numel() for name, tensor in peer.state_dict().items()}, model.state_dict()
    listed = {f"backbone.{entry.theirs}": sum(found[name].numel() for name in entry.ours) for entry in table}
    assert listed == {name: count for name, count in sizes.items() if name != "lm_head.weight"}
