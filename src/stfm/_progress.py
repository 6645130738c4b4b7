"""Progress bars: shown to people (terminals, notebooks), silent in logs and under ``verbosity = 0``."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from stfm._settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def is_interactive() -> bool:
    """Whether somebody watches: a terminal, or a notebook that can draw a bar in place (ipywidgets)."""
    if "ipykernel" in sys.modules:
        return find_spec("ipywidgets") is not None
    return sys.stderr.isatty()


@contextmanager
def progress(description: str, total: int | None, *, unit: str = "steps") -> Iterator[Callable[[int], None]]:
    """Show a bar and yield a function that advances it by a number of steps, or of bytes (``unit="bytes"``).

    A ``total`` of None is one that is not known.
    """
    if settings.verbosity == 0 or not is_interactive():
        yield lambda _steps: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
    columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda steps: bar.advance(task, steps)
