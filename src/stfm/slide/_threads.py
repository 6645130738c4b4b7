"""Plain threads for compiled loops that release the interpreter lock."""

from __future__ import annotations

import os
from _thread import start_new_thread
from collections import deque
from itertools import pairwise
from threading import Semaphore
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_INLINE = 2048  # rows below which starting threads costs more than it gains


def n_threads(n_jobs: int | None = None) -> int:
    """Return the number of threads to use: all that this process may use, unless told."""
    if n_jobs is not None and n_jobs > 0:
        return int(n_jobs)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def edges(n: int, parts: int) -> list[int]:
    """Return the borders of ``parts`` nearly equal pieces of 0..n."""
    return [n * p // parts for p in range(parts + 1)]


def run(work: Callable[[int, int], object], n: int, threads: int, *, parts: int = 1, inline: int = _INLINE) -> None:
    """Call ``work(lo, hi)`` over 0..n, in ``parts`` pieces a thread; below ``inline`` rows on the calling thread.

    The calling thread works, too, and takes what others have not begun. It waits for pieces that are under way and
    never for a thread to begin, which takes milliseconds where cores are busy.
    """
    if threads == 1 or n < inline:
        work(0, n)
        return
    pieces = deque(pairwise(edges(n, min(threads * parts, n))))
    total = len(pieces)
    done = Semaphore(0)
    failed: list[BaseException] = []

    def take() -> None:
        while True:
            try:
                lo, hi = pieces.popleft()
            except IndexError:
                return  # nothing left
            try:
                if not failed:
                    work(lo, hi)
            except BaseException as error:  # noqa: BLE001 raised again below, on the calling thread
                failed.append(error)
            finally:
                done.release()

    for _ in range(min(threads, total) - 1):
        start_new_thread(take, ())  # threading.Thread would wait for the thread to begin
    take()
    for _ in range(total):
        done.acquire()
    if failed:
        raise failed[0]
