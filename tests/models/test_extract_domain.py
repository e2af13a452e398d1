"""A domain that is cut out computes what it computed, bit for bit, with a share of the experts."""

import pytest
import torch

from models.extract_domain import extract, main
from models.weights import load_model, save_model
from tests.models.drawn import drawn, tokens

KINDS = {
    "plain": dict(ffn="swiglu:width=24,moe:experts=6:width=8:top_k=1:router=hash/domains=3"),
    "shared": dict(ffn="moe:experts=6:top_k=2:width=8:shared=1:router=hash/domains=3/seed=5"),
    "vectors": dict(ffn="moe:experts=6:top_k=2:main=1:width=8:gated=false:router=hash/domains=3"),
    "bounds": dict(ffn="moe:experts=6:top_k=1:width=8:capacity=1.5:eval_capacity=0.75:router=hash/domains=3"),
    "default": dict(ffn="moe:width=8:router=hash/domains=4:host=true,moe:router=hash:experts=2:width=4"),
    "beside": dict(stack="gqa+moe:experts=9:width=8:router=hash/domains=3 moe:experts=5:width=4 gqa"),
    "heads": dict(mixer="moa:experts=6:top_k=1:router=hash/domains=3"),
}


@torch.no_grad()
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_logits_of_the_domain_are_the_same_numbers(options):
    model, found = drawn(**options).eval(), []
    for domain in range(3):
        small = extract(model, domain=domain)
        logits = model(tokens(), domains=torch.full((3, 1), domain))
        assert torch.equal(small(tokens()), logits)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        found.append(logits)
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[1], found[2])


def test_a_third_of_the_experts_is_left():
    model = drawn(**KINDS["plain"])
    small = extract(model, domain=1)
    assert small.specs[3] == "moe:experts=2:width=8:top_k=1:router=hash"
    for name in ("gate", "up", "down"):
        mine, theirs = (getattr(m.stack[3].layer.experts, name).weight for m in (small, model))
        assert torch.equal(mine, theirs[2:4]) and mine.data_ptr() != theirs[2:].data_ptr()
    assert set(small.stack[3].layer.router.table.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("options, domain, message", [
    (dict(), 0, "domain: no layer has experts that belong to domains"),
    (dict(ffn="moe:experts=4:width=8:router=hash"), 0, "domain: no layer has experts"),
    (KINDS["plain"], 3, "domain: 3 is none of 0 to 2"),
    (KINDS["plain"], -1, "domain: -1 is none of 0 to 2"),
])  # fmt: skip
def test_mistakes(options, domain, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        extract(drawn(**options), domain=domain)


def test_the_command_writes_a_model_that_needs_no_domain(tmp_path, capsys):
    model = drawn(**KINDS["plain"]).float().eval()
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(model, folder)
    assert main([str(folder), "--domain", "2", "--out", str(tmp_path / "small")]) == 0
    assert "none moved by more than 0" in capsys.readouterr().out
    with torch.no_grad():
        small = load_model(tmp_path / "small")
        assert torch.equal(small.eval()(tokens()), model(tokens(), domains=torch.full((3, 1), 2)))
    assert main([str(folder), "--domain", "7", "--out", str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err == "extract_domain: domain: 7 is none of 0 to 2\n" and not (tmp_path / "other").exists()
