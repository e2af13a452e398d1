"""Fixed norms folded into the matrices behind them, and LayerNorms that are removed one by one."""

import pytest
import torch
from torch import nn

from models import Config, LanguageModel
from models.fold_norm import fold, main
from models.generate import Sampler, generate
from models.remove_norms import removal_order, remove_next, std_penalty, with_fake_norms
from models.weights import load_model, save_model
from nn.norm import FakeNorm, NoNorm

TINY = dict(vocab_size=40, dim=16, heads=2, depth=3, seq_len=24)
NORMS = ["powernorm", "powernorm:bias=false", "powernorm:warmup=0", "unifiednorm:window=2:warmup=1", "fakenorm",
         "fakenorm:gain=false", "fakenorm:bias=false", "none"]  # fmt: skip
STACKS = {
    "gpt2": dict(model="gpt2"),
    "default": dict(),
    "hybrid": dict(mixer="gqa:kv_heads=1:gate=true,mha:bias=true", ffn="swiglu:bias=true,mlp", tie=True, softcap=5.0),
    "side by side": dict(stack="mha+swiglu mlp", embedding_scale=3.0, norm_place="scaled"),
    "nothing": dict(stack="none"),
}
TOKENS = torch.arange(48).view(2, 24) % 40


def make(**options) -> LanguageModel:
    """Every parameter random, statistics from four steps of training, FakeNorms removed."""
    torch.manual_seed(0)
    model = LanguageModel(Config.of(**TINY | options)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.6)
    for _ in range(4):
        model(TOKENS, TOKENS).backward()
    while options["norm"].startswith("fakenorm") and remove_next(model):
        pass
    return model.eval()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", STACKS.values(), ids=STACKS)
def test_same_logits(options, norm):
    model = make(norm=norm, **options)
    made = fold(model)
    before, after = model(TOKENS), made(TOKENS)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12 * max(1, before.abs().max().item()))
    assert before.std() > 0.1
    assert all(type(s.norm) is NoNorm for s in made.stack) and type(made.final_norm) is NoNorm
    assert not any("norm" in name.split(".")[:-1] or "final_norm" in name for name in made.state_dict())
    assert made.config.dim == 16 + (norm != "none" and "bias=false" not in norm)


def test_sinusoidal_positions_fold_without_biases():
    """They are added to the stream, whose coordinates stay what they are; another width would change them."""
    model = make(norm="powernorm:bias=false", position="sinusoidal")
    torch.testing.assert_close(fold(model)(TOKENS), model(TOKENS), rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="^position: 'sinusoidal' adds to the stream"):
        fold(make(norm="powernorm", position="sinusoidal"))


def test_logits_are_a_sum_of_contributions():
    """Without norms the logits are the head of what each part wrote, added up; with LayerNorm they are not."""

    def parts(model: LanguageModel) -> torch.Tensor:
        written, handles = [], [model.embedding.register_forward_hook(lambda m, i, y: written.append(y))]
        handles += [s.layer.register_forward_hook(lambda m, i, y: written.append(y)) for s in model.stack]
        model(TOKENS)
        for handle in handles:
            handle.remove()
        return sum(model.head(model.final_norm(y)) for y in written)

    model = make(norm="fakenorm")
    made = fold(model)
    torch.testing.assert_close(parts(made), model(TOKENS), rtol=0, atol=1e-12)
    whole = with_fake_norms(make(norm="layernorm")).eval()
    assert (parts(whole) - whole(TOKENS)).abs().max() > 0.1


def test_decoding():
    model = make(norm="powernorm", seq_len=40)
    written = [
        [token.item() for token in generate(m, TOKENS[:1, :5], new_tokens=20, sampler=Sampler(0))] for m in (model, fold(model))
    ]
    assert written[0] == written[1]


@pytest.mark.parametrize("norm", ["layernorm", "layernorm:bias=false:eps=0.1", "layernorm:gain=false"])
def test_with_fake_norms(norm):
    model = make(norm=norm, tie=True)
    made = with_fake_norms(model)
    torch.testing.assert_close(made(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-12)
    assert all(type(s.norm) is FakeNorm for s in made.stack) and made.head.weight is made.embedding.weight


def test_removal_goes_in_the_papers_order():
    model = with_fake_norms(make(norm="layernorm", stack="mha mlp swiglu gqa"))
    with pytest.raises(ValueError, match="^sigma: the norm has seen no training batch"):
        remove_next(model)
    model.train()(TOKENS, TOKENS)
    expected = ["stack.1.norm", "stack.2.norm", "stack.0.norm", "stack.3.norm", "final_norm"]
    assert removal_order(model) == expected
    for count, name in enumerate(expected, 1):
        assert remove_next(model) == name and model.get_submodule(name).removed
        assert sum(bool(m.removed) for m in model.modules() if isinstance(m, FakeNorm)) == count
    assert remove_next(model) is None


def test_std_penalty():
    """The squared coefficient of variation of the tokens' spread, with its gradient; only within the block."""
    model, seen = make(norm="fakenorm"), []
    handle = model.final_norm.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    with std_penalty(model) as penalty:
        with pytest.raises(ValueError, match="^penalty: the model was not called"):
            penalty()
        model(TOKENS)
    handle.remove()
    model(TOKENS)
    spread = seen[0].detach().numpy().std(-1)
    assert penalty().item() == pytest.approx(((spread / spread.mean() - 1) ** 2).mean(), rel=1e-5)
    penalty().backward()
    assert model.embedding.weight.grad.abs().sum() > 0 and len(model.final_norm._forward_pre_hooks) == 0


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        ("layernorm", "norm: 'layernorm' is no fixed linear map"),
        ("rmsnorm:eps=0.1", "norm: 'rmsnorm:eps=0.1' is no fixed linear map"),
    ],
)
def test_what_cannot_be_folded(norm, message):
    with pytest.raises(ValueError, match="^" + message):
        fold(make(norm=norm))
    with pytest.raises(ValueError, match="^norm: .* but only a fakenorm can be removed"):
        remove_next(make(norm=norm))
    with pytest.raises(ValueError, match="^norm: a fakenorm that was not removed"):
        fold(with_fake_norms(make(norm="layernorm")))
    with pytest.raises(ValueError, match="^norm_place: 'post'"):
        fold(make(norm="powernorm", norm_place="post"))
    with pytest.raises(ValueError, match="^norm: 'powernorm', but only a layernorm becomes"):
        with_fake_norms(make(norm="powernorm"))


def test_command(tmp_path, capsys):
    model = make(norm="powernorm").float()
    (tmp_path / "from").mkdir()
    save_model(model, tmp_path / "from")
    assert main([str(tmp_path / "from"), "--out", str(tmp_path / "to")]) == 0
    assert "none, width 17 (was powernorm, 16)" in capsys.readouterr().out
    torch.testing.assert_close(load_model(tmp_path / "to").eval()(TOKENS), model(TOKENS), rtol=1e-3, atol=1e-3)
    assert main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "other")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
