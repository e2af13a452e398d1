"""A pre-LN model and what it becomes with RMSNorm and CRMSNorm: the same logits, in float64 to rounding."""

import pytest
import torch
from torch import nn

from models import Config, LanguageModel, build_model
from models.convert_norm import convert, main
from models.generate import Sampler, generate
from models.huggingface import export
from models.weights import load_model, save_model
from nn.norm import CRMSNorm, RMSNorm

TINY = dict(vocab_size=40, dim=16, heads=2, depth=3, seq_len=24, norm="layernorm")
STACKS = {
    "gpt2": dict(model="gpt2"),
    "default": dict(),
    "gated": dict(mixer="gqa:kv_heads=1:gate=true", ffn="swiglu:bias=true", position="learned", tie=True),
    "hybrid": dict(mixer="gqa:qk_norm=head,none,mha:bias=true", ffn="mlp,swiglu,none", softcap=5.0),
    "spelled": dict(stack="ngram (mqa:head_dim=6 mlp:width=24)*2 swiglu", position="none"),
    "side by side": dict(stack="mha+swiglu mlp:activation=star_relu+gqa:head_dim=none:kv_heads=1 geglu", embedding_scale=3.0),
    "scaled": dict(norm_place="scaled", position="learned"),
    "nothing": dict(stack="none"),
}
NORMS = ["layernorm", "layernorm:bias=false", "layernorm:gain=false:eps=0.1", "layernorm:gain=false:bias=false"]
to_each = pytest.mark.parametrize("to", ["rmsnorm", "crmsnorm"])


def make(**options) -> LanguageModel:
    """Every parameter random, gains and biases too."""
    torch.manual_seed(0)
    model = LanguageModel(Config.of(**TINY | options)).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.6)
    return model


TOKENS = torch.arange(48).view(2, 24) % 40


@to_each
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", STACKS.values(), ids=STACKS)
def test_same_logits(options, norm, to):
    model = make(**options | dict(norm=norm))
    made = convert(model, to)
    before, after = model(TOKENS), made(TOKENS)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12 * max(1, before.abs().max().item()))
    assert before.std() > 0.5
    kind = dict(rmsnorm=RMSNorm, crmsnorm=CRMSNorm)[to]
    assert all(type(s.norm) is kind for s in made.stack) and type(made.final_norm) is kind
    torch.testing.assert_close(made(TOKENS, TOKENS), model(TOKENS, TOKENS), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("norm", "width"), [("layernorm", 16), ("layernorm:bias=false", 15)])
def test_the_compressed_stream(norm, width):
    """One coordinate less; biases that are not zero need one for their constant, biases of zero do not."""
    model = make(norm=norm)
    assert convert(model, "crmsnorm").config.dim == width
    made = convert(build_model(model.config), "crmsnorm")
    assert made.config.dim == made.embedding.weight.shape[1] == 15


def test_the_stream_has_no_mean():
    """Of the converted model every vector that is written into the stream sums to zero."""
    made, sums = convert(make(model="gpt2"), "rmsnorm"), []
    for sublayer in made.stack:
        sublayer.register_forward_hook(lambda module, inputs, x: sums.append(x.sum(-1).abs().max().item()))
    made(TOKENS)
    assert len(sums) == 6 and max(sums) < 1e-12


def test_not_exported_without_its_biases(tmp_path):
    """Llama's RMSNorm has none."""
    made = convert(make(mixer="gqa", ffn="swiglu", stem=""), "rmsnorm")
    assert made.final_norm.bias is not None
    with pytest.raises(ValueError):
        export(made, tmp_path)


def test_the_original_is_left_alone():
    model = make(model="gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = convert(model, "rmsnorm")
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@to_each
def test_decoding(to):
    model = make(model="gpt2", seq_len=40)
    written = [
        [token.item() for token in generate(m, TOKENS[:1, :5], new_tokens=20, sampler=Sampler(0))]
        for m in (model, convert(model, to))
    ]
    assert written[0] == written[1]


@to_each
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(norm="rmsnorm"), "norm: 'rmsnorm', but only layernorm"),
        (dict(norm_place="post"), "norm_place: 'post', but only norms before"),
        (dict(position="sinusoidal"), "position: 'sinusoidal' adds to the stream"),
    ],
)
def test_what_cannot_be_converted(options, message, to):
    with pytest.raises(ValueError, match="^" + message):
        convert(make(**options), to)


def test_other_cases_that_cannot_be_converted():
    with pytest.raises(ValueError, match="^dim: a stream of one number"):
        convert(make(dim=1, heads=1, position="none", mixer="none", ffn="mlp"), "crmsnorm")
    model = make()
    model.stack[0].layer = nn.Identity()
    with pytest.raises(ValueError, match="^stack: Identity is not among the kinds"):
        convert(model, "rmsnorm")


@to_each
def test_command(to, tmp_path, capsys):
    model = make(model="gpt2").float()
    (tmp_path / "from" / "tokenizer").mkdir(parents=True)
    (tmp_path / "from" / "tokenizer" / "t.json").write_text("{}")
    save_model(model, tmp_path / "from")
    arguments = [str(tmp_path / "from"), "--to", to, "--out", str(tmp_path / "new" / "to")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert f"{to}:eps=" in out and "none moved by more than" in out
    made = load_model(tmp_path / "new" / "to").eval()
    torch.testing.assert_close(made(TOKENS), model(TOKENS), rtol=0, atol=1e-3)
    assert (tmp_path / "new" / "to" / "tokenizer" / "t.json").exists()
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("convert_norm: out: ")


def test_mistakes_are_one_line(tmp_path, capsys):
    save_model(make(norm="rmsnorm").float(), tmp_path)
    for arguments, message in (
        ([str(tmp_path / "nowhere"), "--to", "rmsnorm"], "convert_norm: checkpoint: there is none"),
        ([str(tmp_path), "--to", "rmsnorm"], "convert_norm: norm: 'rmsnorm', but only layernorm"),
    ):
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert err.startswith(message) and len(err.splitlines()) == 1 and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), "--to", "batchnorm", "--out", str(tmp_path / "out")])
