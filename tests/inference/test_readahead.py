"""A reader thread that keeps order, raises in place, waits, and goes away."""

from __future__ import annotations

import threading
import time

import pytest

from stfm.inference.readahead import read_ahead


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_order_is_kept(depth):
    assert list(read_ahead(range(20), depth=depth)) == list(range(20))
    assert list(read_ahead([], depth=depth)) == []


def test_items_are_made_in_a_thread_and_no_more_than_asked_for():
    made = []

    def items():
        for i in range(50):
            made.append((i, threading.current_thread()))
            yield i

    ahead = read_ahead(items(), depth=3)
    assert next(ahead) == 0
    time.sleep(0.05)
    assert len(made) <= 4
    assert made[0][1] is not threading.main_thread()
    ahead.close()


def test_an_error_is_raised_at_its_place():
    def items():
        yield 1
        yield 2
        raise ValueError("third")

    ahead = read_ahead(items())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError, match="third"):
        next(ahead)


def test_the_thread_ends_when_the_consumer_leaves():
    for item in read_ahead(iter(range(10**9))):
        if item == 3:
            break
    deadline = time.monotonic() + 5
    while any(t.name.startswith("stfm-read-ahead") for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
