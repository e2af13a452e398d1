"""A model on any mesh learns what one process learns: losses, norms, parameters after ten steps of Muon and AdamW, float64."""

import pytest

from models import Config
from models.parallel import Spread
from models.weights import skeleton
from nn.parallel.mesh import AXES, parse_mesh, share_of_rows, sizes_of
from tests.processes import printed_by

MESHES = {  # processes: meshes, each with its schedule and the models of spread_processes.py
    2: ["dp=2", "fsdp=2/gqa+others", "tp=2/gqa+hybrid+experts+others", "pp=2/gqa+experts", "pp=2@looped/hybrid",
        "pp=2@interleaved/gqa", "pp=2@gpipe/others", "ulysses=2", "ring=2", "ep=2/experts"],
    4: ["dp=2,tp=2", "fsdp=2,pp=2", "fsdp=2,pp=2@looped/gqa", "fsdp=2,ulysses=2", "dp=2,fsdp=2/gqa", "fsdp=2,tp=2/hybrid",
        "tp=2,ulysses=2/hybrid", "ring=2,ulysses=2/gqa", "ep=2,dp=2/experts"],
}  # fmt: skip


CHANGES = {2: ["pp=2>fsdp=2"], 4: ["tp=2,dp=2>fsdp=4", "fsdp=4>pp=2,tp=2", "pp=2,tp=2>dp=4", "dp=4>ring=2,fsdp=2"]}
EXACT = ["drawn:tp=2/gqa", "drawn:pp=2/experts", "drawn:tp=2/router", "drawn:ep=2/experts", "drawn:ulysses=2/hybrid",
         "behind:fsdp=2/gqa"]  # fmt: skip


@pytest.fixture(scope="module", params=MESHES)
def printed(request) -> list[str]:
    more = CHANGES[request.param] + EXACT * (request.param == 2)
    return [str(request.param), *printed_by(request.param, "tests.models.spread_processes", *MESHES[request.param], *more)]


def test_every_mesh_equals_one_process(printed):
    processes, lines = int(printed[0]), [line for line in printed[1:] if ">" not in line and ":" not in line]
    found = [line.split() for line in lines]
    models = {mesh: mesh.partition("/")[2].split("+") if "/" in mesh else ["gqa", "hybrid"] for mesh in MESHES[processes]}
    assert [tuple(line[:2]) for line in found] == [(mesh, name) for mesh, names in models.items() for name in names]
    assert all(float(worst) < 1e-9 for *_, worst in found), lines


def test_what_is_saved_on_one_mesh_goes_on_on_another(printed):
    """Bit for bit the same weights and optimizer state when they are put together again, and the same next steps."""
    lines = [line for line in printed[1:] if ">" in line]
    assert [line.split()[:2] for line in lines] == [[change, "0.0e+00"] for change in CHANGES[int(printed[0])]]
    assert all(float(line.split()[2]) < 1e-9 for line in lines), lines


def test_what_is_exact(printed):
    """`drawn`: first weights of which no process has all, beside those of one process. `behind`: what is written while the run
    goes on, beside what is written at once.
    """
    lines = [line for line in printed[1:] if ":" in line]
    assert lines == [f"{check} 0.0e+00" for check in (EXACT if printed[0] == "2" else [])]


def test_a_mesh_is_read_in_the_order_of_its_axes():
    assert parse_mesh("tp=2, fsdp=4") == dict.fromkeys(AXES, 1) | dict(fsdp=4, tp=2)
    assert list(parse_mesh("tp=2,pp=3")) == list(AXES)
    assert sizes_of("", 6) == parse_mesh("dp=6")


@pytest.mark.parametrize("text, part", [
    ("xp=2", "there is no axis 'xp'"), ("tp", "'tp' has no size"), ("tp=0", "no size"), ("tp=-1", "no size"),
    ("tp=2.5", "no size"), ("tp=2,tp=2", "named twice"), ("tp=2", "tp=2 needs 2 processes, but there are 4"),
    ("tp=2,pp=4", "needs 8 processes"),
])  # fmt: skip
def test_a_wrong_mesh_is_one_clear_line(text, part):
    with pytest.raises(ValueError, match="^mesh: ") as error:
        sizes_of(text, 4)
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("mesh", ["fsdp=2", "pp=2", "tp=2,dp=2"])
def test_layers_that_share_parameters_go_with_no_mesh_that_cuts_them(mesh):
    model = skeleton(Config.of(dim=16, heads=2, depth=2, vocab_size=9, ffn="moe:experts=4:router=recurrent"))
    with pytest.raises(ValueError, match=r"^mesh: layers that share parameters \(from_input, from_memory\)"):
        Spread(model, parse_mesh(mesh))


def test_rows_are_shared_among_data_axes_only():
    sizes = parse_mesh("dp=2,fsdp=3,tp=2,pp=2")
    shares = [share_of_rows(rank, sizes) for rank in range(24)]
    assert {count for _, count in shares} == {6} and sorted({share for share, _ in shares}) == list(range(6))
    assert shares[0] == shares[1] == shares[12] and shares[2] == (1, 6)  # tp is the fastest, pp the slowest
