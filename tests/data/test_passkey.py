"""Passkeys: one number, told once, asked for at the end."""

import pytest

from data.passkey import passkey


def test_a_passkey_is_told_once_and_asked_for():
    for length in (0, 100, 1000, 5000):
        for depth in (0.0, 0.3, 1.0):
            task = passkey(length, depth=depth, seed=length, digits=6)
            assert len(task.answer) == 6 and task.prompt.count(task.answer) == 2 and task.prompt.endswith("The pass key is ")
            assert len(task.prompt) <= max(length, 120)
            told = task.prompt.index(task.answer) / len(task.prompt)
            assert length < 1000 or abs(told - depth) < 0.15
    assert passkey(99, depth=0, seed=1) == passkey(99, depth=0, seed=1) != passkey(99, depth=0, seed=2)
    with pytest.raises(ValueError, match="^depth: "):
        passkey(99, depth=1.5, seed=0)
