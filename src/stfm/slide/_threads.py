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


class _Pieces:
    """Pieces of one work that several threads take from; what goes wrong in any of them is kept for the caller."""

    def __init__(self, work: Callable[[int, int], object], borders: list[int]) -> None:
        self.work = work
        self.waiting = deque(pairwise(borders))
        self.total = len(self.waiting)
        self.done = Semaphore(0)
        self.errors: list[BaseException] = []

    def take(self) -> None:
        """Work until nothing waits."""
        while True:
            try:
                lo, hi = self.waiting.popleft()
            except IndexError:
                return
            with self:
                if not self.errors:
                    self.work(lo, hi)

    def __enter__(self) -> None:
        """Begin a piece."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        """End a piece, whatever came of it."""
        if error is not None:
            self.errors.append(error)
        self.done.release()
        return True


def run(work: Callable[[int, int], object], n: int, threads: int, *, parts: int = 1, inline: int = _INLINE) -> None:
    """Call ``work(lo, hi)`` over 0..n, in ``parts`` pieces a thread; below ``inline`` rows on the calling thread.

    The calling thread works, too, and takes what others have not begun. It waits for pieces that are under way and
    never for a thread to begin, which takes milliseconds where cores are busy.
    """
    if threads == 1 or n < inline:
        work(0, n)
        return
    pieces = _Pieces(work, edges(n, min(threads * parts, n)))
    for _ in range(min(threads, pieces.total) - 1):
        start_new_thread(pieces.take, ())  # threading.Thread would wait for the thread to begin
    pieces.take()
    for _ in range(pieces.total):
        pieces.done.acquire()
    if pieces.errors:
        raise pieces.errors[0]
