"""The tasks: one contract over all of them, what is special to each, and their loader."""

import json
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import IGNORE, TASKS, TaskLoader, examples
from data.tasks import TRAINING, VALIDATION

SMALL = {  # options besides the defaults: the smallest, odd ones, every switch
    "induction": [dict(length=3, symbols=1), dict(length=7, symbols=2)],
    "selective_copying": [dict(length=2, symbols=1, count=1), dict(length=9, symbols=3, count=4)],
    "mqar": [dict(length=4, pairs=1, keys=1, values=1), dict(length=33, pairs=5, keys=5, values=7, power=1.0)],
    "phonebook": [dict(pairs=3, digits=1, names=2), dict(pairs=4, digits=3, names=2, reversed=True)],
    "parity": [dict(length=1), dict(length=9)],
    "s3": [dict(length=1), dict(length=9)],
    "a5": [dict(length=1), dict(length=9)],
    "s5": [dict(length=1), dict(length=9)],
}
CASES = [(name, options) for name in TASKS for options in [{}, *SMALL.get(name, [])]]
each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda part: str(part))
each_task = pytest.mark.parametrize("name", TASKS)


def make(name, options=None):
    return TASKS[name](**options or {})


def many(task, answers: int):
    """About so many answers: inputs, targets, and where is asked."""
    inputs, targets = task.batch(-(-answers // task.asked), seed=7)
    return inputs, targets, targets != IGNORE


@each_case
def test_batches_have_the_promised_form(name, options):
    task = make(name, options)
    inputs, targets = task.batch(5, seed=0)
    assert inputs.shape == targets.shape == (5, task.seq_len) and inputs.dtype == targets.dtype == torch.int64
    asked = targets != IGNORE
    assert (asked.sum(1) == task.asked).all() and task.asked >= 1
    for ids in (inputs, targets[asked]):
        assert 0 <= ids.min() and ids.max() < task.vocab_size
    assert len(set(task.words)) == task.vocab_size
    assert task.spell(inputs[0]).split() == [task.words[i] for i in inputs[0]]
    assert task.spell(torch.tensor([task.vocab_size, -1])) == f"<{task.vocab_size}> <-1>"


@each_task
def test_a_row_follows_from_seed_stream_and_number_alone(name):
    task, rows = make(name), 6
    whole = task.batch(rows, seed=3)
    for again in (task.batch(rows, seed=3), make(name).batch(rows, seed=3)):
        assert all(map(torch.equal, whole, again))
    parts = [task.batch(2, seed=3, first=first) for first in (0, 2, 4)]
    assert all(torch.equal(one, torch.cat(part)) for one, part in zip(whole, zip(*parts, strict=True), strict=True))
    others = [task.batch(rows, seed=4), task.batch(rows, seed=3, first=rows), task.batch(rows, seed=3, stream=VALIDATION)]
    seen = [tuple(row.tolist()) for inputs, _ in (whole, *others) for row in inputs]
    assert len(set(seen)) == len(seen)


@each_case
def test_the_oracle_finds_every_answer(name, options):
    inputs, targets, asked = many(task := make(name, options), 400)
    kept = inputs.clone()
    found = task.oracle(inputs)
    assert found.shape == inputs.shape and torch.equal(found[asked], targets[asked]) and torch.equal(inputs, kept)


@each_case
def test_an_answer_follows_from_the_inputs_before_it(name, options):
    """The inputs after a position, replaced by those of another row, change nothing of what the oracle says up to it."""
    task = make(name, options)
    inputs, targets, asked = many(task, 40 * task.asked)
    for row, positions in enumerate(asked):
        for position in {positions.nonzero()[0].item(), positions.nonzero()[-1].item()}:
            changed = inputs[row].clone()
            changed[position + 1 :] = inputs[row - 1][position + 1 :]
            assert task.oracle(changed[None])[0, position] == targets[row, position]


@each_case
def test_chance_is_the_accuracy_of_guessing(name, options):
    """Each answer is among the plausible ones, once, and equally often each of them: no guess is better than `chance`."""
    task = make(name, options)
    inputs, targets, asked = many(task, 20_000)
    answers, plausible = targets[asked], task.plausible(inputs)[asked.nonzero()[:, 0]]  # (N,), (N, P)
    is_it = plausible == answers[:, None]
    assert (is_it.sum(1) == 1).all() and task.chance == pytest.approx(1 / plausible.shape[1])

    guesses = torch.randint(plausible.shape[1], (len(answers), 1), generator=torch.Generator().manual_seed(0))
    right = is_it.gather(1, guesses).float().mean()
    sigma = (task.chance * (1 - task.chance) / len(answers)) ** 0.5
    assert abs(right - task.chance) <= 4 * sigma
    often = is_it.float().mean(0)  # (P,) how often each of the plausible is the answer
    assert (often - task.chance).abs().max() <= 5 * sigma


@each_task
def test_a_place_says_nothing_about_its_answer(name):
    """Who has learnt the likeliest answer of each position, and which of the plausible it is, does no better than chance."""
    task = make(name)
    inputs, targets, asked = many(task, 40_000)
    row, place = asked.nonzero(as_tuple=True)
    which = (task.plausible(inputs)[row] == targets[asked][:, None]).int().argmax(1)  # (N,) of the plausible
    learnt = row < len(inputs) // 2
    for answers in (targets[asked], which):
        counts = torch.zeros(task.seq_len, int(answers.max()) + 1)
        counts.index_put_((place[learnt], answers[learnt]), torch.tensor(1.0), accumulate=True)
        right = (counts.argmax(1)[place[~learnt]] == answers[~learnt]).float()
        assert right.mean() <= task.chance + 4 * (task.chance / len(right)) ** 0.5


@each_task
def test_no_place_of_the_inputs_holds_the_answer(name):
    """Copying from the best place so far, another for each position that asks, gains little over guessing."""
    task = make(name)
    inputs, targets = task.batch(2000, seed=7)
    best = [  # of the places, for each position that is asked in many rows
        (inputs[rows, : t + 1] == targets[rows, t, None]).float().mean(0).max()
        for t, rows in enumerate((targets != IGNORE).T)
        if rows.sum() >= 200
    ]
    assert torch.stack(best).mean() < task.chance + 0.12


@each_task
def test_every_option_is_told(name):
    """`repr` tells tasks apart, as a resumed run relies on: it names every option."""
    first, second = make(name), make(name, SMALL[name][1])
    assert repr(first) == repr(make(name)) != repr(second)
    for option, value in SMALL[name][1].items():
        assert f"{option}={value!r}" in repr(second)


BAD = [
    ("induction", dict(length=2), "length: 2 "),
    ("induction", dict(symbols=0), "symbols: 0 "),
    ("selective_copying", dict(length=7, count=4), "length: 7 "),
    ("selective_copying", dict(symbols=0), "symbols: 0 "),
    ("selective_copying", dict(count=0), "count: 0 "),
    ("mqar", dict(length=15, pairs=4), "length: 15 "),
    ("mqar", dict(pairs=0), "pairs: 0 "),
    ("mqar", dict(pairs=5, keys=4), "keys: 4 "),
    ("mqar", dict(pairs=5, values=4), "values: 4 "),
    ("mqar", dict(power=-1.0), "power: -1.0 "),
    ("mqar", dict(power=float("inf")), "power: inf "),
    ("phonebook", dict(pairs=2), "pairs: 2 "),
    ("phonebook", dict(pairs=5, names=2), "pairs: 5 "),
    ("phonebook", dict(digits=0), "digits: 0 "),
    ("phonebook", dict(names=0), "names: 0 "),
    *((name, dict(length=0), "length: 0 ") for name in ("parity", "s3", "a5", "s5")),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make(name, options)


def test_every_task_has_a_bad_option_and_small_ones():
    assert {name for name, *_ in BAD} == set(TASKS) == set(SMALL)


def test_induction_by_hand():
    task = make("induction", dict(length=8, symbols=4))
    inputs, targets = task.batch(500, seed=0)
    for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert row.count(task.mark) == 2 and row[-1] == task.mark and target[:-1] == [IGNORE] * 7
        assert target[-1] == row[row.index(task.mark) + 1] != task.mark
    assert set((inputs[:, :-1] == task.mark).int().argmax(1).tolist()) == set(range(6))  # every place it can have


def test_selective_copying_by_hand():
    task = make("selective_copying", dict(length=10, symbols=3, count=3))
    inputs, targets = task.batch(500, seed=0)
    for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert row[7:] == [task.mark] * 3 and target[:7] == [IGNORE] * 7
        assert [i for i in row[:7] if i != task.noise] == target[7:]
    assert ((inputs[:, :7] != task.noise).float().mean(0) - 3 / 7).abs().max() < 0.1  # places are equally likely


def test_mqar_asks_near_keys_more_often():
    """Distances from the pairs follow p(g) ~ (g + 1)^(power - 1): with one pair that is the exact law."""
    task = make("mqar", dict(length=34, pairs=1))
    _, targets, asked = many(task, 20_000)
    seen = asked[:, 2::2].float().mean(0)  # places two apart, after the pair
    law = np.arange(1, 17) ** -0.99
    assert not asked[:, :2].any() and not asked[:, 3::2].any()
    np.testing.assert_allclose(seen, law / law.sum(), atol=0.015)
    task = make("mqar", dict(length=64, pairs=8))
    inputs, _, asked = many(task, 800)
    told = inputs[:, :16].unflatten(1, (8, 2))
    for row, keys, values, where in zip(inputs, told[..., 0], told[..., 1], asked, strict=True):
        assert len(set(keys.tolist())) == len(set(values.tolist())) == 8
        assert sorted(row[where].tolist()) == sorted(keys.tolist())  # every key once
        assert (row[16:][~where[16:]] == 0).all()


@pytest.mark.parametrize("reversed", [False, True])
def test_phonebook_by_hand(reversed):
    task = make("phonebook", dict(pairs=5, digits=3, names=4, reversed=reversed))
    inputs, targets = task.batch(200, seed=0)
    for row, target in zip(inputs, targets, strict=True):
        lines = task.spell(row).split(" / ")
        announced = lines.pop(0).split() if reversed else None
        book, examples_, question = lines[:5], lines[5:7], lines[7].split()
        examples_[0] = examples_[0].removeprefix("/ ")
        question = question[1:] if question[0] == "/" else question
        entries = {tuple(line.split()[:2]): line.split()[2:] for line in book}
        assert len(entries) == 5 and all(line in book for line in examples_) and len(set(examples_)) == 2
        assert entries[tuple(question[:2])] == [task.words[i] for i in target[-3:]]
        assert question[2:] == entries[tuple(question[:2])][:2] and " ".join(question[:2]) not in " ".join(examples_)
        assert announced is None or announced == ["?", *question[:2]]


def test_the_groups_are_groups_of_the_right_size_and_order():
    for name, size in (("parity", 2), ("s3", 6), ("a5", 60), ("s5", 120)):
        task = make(name)
        table = torch.tensor(task.products)
        assert table.shape == (size, size) and torch.equal(table[0], torch.arange(size)) and torch.equal(table[:, 0], table[0])
        for line in (*table, *table.T):  # every line a permutation: inverses exist
            assert sorted(line.tolist()) == list(range(size))
        a, b, c = torch.randint(size, (3, 500), generator=torch.Generator().manual_seed(0))
        assert torch.equal(table[table[a, b], c], table[a, table[b, c]])
        assert torch.equal(table, table.T) == (name == "parity")
    inputs, targets = make("parity", dict(length=20)).batch(50, seed=0)
    assert torch.equal(targets, inputs.cumsum(1) % 2)
    even = {x for x in permutations(range(5)) if np.linalg.det(np.eye(5)[list(x)]) > 0}
    assert set(make("a5").elements) == even


# The loader


def take(loader, batches):
    return [torch.cat(part) for part in zip(*(next(loader)[:2] for _ in range(batches)), strict=True)]


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 4), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_the_loader_resumes_at_any_row_and_is_shared_without_loss(batch_size, world_size, batches, new_batch_size, seed):
    task = make("s3", dict(length=4))
    rows = 4 * batch_size * world_size + 4 * new_batch_size
    inputs, targets = task.batch(rows, seed=seed)
    ranks = [TaskLoader(task, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size) for rank in range(world_size)]
    first = 0
    for _ in range(batches):
        for loader in ranks:
            batch = next(loader)
            assert torch.equal(batch.inputs, inputs[first : first + batch_size])
            assert torch.equal(batch.targets, targets[first : first + batch_size])
            assert batch.documents.shape == batch.inputs.shape and not batch.documents.any()
            first += batch_size
    states = {json.dumps(loader.state_dict()) for loader in ranks}
    assert len(states) == 1
    later = TaskLoader(task, batch_size=new_batch_size, seed=seed)
    later.load_state_dict(json.loads(states.pop()))
    assert torch.equal(take(later, 2)[0], inputs[first : first + 2 * new_batch_size])


def test_the_loader_refuses_what_does_not_fit():
    task = make("parity")
    for options, message in ((dict(batch_size=0, seed=0), "batch_size is 0"), (dict(batch_size=1, seed=-1), "seed is -1"),
                             (dict(batch_size=1, seed=0, rank=1), "rank is 1")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{message}"):
            TaskLoader(task, **options)
    loader = TaskLoader(task, batch_size=1, seed=0)
    good = loader.state_dict()
    bad = [good | {"seed": 1}, good | {"task": "Parity(length=33)"}, good | {"row": -1}, good | {"row": None}, {}]
    for state in bad:
        with pytest.raises(ValueError, match="^loader state: "):
            loader.load_state_dict(state)
    other = TaskLoader(make("parity", dict(length=33)), batch_size=1, seed=0)
    with pytest.raises(ValueError, match="^loader state: task"):
        other.load_state_dict(good)


def test_examples_are_the_same_for_all_and_not_those_of_training():
    task = make("induction", dict(length=16))
    whole = torch.cat([batch.inputs for batch in examples(task, batch_size=7, count=20)])
    assert torch.equal(whole, task.batch(20, seed=0, stream=VALIDATION)[0])
    assert not torch.equal(whole, task.batch(20, seed=0, stream=TRAINING)[0])
    assert [len(batch.inputs) for batch in examples(task, batch_size=4, count=10)] == [4, 4, 2]
    assert sum(len(batch.inputs) for batch in examples(task, batch_size=4, limit=33)) == 3  # rows that hold 33 tokens
    assert sum(len(batch.inputs) for batch in examples(task, batch_size=4, count=2, limit=99)) == 2
    assert not torch.equal(next(examples(task, batch_size=4, seed=1)).inputs, whole[:4])
    for bad in (dict(batch_size=0), dict(batch_size=1, count=0)):
        with pytest.raises(ValueError, match="it must be at least 1"):
            examples(task, **bad)
