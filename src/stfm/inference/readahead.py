"""A reader thread that makes the next items while the consumer computes."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["read_ahead"]

T = TypeVar("T")


def read_ahead(items: Iterable[T], *, depth: int = 2) -> Iterator[T]:
    """Yield ``items`` in order while a thread makes the next ones.

    At most ``depth`` items wait, so memory stays flat. An error in the thread is raised here, at the place of its item.
    The thread ends with the items, and when the generator is closed early.

    Parameters
    ----------
    items
        What to yield; made in the thread, where NumPy, Numba and torch release the GIL.
    depth
        Items that may wait; 0 makes them in the caller's thread.

    Yields
    ------
    The items.
    """
    if depth <= 0:
        yield from items
        return
    iterator = iter(items)
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="stfm-read-ahead") as reader:
        waiting = deque(reader.submit(next, iterator, end) for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(reader.submit(next, iterator, end))
                yield cast("T", item)
        finally:
            for future in waiting:
                future.cancel()
