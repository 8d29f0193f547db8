"""Each value is produced while the one before it is in use."""

from __future__ import annotations

import threading

import pytest

from etr_megatron.convert.prefetch import prefetch


def test_an_item_is_made_while_the_one_before_is_in_use_and_no_further():
    made = [threading.Event() for _ in range(4)]

    def items():
        for number, event in enumerate(made):
            event.set()
            yield number

    found = []
    for number in prefetch(items()):
        found.append(number)
        if number < 3:
            assert made[number + 1].wait(300)
        assert not any(event.is_set() for event in made[number + 2 :])
    assert found == [0, 1, 2, 3]


def test_what_making_an_item_raises_comes_at_its_place():
    def items():
        yield 1
        raise OSError("no space")

    found = []
    with pytest.raises(OSError, match="no space"):
        found.extend(prefetch(items()))
    assert found == [1]


def test_who_stops_in_the_middle_leaves_no_thread():
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="enough"):
        for number in prefetch(iter(range(100))):
            if number == 5:
                raise ValueError("enough")
    assert set(threading.enumerate()) <= before
