"""Experts on the host compute what experts compute, and only those that are asked move."""

import pytest
import torch
from torch import nn

import train
from models import Config, build_model
from models.parallel import Spread
from models.stack import FFNS
from nn.context import Context
from nn.moe.host_experts import HostLinear, moved_bytes
from nn.parallel.mesh import parse_mesh
from nn.spec import build
from optim import AdamW, Combined, SparseAdamW

DIM, VOCAB, E, WIDTH = 12, 30, 8, 10


def pair(words: str, dtype=torch.float64):
    """The same mixture twice, here and on the host."""
    torch.manual_seed(0)
    here, host = (build(f"moe:experts={E}:width={WIDTH}{words}{more}", FFNS, "ffn", DIM, vocab_size=VOCAB)
                  for more in ("", ":host=true"))  # fmt: skip
    for parameter in here.parameters():
        nn.init.normal_(parameter, std=0.5)
    host.load_state_dict(here.state_dict())
    return here.to(dtype), host.to(dtype)


def passed(moe, tokens, autocast=False):
    """Outputs and all gradients."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*tokens.shape, DIM, generator=generator, dtype=next(moe.parameters()).dtype).requires_grad_()
    moe.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = moe(x, Context(tokens, torch.arange(tokens.shape[1])))
    loss = (y.float() ** 2).sum() + (0 if moe.auxiliary is None else moe.auxiliary)
    loss.backward()
    return dict(y=y, x=x.grad) | {name: parameter.grad for name, parameter in moe.named_parameters()}


@pytest.mark.parametrize("words", [
    "", ":router=hash", ":router=topk/over=all:top_k=3:capacity=0.5", ":top_k=3:main=1", ":shared=1:gated=false",
])  # fmt: skip
@pytest.mark.parametrize("dtype, autocast", [(torch.float64, False), (torch.float32, False), (torch.float32, True)])
def test_outputs_and_gradients_are_those_of_plain_experts(words, dtype, autocast):
    here, host = pair(words, dtype)
    for shape in ((2, 9), (1, 1), (0, 3)):
        tokens = torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(2))
        ours, theirs = passed(host, tokens, autocast), passed(here, tokens, autocast)
        assert ours.keys() == theirs.keys()
        for name in ours:
            same = ours[name] is theirs[name] is None or torch.equal(ours[name], theirs[name])
            assert same and (ours[name] is None or ours[name].dtype == theirs[name].dtype), (shape, name)
    assert [type(m) for m in host.experts.children()] != [type(m) for m in here.experts.children()]


@pytest.mark.parametrize("asked", [1, 2, 5, 8])
def test_bytes_are_those_of_the_experts_that_are_asked(asked):
    """A hash router sends an id where its table says: ids of so many experts are chosen, however many tokens have them."""
    _, host = pair(":router=hash")
    table = host.router.table[0, :, 0]
    ids = torch.stack([(table == expert).nonzero()[0, 0] for expert in range(asked)])
    passed(host, ids.repeat(3)[None])
    matrices = 3 * WIDTH * DIM
    assert moved_bytes(host) == dict(up=asked * matrices * 8, down=asked * matrices * 8)
    with torch.no_grad():
        host(torch.randn(1, asked, DIM, dtype=torch.float64), Context(ids[None], torch.arange(asked)))
    assert moved_bytes(host) == dict(up=2 * asked * matrices * 8, down=asked * matrices * 8)


def test_half_precision_moves_half_the_bytes():
    _, host = pair(":router=hash", torch.float32)
    passed(host, torch.full((1, 4), 3), autocast=True)
    assert moved_bytes(host) == dict(up=3 * WIDTH * DIM * 2, down=3 * WIDTH * DIM * 2)


def test_only_experts_of_the_domain_that_is_read_are_learned():
    """Their weights and state change as beside plain experts; those of the other domain are bit for bit what they were."""
    sides = []
    for more in ("", ":host=true"):
        config = Config.of(stem="", mixer="gqa", depth=1, dim=DIM, heads=2, vocab_size=VOCAB, seq_len=8,
                           ffn=f"moe:experts=4:width=8:router=hash/domains=2{more}")  # fmt: skip
        model, generator = build_model(config, seed=1), torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        experts = [p for name, p in model.named_parameters() if ".experts." in name]
        others = [p for name, p in model.named_parameters() if ".experts." not in name]
        optimizer = Combined([SparseAdamW(experts, lr=0.01, weight_decay=0.1), AdamW(others, lr=0.01)])
        before, found = [p.detach().clone() for p in experts], []
        for domain, number in ((0, 0), (1, 1), (1, 2)):
            states = [optimizer.optimizers[0].state[p].get("mean", torch.zeros_like(p)).clone() for p in experts]
            tokens = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(number))
            model(tokens[:, :-1], tokens[:, 1:], domains=torch.full((2, 1), domain)).backward()
            optimizer.step()
            optimizer.zero_grad()
            busy, idle = (slice(0, 2), slice(2, 4))[:: 1 - 2 * domain]
            for p, old, mean in zip(experts, before, states, strict=True):
                assert torch.equal(p[idle], old[idle]) and not torch.equal(p[busy], old[busy])
                assert torch.equal(optimizer.optimizers[0].state[p]["mean"][idle], mean[idle])
            before = [p.detach().clone() for p in experts]
            found += before
        sides.append(found)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*sides, strict=True))


def test_several_devices_are_refused():
    options = dict(depth=1, dim=DIM, heads=2, vocab_size=VOCAB, seq_len=8, mixer="gqa", stem="")
    model = build_model(Config.of(ffn="moe:experts=4:width=8:host=true", **options))
    assert sum(isinstance(module, HostLinear) for module in model.modules()) == 3
    with pytest.raises(ValueError, match="^mesh: experts on the host"):
        Spread(model, parse_mesh("fsdp=2"), "cuda")


def test_a_run_trains_experts_on_the_host(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (i * i) % 23) for i in range(3000)))
    flags = ["--tokenizer", "byte", "--dim", "16", "--depth", "1", "--heads", "2", "--seq-len", "16", "--data", str(text),
             "--batch-size", "4", "--device", "cpu", "--eval-every", "0", "--sample", "1", "--steps", "2", "--clip", "1",
             "--val-data", str(text), "--optimizer", "sparse_adamw:lr=0.002", "--offload"]  # fmt: skip
    flags += ["--ffn", "moe:experts=8:width=8:top_k=1:router=hash:host=true", "--out", str(tmp_path / "run")]
    assert train.main(flags) == 0
