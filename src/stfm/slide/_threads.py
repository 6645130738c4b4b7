"""Plain threads for compiled loops that release the interpreter lock."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
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
    """Call ``work(lo, hi)`` over 0..n, in ``parts`` pieces a thread; below ``inline`` rows on the calling thread."""
    if threads == 1 or n < inline:
        work(0, n)
        return
    borders = edges(n, min(threads * parts, n))
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, borders[:-1], borders[1:]):
            pass
